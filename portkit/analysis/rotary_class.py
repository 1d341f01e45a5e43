"""What a rotary class reads from the config: can vLLM's get_rope be told the same?

get_rope takes its base, its scaling and the rotated part of a head from `rope_parameters`. A class
that takes anything from elsewhere, or scales by something of its own, computes something else.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass

from portkit.analysis.classes import ClassView, text

_FIELDS = {
    "rope_parameters",
    "head_dim",
    "hidden_size",
    "num_attention_heads",
    "max_position_embeddings",
    "layer_types",
}


@dataclass(frozen=True)
class RotaryClass:
    """What the class reads."""

    by_layer_type: bool
    """Has each layer type its own entry in config.rope_parameters?"""
    default_factor: str
    """The rotated part of a head where rope_parameters does not say it; "" if all of it."""
    strange: str
    """Why get_rope cannot be told the same; "" if it can."""
    note: str
    """What may differ for some configs or lengths; "" if nothing does."""


def read_rotary_class(view: ClassView) -> RotaryClass:
    fields: set[str] = set()
    for inner in ast.walk(view.node):
        if isinstance(inner, ast.Attribute) and text(inner.value) in ("config", "self.config"):
            fields.add(inner.attr)
        if (
            isinstance(inner, ast.Call)
            and text(inner.func) == "getattr"
            and text(inner.args[0]) in ("config", "self.config")
            and isinstance(inner.args[1], ast.Constant)
        ):
            fields.add(str(inner.args[1].value))
    strange = sorted(fields - _FIELDS)
    why = ""
    if strange:
        why = f"reads config.{strange[0]}"
    elif "rope_parameters" not in fields:
        why = "does not take its base from config.rope_parameters"
    forward = view.forward
    names = [a.arg for a in forward.args.args] if forward is not None else []
    by_type = any("layer_type" in name for name in names)
    note = ""
    choices = [n for n in ast.walk(forward or view.node) if isinstance(n, ast.If | ast.IfExp)]
    if forward is not None and any("device" not in text(n) for n in choices):
        note = (
            f"{view.name}.forward chooses by config or length what get_rope decides once, by "
            "rope_parameters and max_model_len"
        )
    return RotaryClass(by_type, _default_factor(view), why, note)


def _default_factor(view: ClassView) -> str:
    for node in ast.walk(view.node):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "get"
            and len(node.args) == 2
            and text(node.args[0]) == "'partial_rotary_factor'"
            and text(node.args[1]) != "1.0"
        ):
            return text(node.args[1])
    return ""
