"""The list of decoder layers where it is more than one comprehension over one class.

Before the draft, a loop that appends becomes the comprehension it stands for; in the draft, a class
chosen for each layer becomes a function that make_layers calls with the layer's prefix.
"""

from __future__ import annotations

import libcst as cst

from portkit.draft import edit
from portkit.draft.work import Work, set_method


def unroll(work: Work) -> None:
    """A loop that appends layers to a list -> nn.ModuleList([... for i in range(n)])."""
    cls = work.cls(work.facts.model)
    init = edit.method(cls, "__init__")
    body = edit.body_of(init)
    for index, node in enumerate(body):
        loop = _appending(node)
        if loop is None:
            continue
        name, made = loop
        start = next((i for i, n in enumerate(body) if _empty_list(n, name)), None)
        end = next((i for i, n in enumerate(body) if _module_list(n, name)), None)
        if start is None or end is None or not start < index < end:
            continue
        source = f"[{edit.code(made)} for {edit.code(node.target)} in {edit.code(node.iter)}]"
        new = edit.replace(
            body[end],
            lambda n, name=name, source=source: (
                edit.expression(source) if isinstance(n, cst.Name) and n.value == name else None
            ),
        )
        kept = [n for i, n in enumerate(body) if i not in (start, index, end)]
        kept.insert(end - 2, new.with_changes(leading_lines=body[start].leading_lines))
        work.put(set_method(cls, edit.with_body(init, kept)))
        return


def _appending(node: edit.Statement) -> tuple[str, cst.BaseExpression] | None:
    """(list, what is appended) of a loop that does nothing else; its local names are put in."""
    if not isinstance(node, cst.For):
        return None
    *before, last = edit.body_of(node)
    small = edit.single(last)
    if not (isinstance(small, cst.Expr) and isinstance(small.value, cst.Call)):
        return None
    function = small.value.func
    if not (isinstance(function, cst.Attribute) and function.attr.value == "append"):
        return None
    made = small.value.args[0].value
    for statement in reversed(before):
        pair = edit.assigned(statement)
        if pair is None or not isinstance(pair[0], cst.Name):
            return None
        made = edit.replace_text(made, pair[0].value, edit.code(pair[1]))
    return edit.code(function.value), made


def _empty_list(node: edit.Statement, name: str) -> bool:
    pair = edit.assigned(node)
    return pair is not None and edit.code(pair[0]) == name and edit.code(pair[1]) == "[]"


def _module_list(node: edit.Statement, name: str) -> bool:
    pair = edit.assigned_attribute(node)
    return pair is not None and edit.flat(pair[1]) == f"nn.ModuleList({name})"


def chooser(work: Work, node: edit.Statement) -> list[edit.Statement]:
    """`def get_layer(prefix)`, if the layers' class or arguments depend on the layer's number."""
    found = _comprehension(work, node)
    if found is None:
        return []
    element, index = found
    lines = [f"{index} = extract_layer_index(prefix)"]
    while isinstance(element, cst.IfExp):
        lines += [f"if {edit.flat(element.test)}:", f"    {_return(work, element.body, index)}"]
        element = element.orelse
    if not isinstance(element.func, cst.Name):
        lines.append(f"layer_class = {edit.code(element.func)}")
        element = element.with_changes(func=cst.Name("layer_class"))
    lines.append(_return(work, element, index))
    text = "def get_layer(prefix: str) -> nn.Module:\n    " + "\n    ".join(lines)
    return [edit.blank_before(edit.function(text))]


def more_arguments(work: Work) -> list[str]:
    """What each layer gets from the engine."""
    model_config = ["model_config=vllm_config.model_config"] if work.facts.recurrent else []
    return [*model_config, "cache_config=cache_config", "prefix=prefix"]


def _return(work: Work, made: cst.Call, index: str) -> str:
    arguments = [
        edit.flat(a.with_changes(comma=cst.MaybeSentinel.DEFAULT))
        for a in made.args
        if edit.code(a.value) != index
    ]
    more = more_arguments(work)
    if isinstance(made.func, cst.Name) and work.has(made.func.value):
        init = edit.method(work.cls(made.func.value), "__init__")
        if "model_config" not in edit.parameters(init):
            more = [m for m in more if not m.startswith("model_config=")]
    return f"return {edit.code(made.func)}({', '.join([*arguments, *more])})"


def _comprehension(work: Work, node: edit.Statement) -> tuple[cst.BaseExpression, str] | None:
    """(what is made for each number, name of the number) if it takes a function to make it."""
    pair = edit.assigned_attribute(node)
    if pair is None or pair[0] != work.facts.layers_attr:
        return None
    found = edit.find(pair[1], lambda n: isinstance(n, cst.ListComp | cst.GeneratorExp))
    if len(found) != 1:
        return None
    element, index = found[0].elt, edit.code(found[0].for_in.target)
    if isinstance(element, cst.IfExp):
        inner: cst.BaseExpression = element
        while isinstance(inner, cst.IfExp):
            if not isinstance(inner.body, cst.Call):
                return None
            inner = inner.orelse
        return (element, index) if isinstance(inner, cst.Call) else None
    if not isinstance(element, cst.Call):
        return None
    numbered = index in edit.names_read(element.func) or any(
        index in edit.names_read(a.value) for a in element.args if edit.code(a.value) != index
    )
    return (element, index) if numbered else None
