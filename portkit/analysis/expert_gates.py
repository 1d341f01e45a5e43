"""Gated activations of experts: which of vLLM's they are, from the term that one expert computes.

Terms are those of `experts._Expert`. vLLM's `swigluoai` takes gate and up from alternate entries of
one projection, clamps both and adds one to the up part; its two constants are no arguments there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ClampedGate:
    """clamp(gate) * sigmoid(alpha * clamp(gate)) * (clamp(up) + 1), gate and up alternating."""

    projection: Any
    """Term of the linear map that makes gate and up."""
    alpha: str
    limit: str
    """Resolved source, e.g. "config.swiglu_limit"."""


def factors(term: Any) -> list[Any]:
    """The factors of a product, in order."""
    if isinstance(term, tuple) and term and term[0] == "mul":
        return [*factors(term[1]), *factors(term[2])]
    return [term]


def clamped_gate(term: Any) -> ClampedGate | None:
    """The parts of a `swigluoai`; None if the term is anything else."""
    parts = factors(term)
    if len(parts) != 3:
        return None
    named = {part[0]: part for part in parts if isinstance(part, tuple) and part}
    match named.get("clamp"), named.get("sigmoid"), named.get("add"):
        case (
            ("clamp", ("every", made, 0), None, limit) as gate,
            ("sigmoid", inner),
            ("add", ("clamp", ("every", same, 1), ("neg", low), high), 1),
        ) if made == same and limit == low == high:
            scaled = factors(inner)
            alpha = [f for f in scaled if f != gate]
            if len(scaled) == 2 and len(alpha) == 1 and alpha[0][0] == "own":
                return ClampedGate(made, alpha[0][1], limit[1]) if limit[0] == "own" else None
    return None
