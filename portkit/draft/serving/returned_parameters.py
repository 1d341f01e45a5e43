"""A parameter that a module hands out for its caller to add: added where it lives instead.

`out, weights, bias = self.attention(x)` and `out + bias` in the layer becomes an attention that
adds its own bias: vLLM's layers return one tensor.
"""

from __future__ import annotations

from itertools import pairwise

import libcst as cst

from portkit.draft import edit
from portkit.draft.work import put_class, set_method


def keep_parameters(module: cst.Module) -> cst.Module:
    """Callers read the parameter from the module; the module no longer returns it."""
    for cls in [c for c in module.body if isinstance(c, cst.ClassDef)]:
        forward = edit.method(cls, "forward")
        found = _returned(cls, forward) if forward is not None else None
        if found is None:
            continue
        position, attr = found
        module = put_class(module, set_method(cls, _without_element(forward, position)))
        for user in [c for c in module.body if isinstance(c, cst.ClassDef)]:
            for held in _held(user, cls.name.value):
                new = _reading(edit.method(user, "forward"), held, position, attr)
                if new is not None:
                    module = put_class(module, set_method(user, new))
    return module


def add_inside(module: cst.Module) -> cst.Module:
    """`x = self.m(x)` and `if self.m.p is not None: x = x + self.m.p`: m adds p itself."""
    for user in [c for c in module.body if isinstance(c, cst.ClassDef)]:
        forward = edit.method(user, "forward")
        body = edit.body_of(forward) if forward is not None else []
        for first, second in pairwise(body):
            found = _added(first, second)
            if found is None:
                continue
            held, attr = found
            made = {c.name.value: c for c in module.body if isinstance(c, cst.ClassDef)}
            cls = next((made[n] for n in made if held in _held(user, n)), None)
            if cls is None:
                continue
            kept = [s for s in body if s is not second]
            module = put_class(module, set_method(user, edit.with_body(forward, kept)))
            module = put_class(module, _adding(cls, attr))
            return add_inside(module)
    return module


def _returned(cls: cst.ClassDef, forward: cst.FunctionDef) -> tuple[int, str] | None:
    """(place in the returned tuple, attribute) of a parameter that forward hands out."""
    body = edit.body_of(forward)
    last = edit.single(body[-1]) if body else None
    init = edit.method(cls, "__init__")
    if not isinstance(last, cst.Return) or not isinstance(last.value, cst.Tuple) or init is None:
        return None
    parameters = {
        pair[0]
        for node in edit.body_of(init)
        if (pair := edit.assigned_attribute(node)) and "nn.Parameter(" in edit.code(pair[1])
    }
    for position, element in enumerate(last.value.elements):
        attr = edit.code(element.value).removeprefix("self.")
        if position and attr in parameters:
            return position, attr
    return None


def _without_element(forward: cst.FunctionDef, position: int) -> cst.FunctionDef:
    *body, last = edit.body_of(forward)
    small = edit.single(last)
    kept = [edit.code(e.value) for n, e in enumerate(small.value.elements) if n != position]
    value = edit.expression(", ".join(kept))
    return edit.with_body(
        forward, [*body, last.with_changes(body=[small.with_changes(value=value)])]
    )


def _held(user: cst.ClassDef, name: str) -> list[str]:
    """Attributes of a class that hold a module of class `name`."""
    init = edit.method(user, "__init__")
    return [
        pair[0]
        for node in (edit.body_of(init) if init is not None else ())
        if (pair := edit.assigned_attribute(node)) and edit.is_call(pair[1], name)
    ]


def _reading(
    forward: cst.FunctionDef | None, held: str, position: int, attr: str
) -> cst.FunctionDef | None:
    body = edit.body_of(forward) if forward is not None else []
    for at, node in enumerate(body):
        pair = edit.assigned(node)
        if pair is None or not edit.is_call(pair[1], f"self.{held}"):
            continue
        if not isinstance(pair[0], cst.Tuple) or len(pair[0].elements) <= position:
            continue
        names = [edit.code(e.value) for e in pair[0].elements]
        name = names.pop(position)
        bound = edit.statement(f"{', '.join(names)} = {edit.code(pair[1])}")
        bound = bound.with_changes(leading_lines=node.leading_lines)
        read = f"self.{held}.{attr}"
        rest = [edit.replace_text(_plain(s, name), name, read) for s in body[at + 1 :]]
        return edit.with_body(forward, [*body[:at], bound, *rest])
    return None


def _plain(node: edit.Statement, name: str) -> edit.Statement:
    """`p.expand_as(x) if p is not None else p` as p: adding spreads it all the same."""

    def change(here: cst.CSTNode) -> cst.CSTNode | None:
        if not isinstance(here, cst.IfExp) or edit.code(here.test) != f"{name} is not None":
            return None
        spread = edit.code(here.body).startswith(f"{name}.expand_as(")
        return here.orelse if spread and edit.code(here.orelse) == name else None

    return edit.replace(node, change)


def _added(first: edit.Statement, second: edit.Statement) -> tuple[str, str] | None:
    """(attribute that holds the module, its parameter) of such a pair of statements."""
    pair = edit.assigned(first)
    if pair is None or not isinstance(second, cst.If) or second.orelse is not None:
        return None
    if not isinstance(pair[1], cst.Call) or len(edit.body_of(second)) != 1:
        return None
    target = pair[0].elements[0].value if isinstance(pair[0], cst.Tuple) else pair[0]
    held, name = edit.code(pair[1].func), edit.code(target)
    parameter = edit.code(second.test).removesuffix(" is not None")
    adds = f"{name} = {name} + {parameter}"
    if not held.startswith("self.") or not parameter.startswith(f"{held}."):
        return None
    if edit.code(edit.body_of(second)[0]).strip() != adds:
        return None
    return held.removeprefix("self."), parameter.removeprefix(f"{held}.")


def _adding(cls: cst.ClassDef, attr: str) -> cst.ClassDef:
    """The class with its parameter added to the first of what forward returns."""
    forward = edit.method(cls, "forward")
    *body, last = edit.body_of(forward)
    small = edit.single(last)
    value = small.value
    first = value.elements[0].value if isinstance(value, cst.Tuple) else value
    name = edit.code(first)
    made = edit.statement(f"if self.{attr} is not None:\n    {name} = {name} + self.{attr}")
    return set_method(cls, edit.with_body(forward, [*body, made, last]))
