"""What __init__ methods decide before serving: class tables, constant arguments, unused parts."""

from __future__ import annotations

from collections.abc import Iterable

import libcst as cst

from portkit.draft import edit
from portkit.draft.work import set_members, set_method

_PREFERRED = '"sdpa"'


def resolve_tables(module: cst.Module) -> cst.Module:
    """ATTENTION_CLASSES[config._attn_implementation](...) -> the class that needs no kernel."""
    tables: dict[str, str] = {}
    classes = {i.name.value for i in module.body if isinstance(i, cst.ClassDef)}
    for item in module.body:
        pair = edit.assigned(item)
        if pair is None or not isinstance(pair[1], cst.Dict):
            continue
        entries = {edit.code(e.key): edit.code(e.value) for e in pair[1].elements if e.value}
        if entries and set(entries.values()) <= classes:
            tables[edit.code(pair[0])] = entries.get(_PREFERRED) or next(iter(entries.values()))

    def change(here: cst.CSTNode) -> cst.CSTNode | None:
        if not isinstance(here, cst.Subscript) or edit.code(here.value) not in tables:
            return None
        if "_attn_implementation" in edit.code(here):
            return cst.Name(tables[edit.code(here.value)])
        return None

    return edit.replace(module, change) if tables else module


def name_layer_index(module: cst.Module) -> cst.Module:
    """Call the number of a layer `layer_idx` everywhere, as today's files do."""
    inits = [
        init
        for c in module.body
        if isinstance(c, cst.ClassDef) and (init := edit.method(c, "__init__")) is not None
    ]
    comprehensions = [
        c for init in inits for c in edit.find(init, lambda n: isinstance(n, cst.ListComp))
    ]
    for comprehension in comprehensions:
        index = edit.code(comprehension.for_in.target)
        if not isinstance(comprehension.elt, cst.Call) or index == "_":
            continue
        for argument in comprehension.elt.args:
            name = argument.keyword.value if argument.keyword is not None else ""
            if edit.code(argument.value) == index and name not in ("", "layer_idx"):
                return _renamed(module, name)
    return module


def read_layer_index(module: cst.Module) -> cst.Module:
    """`self.layer_idx` in an __init__ that is given layer_idx: the argument itself."""
    for cls in [c for c in module.body if isinstance(c, cst.ClassDef)]:
        init = edit.method(cls, "__init__")
        if init is None or "layer_idx" not in edit.parameters(init):
            continue
        if "layer_idx" not in edit.self_attributes_read(init):
            continue
        body = [
            s
            if (edit.assigned_attribute(s) or ("",))[0] == "layer_idx"
            else edit.replace_text(s, "self.layer_idx", "layer_idx")
            for s in edit.body_of(init)
        ]
        new = set_method(cls, edit.with_body(init, body))
        module = module.with_changes(body=[new if i is cls else i for i in module.body])
    return module


def _renamed(module: cst.Module, name: str) -> cst.Module:
    def change(here: cst.CSTNode) -> cst.CSTNode | None:
        return cst.Name("layer_idx") if isinstance(here, cst.Name) and here.value == name else None

    return edit.replace(module, change)


def rename_shadows(module: cst.Module, taken: Iterable[str]) -> cst.Module:
    """A class of the file under the name of a layer of vLLM's gets another: Attention."""
    names = {i.name.value for i in module.body if isinstance(i, cst.ClassDef)}
    new = {n: f"Self{n}" for n in sorted(names & set(taken)) if f"Self{n}" not in names}
    if not new:
        return module

    def change(here: cst.CSTNode) -> cst.CSTNode | None:
        if isinstance(here, cst.Name) and here.value in new:
            return cst.Name(new[here.value])
        return None

    return edit.replace(module, change)


