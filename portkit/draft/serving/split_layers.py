"""One class of layer that holds now a mixer with a state, now something else -> two classes.

vLLM's state layers are called otherwise than attention, so a call that serves both cannot stay one.
The model chooses the class for each layer by the condition that its `__init__` had.
"""

from __future__ import annotations

from dataclasses import dataclass

import libcst as cst

from portkit.analysis.classes import view_module
from portkit.analysis.recurrent import kind_of
from portkit.draft import edit
from portkit.draft.work import set_method

TABLE = "LAYER_TYPES"


@dataclass(frozen=True)
class _Split:
    """How one class chooses what it holds."""

    attr: str
    cases: tuple[tuple[str, str, cst.BaseExpression], ...]
    """(key or "", class of the file, what is assigned to the attribute)."""
    test: cst.BaseExpression
    """The condition of the first case, or the key that picks a case from a table."""
    statement: edit.Statement
    by_key: bool


def split_layers(module: cst.Module) -> cst.Module:
    """Split each such class; the models' calls choose among what came of it."""
    view = view_module(module.code)
    stateful = {v.name for v in view.classes.values() if kind_of(v) is not None}
    if not stateful:
        return module
    for cls in [c for c in module.body if isinstance(c, cst.ClassDef)]:
        found = _split_of(module, cls, set(view.classes))
        if found is not None and {name for _, name, _ in found.cases} & stateful:
            module = _applied(module, cls, found)
    return module


def _split_of(module: cst.Module, cls: cst.ClassDef, classes: set[str]) -> _Split | None:
    init = edit.method(cls, "__init__")
    for node in edit.body_of(init) if init is not None else ():
        if isinstance(node, cst.If) and isinstance(node.orelse, cst.Else):
            made = [
                {p[0]: p[1] for n in edit.body_of(b) if (p := edit.assigned_attribute(n))}
                for b in (node, node.orelse)
            ]
            for attr in made[0].keys() & made[1].keys():
                names = [edit.code(m[attr].func) if edit.is_call(m[attr]) else "" for m in made]
                if names[0] != names[1] and set(names) <= classes:
                    cases = (("", names[0], made[0][attr]), ("", names[1], made[1][attr]))
                    return _Split(attr, cases, node.test, node, False)
        pair = edit.assigned_attribute(node)
        if pair and edit.is_call(pair[1]) and isinstance(pair[1].func, cst.Subscript):
            table = _table(module, edit.code(pair[1].func.value))
            cases = tuple(
                (key, name, pair[1].with_changes(func=cst.Name(name)))
                for key, name in table
                if name in classes
            )
            if cases and len(cases) == len(table):
                return _Split(pair[0], cases, pair[1].func.slice[0].slice.value, node, True)
    return None


def _table(module: cst.Module, name: str) -> list[tuple[str, str]]:
    """(key, class) of a dictionary at the top level of the file."""
    for item in module.body:
        pair = edit.assigned(item)
        if pair and edit.code(pair[0]) == name and isinstance(pair[1], cst.Dict):
            return [
                (edit.code(e.key), edit.code(e.value))
                for e in pair[1].elements
                if isinstance(e, cst.DictElement)
            ]
    return []


def _applied(module: cst.Module, cls: cst.ClassDef, split: _Split) -> cst.Module:
    test = _over_config(cls, split.test)
    if test is None:
        return module
    made = []
    for at, (key, name, _) in enumerate(split.cases):
        new = cls.name.value
        if split.by_key or at == 0:
            new = name + _after_common(name, cls.name.value)
        made.append((key, _case(cls, split, at, new)))
    body: list[cst.CSTNode] = []
    for item in module.body:
        if item is cls:
            body += [c for _, c in made]
            if split.by_key:
                rows = "".join(f"    {key}: {c.name.value},\n" for key, c in made)
                body.append(edit.statement(f"{TABLE} = {{\n{rows}}}"))
        elif isinstance(item, cst.ClassDef):
            body.append(_choosing(item, cls, [c.name.value for _, c in made], test, split.by_key))
        else:
            body.append(item)
    return module.with_changes(body=body)


