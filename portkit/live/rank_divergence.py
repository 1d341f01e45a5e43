"""The first module that is wrong on several ranks, though it is right on one.

Compared is what every rank should have in full (what row-parallel layers, norms and whole layers
return), and what the attention gets and gives, head by head: rank r has its own part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from portkit.live.engine import Engine
from portkit.live.rank_trace import own_parameters, places, start_tracing, stop_tracing
from portkit.live.trace import Captures, trace_original

HEADS = ("q", "k", "v", "attn")
NEAR = 1e-4
"""Relative to the largest value."""


@dataclass(frozen=True)
class Pair:
    """One value of the original, and each rank's of the port."""

    path: str
    role: str
    theirs: np.ndarray
    """float32 [tokens, width], whole."""
    ours: tuple[np.ndarray, ...]
    """Per rank: [tokens, width] of it, or its heads' part."""

    def wanted(self, rank: int) -> np.ndarray:
        """Return what this rank should have."""
        width, part = self.theirs.shape[1], self.ours[rank].shape[1]
        # With more ranks than KV heads, several ranks hold a copy of the same head.
        start = (rank * width // len(self.ours)) // part * part if part < width else 0
        return self.theirs[:, start : start + part]

    def wrong(self, tolerance: float) -> list[int]:
        """Return the ranks whose value differs."""
        limit = tolerance * (float(np.abs(self.theirs).max()) or 1.0)
        return [
            rank
            for rank, ours in enumerate(self.ours)
            if not float(np.abs(ours - self.wanted(rank)).max()) <= limit
        ]


def first_on_ranks(engine: Engine, original: nn.Module, ids: Sequence[int]) -> dict[str, Any]:
    """Return {path, role, what, where, causes} of the first pair that differs; {} if none does."""
    engine.on_model(start_tracing)
    try:
        engine.generate([ids])
    finally:
        traced = sorted(engine.on_model(stop_tracing), key=lambda found: found["rank"])
    theirs = trace_original(original, ids)
    found, partial_sum = None, None
    for pair in _pairs(theirs, traced):
        wrong = pair.wrong(engine.profile.module.value)
        if not wrong:
            partial_sum = None
        elif pair.role not in HEADS and _is_partial(pair, original):
            # Right if a module around it adds the ranks' parts up: what comes next shows it.
            partial_sum = partial_sum or (pair, wrong)
        else:
            found = pair, wrong
            break
    if found is None and partial_sum is None:
        return {}
    explained = _explained(*found, original) if found else None
    if found and explained and not explained.certain:
        held = engine.on_model(partial(own_parameters, path=found[0].path))
        told, at = _own_values(found[0], held, original)
        if told:
            explained = replace(explained, causes=(*told, *explained.causes), at=at)
    if partial_sum and not (explained and explained.causes):
        found, explained = partial_sum, _unsummed(partial_sum[0].path)
    return {
        "path": found[0].path,
        "role": found[0].role,
        "what": explained.what,
        "causes": list(explained.causes),
        "where": engine.on_model(partial(places, path=explained.at))[0],
    }


@dataclass(frozen=True)
class _Explained:
    what: str
    causes: tuple[str, ...]
    at: str
    """The module whose line is to be looked at."""
    certain: bool = False
    """Whether a cause was found by its numbers."""


def _pairs(theirs: Captures, traced: list[dict[str, Any]]) -> list[Pair]:
    ranks = [{(p, r): v for p, r, v in found["values"]} for found in traced]
    pairs = []
    for (path, role), value in theirs.values.items():
        ours = tuple(rank[path, role] for rank in ranks if (path, role) in rank)
        if len(ours) < len(ranks):
            continue
        whole = value.numpy()[: len(ours[0])]
        if role in ("v", "attn"):
            options = theirs.extra.get(f"{path} attention", {})
            heads = options.get("kv_heads" if role == "v" else "heads", 0)
            ours = tuple(_without_padding(part, whole, heads, len(ranks)) for part in ours)
        same = all(o.shape[1] == whole.shape[1] for o in ours)
        if same or (role in HEADS and all(whole.shape[1] % o.shape[1] == 0 for o in ours)):
            pairs.append(Pair(path, role, whole, ours))
    return pairs


def _without_padding(part: np.ndarray, whole: np.ndarray, heads: int, ranks: int) -> np.ndarray:
    """Cut the zeros off that fill heads of values up to the size that queries have (walk.py)."""
    mine = max(1, heads // ranks)
    if not heads or part.shape[1] % mine or whole.shape[1] % heads:
        return part
    own, parts = whole.shape[1] // heads, part.reshape(len(part), mine, -1)
    if own >= parts.shape[2] or parts[..., own:].any():
        return part
    return parts[..., :own].reshape(len(part), -1)


def _is_partial(pair: Pair, original: nn.Module) -> bool:
    """Whether the ranks' values, a bias that is not added yet left aside, add up to the whole."""
    total = sum(pair.ours)
    biases = [bias for _, bias in _biases(original, pair.path) if len(bias) == total.shape[1]]
    return any(_near(total + bias, pair.theirs) for bias in (np.zeros(1, np.float32), *biases))


def _unsummed(path: str) -> _Explained:
    return _Explained(
        "each rank has its part of the sum, and goes on with that",
        ("nothing adds the parts up: reduce_results, or tensor_model_parallel_all_reduce",),
        path,
    )


def _explained(pair: Pair, wrong: list[int], original: nn.Module) -> _Explained:
    count = len(pair.ours)
    which = "every rank" if len(wrong) == count else f"rank {', '.join(map(str, wrong))}"
    if pair.role in HEADS:
        return _heads(pair, wrong, which, original)
    difference = pair.ours[wrong[0]] - pair.theirs
    causes, at = [], pair.path
    for name, bias in _biases(original, pair.path):
        if bias.shape[-1] == difference.shape[1] and _near(difference, (count - 1) * bias):
            at = name.rpartition(".")[0]
            causes.append(
                f"{name} is added on each of the {count} ranks before their sum, so {count} times "
                "in all: add it after the all-reduce, or let RowParallelLinear(bias=True) do it"
            )
    if _near(pair.ours[wrong[0]], count * pair.theirs):
        causes.append(
            f"it is {count} times as large: what every rank had in full is all-reduced once more"
        )
    elif not causes and _near(difference, difference[:1].repeat(len(difference), 0)):
        causes.append("the difference is the same for every token: a bias is added wrongly")
    return _Explained(f"its output differs on {which}", tuple(causes), at, bool(causes))


def _heads(pair: Pair, wrong: list[int], which: str, original: nn.Module) -> _Explained:
    word = {"q": "queries", "k": "keys", "v": "values", "attn": "attention's result"}[pair.role]
    rank = wrong[0]
    ours, wanted = pair.ours[rank], pair.wanted(rank)
    inside = [n for n, _ in original.get_submodule(pair.path).named_modules() if n]
    own = [f"{pair.path}.{n}" for n in inside if n.startswith(pair.role)]
    norm = next((n for n in own if "norm" in n), "")
    projection = next((n for n in own if "norm" not in n), pair.path)
    if pair.role == "attn":
        return _Explained(
            f"q, k and v are right, the {word} on {which} is not",
            (
                "ALiBi slopes, sinks or other values for each head are not cut to this rank's "
                "heads",
                "which KV head serves which query head: head counts given to Attention",
            ),
            pair.path,
        )
    cut = (
        f"rank {rank}'s part of the projection is cut by rank wrongly: each parameter's "
        "weight_loader takes q, k and v apart first and then cuts each"
    )
    part = ours.shape[1]
    others = (pair.theirs[:, n : n + part] for n in range(0, pair.theirs.shape[1], part))
    if any(_near(ours, other) for other in others):
        return _Explained(f"the {word} of {which} are those of other heads", (cut,), projection)
    if norm and _proportional(ours, wanted):
        causes = (
            f"a norm over all heads ({norm}) sees this rank's heads only: gather before it, and "
            "take this rank's part after it",
        )
        return _Explained(f"the {word} of {which} are scaled wrongly, token by token", causes, norm)
    sizes = "qkv is split by the sizes of all heads, or in another order"
    gather = "a norm over all heads (QK-norm) sees this rank's heads only: gather before it"
    causes = (cut, sizes, gather) if 0 not in wrong else (sizes, gather, cut)
    return _Explained(f"the {word} of {which} are not its heads'", causes, projection)


def _own_values(
    pair: Pair, held: Sequence[dict[str, np.ndarray]], original: nn.Module
) -> tuple[tuple[str, ...], str]:
    """Return (causes, path to look at) for what the module's own small parameters show: one that
    a rank has of other heads, or that each rank adds whole."""
    count = len(held)
    whole = {n: p.detach() for n, p in original.get_submodule(pair.path).named_parameters()}
    for name, own in held[0].items():
        every, theirs = [values[name] for values in held], whole.get(name)
        at = f"{pair.path}.{name.partition('.')[0]}"
        if theirs is not None and own.ndim == theirs.ndim == 1 and len(theirs) == count * len(own):
            parts = theirs.float().cpu().numpy().reshape(count, -1)
            wrong = [rank for rank in range(count) if not _near(every[rank], parts[rank])]
            if wrong:
                return (
                    f"{pair.path}.{name} on rank {wrong[0]} is not that of its own heads: its "
                    "weight_loader starts at rank * heads of a rank",
                ), at
        if name.endswith("w2_bias") and all(values.any() for values in every):
            return (
                f"the bias of the experts' down projection ({name}) is added on every rank before "
                "the ranks' outputs are summed: let one of them have it, the others zeros",
            ), at
    return (), pair.path


def _proportional(ours: np.ndarray, wanted: np.ndarray) -> bool:
    """Whether each row is a multiple of the other's."""
    scale = (ours * wanted).sum(1) / np.maximum((wanted * wanted).sum(1), 1e-30)
    return _near(ours, scale[:, None] * wanted)


def _biases(original: nn.Module, path: str) -> list[tuple[str, np.ndarray]]:
    """Return (name, values) of the biases in the original's module at `path`."""
    module = dict(original.named_modules()).get(path)
    return [
        (f"{path}.{name}", parameter.detach().float().cpu().numpy())
        for name, parameter in (module.named_parameters() if module is not None else ())
        if parameter.dim() == 1
    ]


def _near(one: np.ndarray, other: np.ndarray) -> bool:
    distance = float(np.abs(one - other).max())
    return distance <= 10 * NEAR * (float(np.abs(other).max()) or 1.0)
