"""Collect what layers get and give while the engine runs, to compute the same by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

ROWS = 200
"""Tokens that are kept of each layer."""
Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Module path -> (input [tokens, in], what was taken of the output [tokens, out]); float32, CPU."""
Take = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, input, output) -> what to keep of it."""


@contextmanager
def watched(model: nn.Module, wanted: Callable[[Any], bool], take: Take) -> Iterator[Pairs]:
    """Inside the block, watch the `wanted` modules of a model; the result is filled at its end."""
    kept: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    found: Pairs = {}

    def keep(layer: Any, args: Any, output: Any, path: str) -> None:
        if sum(len(given) for given, _ in kept.get(path, ())) >= ROWS:
            return
        gave = take(layer, args[0], output[0] if isinstance(output, tuple) else output)
        pair = tuple(t.detach().to("cpu", torch.float32, copy=True) for t in (args[0], gave))
        kept.setdefault(path, []).append(pair)

    handles = [
        module.register_forward_hook(partial(keep, path=path))
        for path, module in model.named_modules()
        if wanted(module)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    for path, pairs in kept.items():
        given, gave = (torch.cat(side) for side in zip(*pairs, strict=True))
        found[path] = (given, gave)


def share_off(found: torch.Tensor, wanted: torch.Tensor, quantile: float) -> float:
    """Return that quantile over the tokens of |found - wanted| / |wanted|; inf for a NaN."""
    norm = torch.linalg.vector_norm
    share = norm(found - wanted, dim=1) / norm(wanted, dim=1).clamp(min=1e-30)
    share = share.nan_to_num(nan=float("inf"))
    return float(share.quantile(quantile, interpolation="nearest"))
