"""What the names in an attention's forward stand for, while it is rewritten (attention_flow.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import libcst as cst

from portkit.draft import edit

Layout = Literal["flat", "seq_heads", "heads_seq", "per_head"]
"""Of the original value: [B, S, features], [B, S, heads, dim], [B, heads, S, dim] or
[B, S, heads, 1]."""


@dataclass(frozen=True)
class Value:
    """What a name or expression of the original forward stands for."""

    kind: Literal["tensor", "erased", "plain", "shape", "several", "part", "positions"]
    node: cst.BaseExpression | None = None
    """The expression in the new code, always [num_tokens, features] for a tensor."""
    layout: Layout = "flat"
    parts: tuple[Value, ...] = ()
    base: str = ""
    """For a part of the head (partial rotary): the name of the whole. For one number per token:
    the layout that its axes of length 1 fit."""
    side: Literal["", "rotated", "rest"] = ""
    bound: str = ""
    turned: bool = False
    dim: str = ""
    """Size of one head, where it is not the class's head dimension."""


ERASED = Value("erased")


@dataclass(frozen=True)
class FlowResult:
    """The new body of forward and what the attention call was given."""

    body: list[edit.Statement]
    keywords: dict[str, cst.BaseExpression]
    """Keyword arguments of the original attention call that vLLM's Attention takes in __init__."""
    rotary_used: bool
    calls: int = 1
    """How often forward attends: each call needs a KV cache of its own."""
    of_positions: frozenset[str] = frozenset()
    """Functions of the file that are called with positions, now [num_tokens]."""


def attention_name(number: int) -> str:
    """The attribute of the first, second, ... Attention of a class."""
    return "attn" if number == 1 else f"attn_{number}"


ELEMENTWISE = (
    *("clamp", "to", "float", "type_as", "mul", "div", "tanh", "sigmoid", "exp", "relu"),
)
KNOWN_KEYWORDS = ("scaling", "sliding_window", "softcap", "s_aux", "position_bias")
IGNORED_KEYWORDS = (
    "dropout",
    "position_ids",
    "attention_mask",
    "is_causal",
    "output_attentions",
    "use_cache",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
)
