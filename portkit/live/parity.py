"""How far two sets of log-probabilities lie apart, and where first. Numbers only, no engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from portkit.live.engine import Generated

TOP = 5


@dataclass(frozen=True)
class Comparison:
    """One prompt, one way of running it, both sides' log-probabilities."""

    name: str
    """What was compared, in words, e.g. "prompt 2 (44 tokens)"."""
    rows: int
    """Positions that were compared."""
    max_abs: float
    """Largest |difference| of a log-probability, over all positions and the whole vocabulary."""
    position: int
    """The first position beyond the tolerance, or the worst one if none is."""
    beyond: int
    """How many positions are beyond the tolerance."""
    first_rows_ok: int
    """How many positions from the start are within the tolerance."""
    token: int
    """The token id whose log-probability differs most at `position`."""
    ours: tuple[tuple[int, float], ...]
    """vLLM's most likely (token id, log-probability) at `position`."""
    theirs: tuple[tuple[int, float], ...]
    """Transformers' (or the other run's)."""
    ok: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    name: str, ours: np.ndarray, theirs: np.ndarray, tolerance: float, *, start: int = 0
) -> Comparison:
    """Compare float32 [n, vocab] with [n, vocab]; `start` is the position of row 0.

    A NaN on our side counts as infinitely far; equal infinities (masked tokens) as equal.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"{name}: {ours.shape} log-probabilities against {theirs.shape}")
    with np.errstate(invalid="ignore"):
        distance = np.abs(ours - theirs)
    distance[ours == theirs] = 0.0
    distance[np.isnan(distance)] = np.inf
    per_row = distance.max(axis=1)
    beyond = np.flatnonzero(per_row > tolerance)
    row = int(beyond[0]) if len(beyond) else int(per_row.argmax())
    return Comparison(
        name=name,
        rows=len(per_row),
        max_abs=float(per_row.max()),
        position=start + row,
        beyond=len(beyond),
        first_rows_ok=row if len(beyond) else len(per_row),
        token=int(distance[row].argmax()),
        ours=top(ours[row]),
        theirs=top(theirs[row]),
        ok=not len(beyond),
    )


def compare_decode(
    name: str,
    ours: Generated,
    tokens: Sequence[int],
    rows: np.ndarray,
    tolerance: float,
    *,
    start: int,
) -> Comparison:
    """Compare generated tokens and their distributions with teacher-forced ones.

    Rows count up to and including the first at which the tokens part: after it the two sides
    continue different texts.
    """
    same = 0
    while same < len(tokens) and ours.tokens[same] == tokens[same]:
        same += 1
    count = min(same + 1, len(tokens))
    return compare(name, ours.logprobs[:count], rows[:count], tolerance, start=start)


def top(row: np.ndarray, count: int = TOP) -> tuple[tuple[int, float], ...]:
    """Return the most likely (token id, log-probability) pairs; NaN sorts last."""
    order = np.argsort(-np.nan_to_num(row, nan=-np.inf), kind="stable")[:count]
    return tuple((int(i), float(row[i])) for i in order)
