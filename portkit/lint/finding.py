"""Values of the rule engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FixSafety = Literal["safe", "unsafe", "none"]


@dataclass(frozen=True)
class Valid:
    """Code a rule must stay silent on."""

    code: str


@dataclass(frozen=True)
class Invalid:
    """Code a rule must report."""

    code: str
    line: int
    """Line (1-based) of the first finding."""
    count: int = 1
    fixed: str | None = None
    """The whole text after fixing; None if the rule has no fix."""


@dataclass(frozen=True)
class Finding:
    """A rule at a line: one task for the reader."""

    rule: str
    """Id of the rule, e.g. "linear-in-attention"."""
    step: str
    message: str
    """What is there and what vLLM wants instead, naming the symbol."""
    path: str
    """The port's file, relative to the port folder."""
    line: int
    column: int
    symbol: str
    """Qualified name of the class or function around it, e.g. "HeliumAttention.forward"."""
    fix: FixSafety = "none"
