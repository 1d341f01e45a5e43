"""Work that mixes or cuts heads inside an attention's forward.

In the new code a tensor is [num_tokens, heads * dim], heads one after the other: to take a part of
the heads, or to repeat them, is to take or repeat features. What cuts inside each head ([..., dim]
in the original) splits the heads off for a moment.
"""

from __future__ import annotations

from dataclasses import replace

import libcst as cst

from portkit.draft import edit
from portkit.draft.transforms.attention_values import Value

_HEAD_AXIS = {"heads_seq": ("1", "-3"), "seq_heads": ("2", "-2")}


def width(value: Value, head_dim: str) -> str:
    """Size of one head of the value, as source."""
    return value.dim or head_dim


def chunked(owner: Value, count: cst.BaseExpression, axis: str, head_dim: str) -> Value | None:
    """torch.chunk(x, count, dim=axis): a part of the heads each, or a part of every head each."""
    if not isinstance(count, cst.Integer):
        return None
    shown, number = edit.code(owner.node), int(count.value)
    if owner.layout == "flat" and axis in ("-1", "2"):
        made = edit.expression(f"{shown}.chunk({number}, dim=-1)")
        return Value("several", made, parts=(Value("tensor"),) * number)
    if axis in _HEAD_AXIS.get(owner.layout, ()):
        made = edit.expression(f"{shown}.chunk({number}, dim=-1)")
        return Value("several", made, parts=(replace(owner, node=None),) * number)
    if owner.layout in _HEAD_AXIS and axis in ("-1", "3"):
        dim = width(owner, head_dim)
        part = _divided(dim, number, head_dim)
        made = edit.expression(
            f"(x.flatten(-2) for x in {shown}.unflatten(-1, (-1, {dim})).chunk({number}, dim=-1))"
        )
        return Value("several", made, parts=(replace(owner, node=None, dim=part),) * number)
    return None


def _divided(dim: str, number: int, head_dim: str) -> str:
    """A part of `dim`; "" if that is the head dimension again."""
    if dim.replace(" ", "") in (f"{head_dim}*{number}", f"{number}*{head_dim}"):
        return ""
    return f"{dim} // {number}"


def repeated(owner: Value, call: cst.Call) -> Value | None:
    """x.repeat(1, n, 1, 1) along the heads: all heads, n times over."""
    times = [edit.code(a.value) for a in call.args]
    axis = {"heads_seq": 1, "seq_heads": 2}.get(owner.layout)
    if axis is None or len(times) != 4 or any(t != "1" for i, t in enumerate(times) if i != axis):
        return None
    made = edit.expression(f"{edit.code(owner.node)}.repeat(1, {times[axis]})")
    return replace(owner, node=made)


def joined(parts: list[Value], axis: str, head_dim: str) -> Value | None:
    """torch.cat(parts, dim=axis): more heads, or wider heads."""
    first = parts[0]
    if any(p.kind != "tensor" or (p.layout, p.dim) != (first.layout, first.dim) for p in parts):
        return None
    shown = [edit.code(p.node) for p in parts]
    if axis in _HEAD_AXIS.get(first.layout, ()) or (first.layout == "flat" and axis in ("-1", "2")):
        return replace(first, node=edit.expression(f"torch.cat([{', '.join(shown)}], dim=-1)"))
    if first.layout in _HEAD_AXIS and axis in ("-1", "3"):
        dim = width(first, head_dim)
        split = ", ".join(f"{s}.unflatten(-1, (-1, {dim}))" for s in shown)
        made = edit.expression(f"torch.cat([{split}], dim=-1).flatten(-2)")
        return replace(first, node=made, dim=f"{len(parts)} * {dim}")
    return None