def _after_common(name: str, layer: str) -> str:
    """What the layer's name has behind the words that both names begin with."""
    common = 0
    while common < min(len(name), len(layer)) and name[common] == layer[common]:
        common += 1
    while common and common < len(layer) and not layer[common].isupper():
        common -= 1
    return layer[common:]


def _over_config(cls: cst.ClassDef, test: cst.BaseExpression) -> str | None:
    """The condition over config and layer_idx, without what __init__ named on the way."""
    known = {
        f"self.{p[0]}": p[1]
        for n in edit.body_of(edit.method(cls, "__init__"))
        if (p := edit.assigned_attribute(n))
    }

    def change(here: cst.CSTNode) -> cst.CSTNode | None:
        value = known.get(edit.code(here)) if isinstance(here, cst.Attribute) else None
        if isinstance(value, cst.IfExp) and edit.code(value.test).startswith("hasattr(config, "):
            value = value.body
        return value

    shown = edit.replace(test, change)
    names = edit.names_read(shown) - {"self"}
    return edit.flat(shown) if names <= {"config", "layer_idx"} else None


def _case(cls: cst.ClassDef, split: _Split, at: int, name: str) -> cst.ClassDef:
    """The class as it is where this case holds."""
    init, forward = edit.method(cls, "__init__"), edit.method(cls, "forward")
    body: list[edit.Statement] = []
    for node in edit.body_of(init):
        pair = edit.assigned_attribute(node)
        if node is split.statement and not split.by_key:
            body += edit.body_of(node if at == 0 else node.orelse)
        elif node is split.statement:
            made = edit.statement(f"self.{split.attr} = {edit.code(split.cases[at][2])}")
            body.append(made.with_changes(leading_lines=node.leading_lines))
        elif pair and pair[0] == split.attr:
            continue  # what one of the cases replaces
        else:
            body.append(node)
    key, tested = split.cases[at][0], edit.code(split.test)

    def decided(here: cst.CSTNode) -> cst.CSTNode | None:
        if not isinstance(here, cst.Comparison):
            return None
        if not split.by_key and edit.code(here) == tested:
            return cst.Name(str(at == 0))
        constant = edit.code(here).removeprefix(f"{tested} == ")
        if split.by_key and constant in {k for k, _, _ in split.cases}:
            return cst.Name(str(constant == key))
        return None

    new = set_method(cls, edit.with_body(init, body))
    new = set_method(new, _folded(edit.replace(forward, decided)))
    return new.with_changes(name=cst.Name(name))


def _folded(forward: cst.FunctionDef) -> cst.FunctionDef:
    """Without branches that are decided."""
    body: list[edit.Statement] = []
    for node in edit.body_of(forward):
        body += _live(node)
    return edit.with_body(forward, body)


def _live(node: edit.Statement) -> list[edit.Statement]:
    if not isinstance(node, cst.If) or edit.code(node.test) not in ("True", "False"):
        return [node]
    if edit.code(node.test) == "True":
        return edit.body_of(node)
    if isinstance(node.orelse, cst.If):
        return _live(node.orelse)
    return edit.body_of(node.orelse) if node.orelse is not None else []


def _choosing(
    item: cst.ClassDef, cls: cst.ClassDef, names: list[str], test: str, by_key: bool
) -> cst.ClassDef:
    """Layer(config, i) -> Other(config, i) if test else Layer(config, i), or from the table."""
    position = edit.parameters(edit.method(cls, "__init__")).index("layer_idx")

    def change(here: cst.CSTNode) -> cst.CSTNode | None:
        if not edit.is_call(here, cls.name.value):
            return None
        index = edit.code(edit.call_argument(here, position, "layer_idx"))
        asked = edit.code(edit.replace_text(edit.expression(test), "layer_idx", index))
        given = ", ".join(
            edit.flat(a.with_changes(comma=cst.MaybeSentinel.DEFAULT)) for a in here.args
        )
        if by_key:
            return edit.expression(f"{TABLE}[{asked}]({given})")
        return edit.expression(f"{names[0]}({given}) if {asked} else {names[1]}({given})")

    return edit.replace(item, change)
