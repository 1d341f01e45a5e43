"""A fused projection that attention by hand cuts in its own way: cut in one statement instead.

How it is cut is found by running the author's statements on numbers (analysis/fused_qkv.py): views,
indices, blocks and branches on the config may stand in between.
"""

from __future__ import annotations

from dataclasses import dataclass

import libcst as cst

from portkit.analysis.classes import ClassView
from portkit.analysis.fused_qkv import FusedQkv, fused_qkv_of
from portkit.analysis.read_blocks import linears_of
from portkit.analysis.symbolic import CannotTell
from portkit.draft import edit
from portkit.draft.transforms.fused_qkv import parts, targets

_PRODUCTS = ("torch.matmul", "torch.bmm")


@dataclass(frozen=True)
class WholeCut:
    """A forward with one `statement` that cuts the projection into three of [b, s, width]."""

    forward: cst.FunctionDef
    statement: str


def cut_whole(view: ClassView, forward: cst.FunctionDef) -> WholeCut | None:
    """Return the forward with its cut in one statement, then by heads; None if there is no cut."""
    roles = _roles(forward)
    for linear in linears_of(view).values() if roles else ():
        try:
            return _rewritten(forward, fused_qkv_of(view, linear, roles))
        except CannotTell:
            continue
    return None


def _roles(forward: cst.FunctionDef) -> tuple[str, str, str] | None:
    """Names of query, key and value: what is multiplied to scores, and what with weights."""
    pairs = []
    for node in edit.find(forward, lambda n: isinstance(n, cst.Call | cst.BinaryOperation)):
        if isinstance(node, cst.BinaryOperation):
            if isinstance(node.operator, cst.MatrixMultiply):
                pairs.append((_root(node.left), _root(node.right)))
        elif edit.code(node.func).endswith("scaled_dot_product_attention"):
            plain = [_root(a.value) for a in node.args if a.keyword is None]
            return (plain[0], plain[1], plain[2]) if len(plain) >= 3 else None
        elif edit.code(node.func) == "torch.baddbmm" and len(node.args) > 2:
            pairs.append((_root(node.args[1].value), _root(node.args[2].value)))
        elif edit.code(node.func) in _PRODUCTS and len(node.args) == 2:
            pairs.append((_root(node.args[0].value), _root(node.args[1].value)))
    if len(pairs) != 2:
        return None
    return pairs[0][0], pairs[0][1], pairs[1][1]


def _root(node: cst.BaseExpression) -> str:
    """The name that an expression begins with: key of key.transpose(-1, -2)."""
    while isinstance(node, cst.Attribute | cst.Call | cst.Subscript):
        node = node.func if isinstance(node, cst.Call) else node.value
    return node.value if isinstance(node, cst.Name) else ""


def _rewritten(forward: cst.FunctionDef, layout: FusedQkv) -> WholeCut | None:
    body = edit.body_of(forward)
    first = body[layout.first]
    pair = edit.assigned(first)
    if pair is None or not isinstance(pair[0], cst.Name) or not edit.is_call(pair[1]):
        return None
    name = edit.code(pair[0])
    cut = edit.statement(
        f"{targets(layout)} = (part.flatten(-2) for part in {parts(layout, name, layout.head_dim)})"
    )
    shaped = []
    for role, shape in zip(layout.names, layout.layouts, strict=True):
        if shape != "flat":
            turned = ".transpose(1, 2)" if shape == "heads_seq" else ""
            view = f"{role}.view(*{role}.shape[:-1], -1, {layout.head_dim}){turned}"
            shaped.append(edit.statement(f"{role} = {view}"))
    between = range(layout.first + 1, layout.last + 1)
    kept = [body[n] for n in between if n not in layout.dropped]
    new = [*body[: layout.first + 1], cut, *shaped, *kept, *body[layout.last + 1 :]]
    return WholeCut(edit.with_body(forward, new), edit.code(cut))