def refuse_sliced_weights(module: cst.Module) -> tuple[cst.Module, list[str]]:
    """Leave out branches that read slices of a linear's weight; __init__ refuses their configs.

    Such a branch imitates how a model was once split over devices. vLLM's layers own their weights.
    """
    notes: list[str] = []
    for cls in [c for c in module.body if isinstance(c, cst.ClassDef)]:
        refused: list[str] = []

        def change(here: cst.CSTNode, refused=refused) -> cst.CSTNode | None:
            if not isinstance(here, cst.IndentedBlock):
                return None
            body: list[cst.BaseStatement] = []
            for node in here.body:
                if _slices_weights(node):
                    refused.append(edit.flat(node.test))
                    body += edit.body_of(node.orelse)
                else:
                    body.append(node)
            return here.with_changes(body=body)

        new = edit.replace(cls, change)
        if not refused:
            continue
        init = edit.method(new, "__init__")
        test = refused[0]
        made = edit.statement(
            f"if {test}:\n"
            f'    raise NotImplementedError("not ported: {test.replace("self.", "config.")}")'
        )
        new = set_method(new, edit.with_body(init, [*edit.body_of(init), made]))
        module = module.with_changes(body=[new if i is cls else i for i in module.body])
        notes.append(
            f"{cls.name.value}: what it does if {test} is left out, and __init__ refuses such "
            "a config."
        )
    return module, notes


def _slices_weights(node: cst.CSTNode) -> bool:
    return (
        isinstance(node, cst.If)
        and isinstance(node.orelse, cst.Else)
        and "F.linear(" in edit.code(node.body)
        and ".weight[" in edit.code(node.body)
        and all(n == "self" for n in edit.names_read(node.test))
    )


def drop_unserved_parts(module: cst.Module, served: set[tuple[str, str]]) -> cst.Module:
    """Drop conditional submodules that no served forward reads, e.g. cross attention."""
    for cls in [c for c in module.body if isinstance(c, cst.ClassDef)]:
        init, name = edit.method(cls, "__init__"), cls.name.value
        if init is None or (name, "forward") not in served:
            continue
        read: set[str] = set()
        for method in edit.members(cls):
            if isinstance(method, cst.FunctionDef) and (name, method.name.value) in served:
                read |= edit.self_attributes_read(method)
        body = [s for s in edit.body_of(init) if not _unserved(s, read)]
        if len(body) != len(edit.body_of(init)):
            new = set_method(cls, edit.with_body(init, body))
            module = module.with_changes(body=[new if i is cls else i for i in module.body])
    return module


def _unserved(node: edit.Statement, read: set[str]) -> bool:
    """An `if` in __init__ that only makes submodules which serving never reads (or raises)."""
    if not isinstance(node, cst.If) or node.orelse is not None:
        return False
    makes = False
    for inner in edit.body_of(node):
        pair = edit.assigned_attribute(inner)
        if pair is not None and isinstance(pair[1], cst.Call) and pair[0] not in read:
            makes = True
        elif not isinstance(inner, cst.If) or not all(
            isinstance(edit.single(s), cst.Raise) for s in edit.body_of(inner)
        ):
            return False
    return makes


def drop_unserved_methods(module: cst.Module, served: set[tuple[str, str]]) -> cst.Module:
    """Drop methods of served modules that nothing calls: accessors for Transformers' own use."""
    for cls in [c for c in module.body if isinstance(c, cst.ClassDef)]:
        if (cls.name.value, "forward") not in served:
            continue
        whole = module.code
        kept = [m for m in edit.members(cls) if not _uncalled(m, whole)]
        if len(kept) != len(edit.members(cls)):
            new = set_members(cls, kept)
            module = module.with_changes(body=[new if i is cls else i for i in module.body])
    return module


def _uncalled(member: cst.CSTNode, whole: str) -> bool:
    if not isinstance(member, cst.FunctionDef) or member.name.value in ("__init__", "forward"):
        return False
    name = member.name.value
    elsewhere = whole.count(f".{name}") - edit.code(member).count(f".{name}")
    return elsewhere == 0 and not name.startswith("__")
