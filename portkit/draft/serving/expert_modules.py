"""Mixtures of experts in more classes than others have -> the classes that later steps read.

Parts that are given a config inside the config read it from the whole one; parameters of experts
that stand in a module inside the experts move to them; a router that only makes logits, beside a
method of the block that chooses, becomes one class.
"""

from __future__ import annotations

from itertools import pairwise

import libcst as cst

from portkit.draft import edit
from portkit.draft.work import set_members, set_method

_PART = "part_of_the_config"
"""Stands for `config.<part>` until the file is parsed again."""


def merge_expert_modules(module: cst.Module) -> tuple[cst.Module, tuple[tuple[str, str], ...]]:
    """The file, and (piece of a name in the checkpoint, in the file) of what moved."""
    if "one_hot(" not in module.code:
        return module, ()
    module = _whole_configs(module)
    module, renamed = _flat_experts(module)
    return _choosing_routers(module), renamed


def _classes(module: cst.Module) -> dict[str, cst.ClassDef]:
    return {i.name.value: i for i in module.body if isinstance(i, cst.ClassDef)}


def _put(module: cst.Module, *new: cst.ClassDef) -> cst.Module:
    named = {c.name.value: c for c in new}
    body = [named.get(i.name.value, i) if isinstance(i, cst.ClassDef) else i for i in module.body]
    return module.with_changes(body=body)


# ---- configs inside the config ------------------------------------------------------------------


def _whole_configs(module: cst.Module) -> cst.Module:
    """Router(config.ffn_config), which reads config.x -> Router(config), config.ffn_config.x."""
    done = False
    while not done:  # what a class passes on is a part of the whole only after it was changed
        done = True
        for name, cls in _classes(module).items():
            part = _part_given(module, cls)
            if part:
                module, done = _reads_whole(module, name, part), False
                break
    return module


def _part_given(module: cst.Module, cls: cst.ClassDef) -> str:
    """config.<part>, if every construction of the class passes just that as its `config`."""
    init = edit.method(cls, "__init__")
    if init is None or "config" not in edit.parameters(init):
        return ""
    position = edit.parameters(init).index("config")
    calls = edit.find(module, lambda n: edit.is_call(n, cls.name.value))
    given = {edit.code(edit.call_argument(c, position, "config")) for c in calls}
    part = next(iter(given), "")
    is_part = len(given) == 1 and part.startswith("config.") and part.count(".") == 1
    return part if is_part else ""


def _reads_whole(module: cst.Module, name: str, part: str) -> cst.Module:
    """The file with this class made of the whole config."""

    def whole(node: cst.CSTNode) -> cst.CSTNode | None:
        return edit.replace_text(node, part, "config") if edit.is_call(node, name) else None

    module = edit.replace(module, whole)
    cls = _classes(module)[name]
    init = edit.method(cls, "__init__")
    # The name stands for the part in every statement, in calls of other constructors too.
    body = [edit.rename_reads(n, {"config": _PART}) for n in edit.body_of(init)]
    module = _put(module, set_method(cls, edit.with_body(init, body)))
    return cst.parse_module(module.code.replace(_PART, part))


# ---- parameters of experts ----------------------------------------------------------------------


def _flat_experts(module: cst.Module) -> tuple[cst.Module, tuple[tuple[str, str], ...]]:
    """self.mlp = GLU(config); self.mlp.w1, self.mlp(x, w1) -> self.w1, a method self.mlp."""
    renamed: list[tuple[str, str]] = []
    for name, cls in _classes(module).items():
        forward, init = edit.method(cls, "forward"), edit.method(cls, "__init__")
        if forward is None or init is None or "one_hot(" not in edit.code(forward):
            continue
        for node in edit.body_of(init):
            pair = edit.assigned_attribute(node)
            inner = _classes(module).get(edit.code(pair[1].func)) if _is_made(pair) else None
            if inner is None or "nn.Parameter(" not in edit.code(inner):
                continue
            if [edit.code(a.value) for a in pair[1].args] != ["config"]:
                continue
            attr = pair[0]
            cls = _absorbed(cls, node, attr, inner)
            module = _put(module, cls)
            holders = _attributes_of(module, name)
            renamed += [(f".{h}.{attr}.", f".{h}.") for h in holders]
            break
    return module, tuple(renamed)


def _is_made(pair: tuple[str, cst.BaseExpression] | None) -> bool:
    return pair is not None and isinstance(pair[1], cst.Call)


