"""Which parameters of a running port its answer depends on: change one, and see who notices.

Parity cannot tell where a checkpoint's values hide the fault: a norm whose weight is all ones, a
bias of zeros. One process, one rank.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts

from portkit.live.engine import Engine
from portkit.live.layers import pattern
from portkit.live.locate import place_of
from portkit.live.quantised import logprobs

SECONDS = 6.0
"""After that, what is left is named as not tried: one layer's parameters come before the next's."""
UNNOTICED = 1e-6
"""The largest move of a log-probability that counts as none."""


def influence(engine: Engine, original: nn.Module, ids: Sequence[int]) -> dict[str, Any]:
    """Return {moves: {name: how far}, of: how many there are, silent: those that move nothing}.

    Of the silent: name, where, moves_original: how far the same change moves Transformers' model;
    None if it has no parameter of that name. One that moves neither (a bias of keys without
    rotation) is no fault.
    """
    parameters = {
        id(p): (name, p)
        for name, p in engine.model.named_parameters()
        if p.is_floating_point() and p.numel()
    }
    order = _one_of_each_first([name for name, _ in parameters.values()])
    own = dict(parameters.values())
    silent: list[dict[str, Any]] = []
    moves: dict[str, float] = {}
    until = time.monotonic() + SECONDS
    with _plain_linears(engine.model):
        before = _answer(engine, ids)
        for name in order:
            if time.monotonic() > until:
                break
            with _changed(own[name]):
                moves[name] = _distance(_answer(engine, ids), before)
            if moves[name] > UNNOTICED:
                continue
            if _experts(engine.model, name):
                del moves[name]
                continue
            place = place_of(engine.model, name.rpartition(".")[0])
            silent.append(
                {
                    "name": name,
                    "where": str(place) if place else "",
                    "moves_original": _moves_original(original, name, ids),
                }
            )
    return {"moves": moves, "of": len(order), "silent": silent}


def _moves_original(original: nn.Module, name: str, ids: Sequence[int]) -> float | None:
    parameter = dict(original.named_parameters()).get(name)
    if parameter is None:
        return None
    before = logprobs(original, ids)
    with _changed(parameter):
        moved = _distance(logprobs(original, ids), before)
    return moved if moved > UNNOTICED else 0.0


def _answer(engine: Engine, ids: Sequence[int]) -> np.ndarray:
    return engine.prompt_logprobs([ids])[0]


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    """Return the largest |difference|; a NaN is one."""
    return float(np.nan_to_num(np.abs(one - other), nan=np.inf).max())


@contextmanager
def _changed(parameter: nn.Parameter) -> Iterator[None]:
    """Inside the block each of the parameter's values is another, about as far as they spread."""
    kept = parameter.data.clone()
    generator = torch.Generator().manual_seed(parameter.numel())
    spread = float(kept.float().std()) if kept.numel() > 1 else 0.0
    noise = torch.randn(kept.shape, generator=generator) * max(spread, 0.1)
    parameter.data.add_(noise.to(kept))
    try:
        yield
    finally:
        parameter.data.copy_(kept)


@contextmanager
def _plain_linears(model: nn.Module) -> Iterator[None]:
    """Inside the block linears read their weight: vLLM's CPU build multiplies by a packed copy."""
    kept = {m: m.cpu_linear for m in model.modules() if hasattr(m, "cpu_linear")}
    for module in kept:
        if module.weight.numel():
            module.cpu_linear = nn.functional.linear
    try:
        yield
    finally:
        for module, linear in kept.items():
            module.cpu_linear = linear


def _experts(model: nn.Module, name: str) -> bool:
    """Whether it is a weight of fused experts, whose kernel may have packed a copy."""
    return isinstance(model.get_submodule(name.rpartition(".")[0]), RoutedExperts)


def _one_of_each_first(names: Sequence[str]) -> list[str]:
    """Return the names, the first of each kind before the same ones of later layers."""
    seen: dict[str, int] = {}
    ranked = []
    for position, name in enumerate(names):
        seen[pattern(name)] = turn = seen.get(pattern(name), 0) + 1
        ranked.append((turn, position, name))
    return [name for *_, name in sorted(ranked)]
