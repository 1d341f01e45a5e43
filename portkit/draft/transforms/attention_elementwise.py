"""Elementwise work inside an attention's forward: clamps, gates, scales by position.

Tensors are [num_tokens, features] in the new code, so an elementwise operation stays as the author
wrote it. Only one value for each head ([..., heads, 1] in the original) needs the heads to be split
off for a moment.
"""

from __future__ import annotations

from dataclasses import replace

import libcst as cst

from portkit.draft import edit
from portkit.draft.transforms.attention_values import Layout, Value

FUNCTIONS = {
    *("torch.sigmoid", "torch.tanh", "torch.clamp", "torch.exp", "torch.relu"),
    *("F.softplus", "F.sigmoid", "F.silu", "F.relu", "F.gelu", "F.logsigmoid"),
}
"""Functions that work on each element by itself, `nn.functional.x` written as `F.x`."""


def function_name(call: cst.Call) -> str:
    """The dotted name of what is called, with one spelling for torch.nn.functional."""
    name = edit.code(call.func)
    for prefix in ("torch.nn.functional.", "nn.functional."):
        if name.startswith(prefix):
            return "F." + name.removeprefix(prefix)
    return name


def applied(call: cst.Call, inner: Value) -> Value:
    """The call with its first argument in the new code; its layout is the argument's."""
    first = call.args[0].with_changes(value=inner.node)
    return replace(inner, node=call.with_changes(args=[first, *call.args[1:]]))


def in_place(statement: cst.BaseSmallStatement | None) -> tuple[cst.Name, cst.Call] | None:
    """(x, x.f(...)) of a statement `x.f_(...)` that changes x where it stands."""
    if not (isinstance(statement, cst.Expr) and isinstance(statement.value, cst.Call)):
        return None
    call = statement.value
    func = call.func
    if not (isinstance(func, cst.Attribute) and isinstance(func.value, cst.Name)):
        return None
    method = func.attr.value
    if not method.endswith("_") or method.startswith("_"):
        return None
    plain = func.with_changes(attr=cst.Name(method.removesuffix("_")))
    return func.value, call.with_changes(func=plain)


_PER_TOKEN: dict[str, Layout] = {
    ":,None,:,None": "heads_seq",
    ":,:,None,None": "seq_heads",
    ":,:,None": "flat",
}
"""How a function of positions [B, S] makes room for heads -> what it can be multiplied with."""


def of_positions(call: cst.Call, function: cst.FunctionDef | None) -> Value | None:
    """A call of a function of positions: one number for each token, [num_tokens, 1].

    The function's last step is to add axes, which `flat_positions` rewrites.
    """
    axes = _added_axes(function)
    layout = _PER_TOKEN.get(axes)
    if layout is None:
        return None
    arguments = [a for a in call.args if a.star == ""]
    new = call.with_changes(
        args=[
            a.with_changes(value=cst.Name("positions"))
            if edit.code(a.value) == "position_ids"
            else a
            for a in arguments
        ]
    )
    return Value("tensor", new, "per_token", base=layout)


def flat_positions(function: cst.FunctionDef) -> cst.FunctionDef:
    """The same function for positions [num_tokens]: it returns [num_tokens, 1]."""
    *body, last = edit.body_of(function)
    small = edit.single(last)
    value = small.value.with_changes(slice=edit.expression("x[:, None]").slice)
    last = last.with_changes(body=[small.with_changes(value=value)])
    return edit.with_body(function, [*body, last])


def _added_axes(function: cst.FunctionDef | None) -> str:
    last = edit.single(edit.body_of(function)[-1]) if function is not None else None
    if not (isinstance(last, cst.Return) and isinstance(last.value, cst.Subscript)):
        return ""
    return ",".join(edit.code(s.slice).strip() for s in last.value.slice)


def combined(node: cst.BinaryOperation, left: Value, right: Value, head_dim: str) -> Value | None:
    """Two tensors that are combined element by element; None if their shapes do not say how."""
    new = node.with_changes(left=_grouped(left.node), right=_grouped(right.node))
    if (left.layout, left.dim) == (right.layout, right.dim):
        return replace(left, node=new)
    for token, other in ((left, right), (right, left)):
        if token.layout == "per_token" and token.base == other.layout:
            return replace(other, node=new)
    layouts = {left.layout, right.layout}
    if layouts == {"seq_heads", "per_head"}:
        split = new.with_changes(
            left=_by_head(left, head_dim), right=_by_head(right, head_dim), lpar=[], rpar=[]
        )
        return Value("tensor", edit.expression(f"({edit.code(split)}).flatten(-2)"), "seq_heads")
    return None


def _by_head(value: Value, head_dim: str) -> cst.BaseExpression:
    shown = edit.code(_grouped(value.node))
    if value.layout == "per_head":
        return edit.expression(f"{shown}.unsqueeze(-1)")
    return edit.expression(f"{shown}.unflatten(-1, (-1, {head_dim}))")


def _grouped(node: cst.BaseExpression) -> cst.BaseExpression:
    """In parentheses if a method or an operator could not follow it as it stands."""
    if isinstance(node, cst.BinaryOperation | cst.UnaryOperation | cst.IfExp) and not node.lpar:
        return node.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
    return node
