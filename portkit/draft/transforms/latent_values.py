"""What names stand for in the forward of a latent attention, while latent_flow.py rewrites it.

The original has a batch axis and moves heads in front of the sequence; the draft has neither. A
latent is viewed as one head in the original (for its cache); the draft gives it no such axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import libcst as cst

Form = Literal["flat", "heads", "single"]
"""Of the original: [B, S, D], [B, S, H, D], or [B, S, 1, D]. In the draft: [tokens, D],
[tokens, heads, D], [tokens, D]."""

AXES = {"flat": ("B", "S", "D"), "heads": ("B", "S", "H", "D"), "single": ("B", "S", "1", "D")}


@dataclass(frozen=True)
class Value:
    """What a name or an expression of the original forward stands for."""

    kind: Literal["tensor", "erased", "plain", "shape", "several", "filled", "gone"]
    node: cst.BaseExpression | None = None
    """The expression in the new code."""
    form: Form = "flat"
    moved: bool = False
    """Are the heads in front of the sequence in the original?"""
    axes: tuple[str, ...] = ()
    """For a shape, or one entry of it: what each axis is in the original."""
    parts: tuple[Value, ...] = ()
    """Of several values; of a tensor that is filled part by part, its parts so far."""
    ends: tuple[str, ...] = ()
    """For a tensor that is filled part by part: where each part ends, "" for the last."""

    size: str = ""
    """Of a part that is split off: the size of its last axis, as written."""

    def shape(self) -> tuple[str, ...]:
        axes = AXES[self.form]
        return (axes[0], axes[2], axes[1], axes[3]) if self.moved else axes


ERASED = Value("erased")
EMPTY = Value("filled")
GONE = Value("gone")
"""A name whose value differs from the original's: reading it stops the draft."""


@dataclass(frozen=True)
class Rotation:
    """One call that rotates queries and keys."""

    function: str
    condition: str
    """The `if` of the config around it; "" if there is none, "not (...)" for its else."""
    size: str
    """Size of the part that is rotated, if the code says it; else ""."""
