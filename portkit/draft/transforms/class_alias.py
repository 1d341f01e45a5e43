"""A class chosen under a local name: `kind = A if test else B; self.x = kind(...)`, written out.

A test that only compares literals is decided; any other stays, one call on either side.
"""

from __future__ import annotations

import ast

import libcst as cst

from portkit.draft import edit
from portkit.draft.work import Work, set_method


def write_out(work: Work) -> None:
    """Replace such names in every class of decoder layer."""
    for layer in work.facts.layers:
        cls = work.cls(layer.cls)
        init = edit.method(cls, "__init__")
        body = edit.body_of(init) if init else []
        pairs = [p for n in body if (p := edit.assigned(n)) and isinstance(p[0], cst.Name)]
        local = {p[0].value: p[1] for p in pairs}
        chosen = {n: v for n, v in local.items() if _classes(work, v)}
        if chosen:
            new = edit.replace(init, lambda n, c=chosen, v=local: _call(n, c, v))
            work.put(set_method(cls, new))


def _classes(work: Work, value: cst.BaseExpression) -> bool:
    defined = {i.name.value for i in work.module.body if isinstance(i, cst.ClassDef)}
    if not isinstance(value, cst.IfExp):
        return edit.code(value) in defined
    names = {edit.code(value.body), edit.code(value.orelse)}
    return bool(names & defined) and names <= defined | {"None"}


def _call(
    node: cst.CSTNode, chosen: dict[str, cst.BaseExpression], local: dict[str, cst.BaseExpression]
) -> cst.CSTNode | None:
    if not isinstance(node, cst.Call) or edit.code(node.func) not in chosen:
        return None
    value = chosen[edit.code(node.func)]
    if not isinstance(value, cst.IfExp):
        return node.with_changes(func=value)
    test = value.test
    for name in edit.names_read(test):
        if name in local and isinstance(local[name], cst.Integer | cst.SimpleString):
            test = edit.replace_text(test, name, edit.code(local[name]))
    decided = _decide(edit.code(test))
    one, other = (node.with_changes(func=f) for f in (value.body, value.orelse))
    if decided is not None:
        return one if decided else other
    return cst.IfExp(test=value.test, body=one, orelse=other)


def _decide(test: str) -> bool | None:
    """Truth of a comparison of two literals; None for anything else."""
    node = ast.parse(test, mode="eval").body
    if not (isinstance(node, ast.Compare) and len(node.ops) == 1):
        return None
    try:
        left, right = ast.literal_eval(node.left), ast.literal_eval(node.comparators[0])
    except ValueError:
        return None
    if isinstance(node.ops[0], ast.Eq | ast.NotEq):
        return (left == right) == isinstance(node.ops[0], ast.Eq)
    return None
