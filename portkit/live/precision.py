"""Half precision, layer by layer: how far each module is from exact, beside Transformers itself.

Three runs on the same tokens, with the same weights rounded to the engine's dtype: the port, the
original in that dtype, and the original computing in float32, which is exact here. Each layer of
both originals begins from what the port's layer before it gave, so that a layer answers for itself
alone. Only modules that agree in float32 are judged: where the port cuts the work elsewhere there
is nothing to compare.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from portkit.live.fused import fused_parts
from portkit.live.live_inputs import share_off
from portkit.live.trace import Captures, Key
from portkit.live.walk import paired

QUANTILES = (0.5, 0.75)
"""Of the tokens: rounding gives a few of them other experts, a mistake moves most."""


@dataclass(frozen=True)
class Lost:
    """What half precision cost at one place, as |value - exact| / |exact| of a token."""

    path: str
    """Module path in the original; `role` as in a trace."""
    role: str
    ours: tuple[float, ...]
    """The port's, at QUANTILES of the tokens; inf where it has a NaN."""
    theirs: tuple[float, ...]
    """Transformers' own in the same dtype; at least the most that rounding a value once costs."""

    @property
    def ratio(self) -> float:
        """The port's as a multiple of Transformers' own, at the worse quantile."""
        return max(o / t for o, t in zip(self.ours, self.theirs, strict=True))


def layers_of(model: nn.Module) -> list[str]:
    """Return the paths of the decoder layers: the longest list of modules nearest to the top."""
    lists = {p: len(m) for p, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    if not lists:
        return []
    top = min(path.count(".") for path in lists)
    path = max((p for p in lists if p.count(".") == top), key=lists.__getitem__)
    return [f"{path}.{i}" for i in range(lists[path])]


def agreeing(ours: Captures, theirs: Captures, port: nn.Module, tolerance: float) -> frozenset[Key]:
    """Return what agrees within `tolerance`, relative to a token, at QUANTILES of the tokens."""
    packed = fused_parts(port)
    found = set()
    for key, reference in theirs.values.items():
        mine = paired(ours, theirs, packed, *key)
        if mine is None or mine.shape != reference.shape:
            continue
        if max(_distance(mine, reference)) <= tolerance:
            found.add(key)
    return frozenset(found)


def reaches_the_end(same: frozenset[Key], theirs: Captures, layers: list[str]) -> bool:
    """Whether the last layer's output agrees, or anything that is computed after it."""
    order = [key for key in theirs.values if key[0] != "lm_head"]
    last = (layers[-1], "out") if layers else order[-1]
    return any(key in same for key in order[order.index(last) if last in order else -1 :])


def lost(
    keys: Iterable[Key],
    ours: Captures,
    itself: Captures,
    exact: Captures,
    port: nn.Module,
    dtype: torch.dtype,
) -> list[Lost]:
    """Return what was lost at each of `keys`, in the original's order of computing."""
    packed, wanted = fused_parts(port), set(keys)
    once = torch.finfo(dtype).eps / math.sqrt(12)
    rows = []
    for key, reference in exact.values.items():
        mine = paired(ours, exact, packed, *key) if key in wanted else None
        other = itself.values.get(key)
        if mine is None or other is None or not mine.shape == other.shape == reference.shape:
            continue
        theirs = tuple(max(t, once) for t in _distance(other, reference))
        rows.append(Lost(*key, _distance(mine, reference), theirs))
    return rows


def _distance(found: torch.Tensor, exact: torch.Tensor) -> tuple[float, ...]:
    return tuple(share_off(found, exact, quantile) for quantile in QUANTILES)