def _absorbed(
    cls: cst.ClassDef, node: edit.Statement, attr: str, inner: cst.ClassDef
) -> cst.ClassDef:
    """The class with the inner one's parameters, and its forward as a method of the same name."""
    init = edit.method(cls, "__init__")
    made = edit.body_of(edit.method(inner, "__init__"))
    made = [n for n in made if "super().__init__(" not in edit.code(n)]
    known = {edit.code(n).strip() for n in made}
    body: list[edit.Statement] = []
    for own in edit.body_of(init):
        if own is node:
            body += made
        elif edit.code(own).strip() not in known:
            body.append(own)
    called = edit.method(inner, "forward").with_changes(name=cst.Name(attr))
    forward = edit.method(cls, "forward")

    def read(here: cst.CSTNode) -> cst.CSTNode | None:
        if isinstance(here, cst.Attribute) and edit.code(here.value) == f"self.{attr}":
            return here.with_changes(value=cst.Name("self"))
        return None

    cls = set_method(cls, edit.with_body(init, body))
    cls = set_method(cls, edit.replace(forward, read))
    members = [m for m in edit.members(cls) if m is not edit.method(cls, "forward")]
    return set_members(cls, [*members, edit.blank_before(called), edit.method(cls, "forward")])


def _attributes_of(module: cst.Module, name: str) -> list[str]:
    """Attributes under which this class is made anywhere in the file."""
    lines = edit.find(
        module, lambda n: (p := edit.assigned_attribute(n)) is not None and edit.is_call(p[1], name)
    )
    return list(dict.fromkeys(edit.assigned_attribute(n)[0] for n in lines))


# ---- routers ------------------------------------------------------------------------------------


def _choosing_routers(module: cst.Module) -> cst.Module:
    """logits = self.router(x); w, i = self.choose(logits) -> _, w, i = self.router(x)."""
    for cls in _classes(module).values():
        forward, init = edit.method(cls, "forward"), edit.method(cls, "__init__")
        if forward is None or init is None:
            continue
        body = edit.body_of(forward)
        for first, second in pairwise(body):
            made = _merged(module, cls, first, second)
            if made is not None:
                module = _put(module, *made)
                break
    return module


def _merged(
    module: cst.Module, cls: cst.ClassDef, first: edit.Statement, second: edit.Statement
) -> tuple[cst.ClassDef, cst.ClassDef] | None:
    """(router that chooses, block that calls it); None if the statements are of another form."""
    forward, init = edit.method(cls, "forward"), edit.method(cls, "__init__")
    logits, chosen = edit.assigned(first), edit.assigned(second)
    if not (logits and chosen and _self_call(logits[1]) and _self_call(chosen[1])):
        return None
    router = _made_class(module, init, _self_call(logits[1]))
    method = edit.method(cls, _self_call(chosen[1]))
    name = edit.code(logits[0])
    given = [edit.code(a.value) for a in chosen[1].args]
    others = [n for n in edit.body_of(forward) if n not in (first, second)]
    if router is None or method is None or given != [name] or edit.parameters(method) != [name]:
        return None
    if any(name in edit.names_read(n) for n in others) or not isinstance(chosen[0], cst.Tuple):
        return None
    old = edit.method(router, "forward")
    *before, last = edit.body_of(old)
    *choosing, result = edit.body_of(method)
    returned, results = edit.single(last), edit.single(result)
    if not isinstance(returned, cst.Return) or edit.code(returned.value) != name:
        return None
    if not isinstance(results, cst.Return) or not isinstance(results.value, cst.Tuple):
        return None
    own = {p[0]: n for n in edit.body_of(init) if (p := edit.assigned_attribute(n))}
    needed = [own.get(a) for a in sorted(edit.self_attributes_read(method))]
    if any(n is None or edit.names_read(n) - {"self", "config"} for n in needed):
        return None
    shown = ", ".join(edit.code(e.value) for e in results.value.elements)
    end = edit.statement(f"return {name}, {shown}")
    new = edit.with_body(old, [*before, *choosing, end]).with_changes(returns=None)
    made = edit.method(router, "__init__")
    router = set_method(router, edit.with_body(made, [*edit.body_of(made), *needed]))
    router = set_method(router, new)
    targets = ", ".join(edit.code(e.value) for e in chosen[0].elements)
    call = edit.statement(f"_, {targets} = {edit.code(logits[1])}")
    kept = [call if n is first else n for n in edit.body_of(forward) if n is not second]
    moved = [n for n in edit.body_of(init) if n not in needed]
    members = [m for m in edit.members(cls) if m is not method]
    block = set_method(set_members(cls, members), edit.with_body(forward, kept))
    return router, set_method(block, edit.with_body(init, moved))


def _self_call(value: cst.BaseExpression) -> str:
    """x of self.x(...)."""
    name = edit.code(value.func) if isinstance(value, cst.Call) else ""
    return name.removeprefix("self.") if name.startswith("self.") else ""


def _made_class(module: cst.Module, init: cst.FunctionDef, attr: str) -> cst.ClassDef | None:
    """The file's class that `__init__` makes for this attribute, of the config alone."""
    for node in edit.body_of(init):
        pair = edit.assigned_attribute(node)
        if pair and pair[0] == attr and isinstance(pair[1], cst.Call):
            alone = [edit.code(a.value) for a in pair[1].args] == ["config"]
            return _classes(module).get(edit.code(pair[1].func)) if alone else None
    return None
