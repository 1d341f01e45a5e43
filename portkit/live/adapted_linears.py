"""Each layer under an adapter on the input that it really got: what the adapter added to it.

In float16, which vLLM's LoRA kernels for GPUs take, a router may choose another expert by rounding
alone, and the whole model then moves as far as an adapter moves it. What one layer adds to its own
live input does not depend on that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

from portkit.live.adapters import ALPHA, RANK, Adapter
from portkit.live.quantised import in_port

ROWS = 200
"""Tokens that are kept of each layer."""
Added = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Port's path -> (input [tokens, in], what the adapter added [tokens, out]), float32, on CPU."""


@contextmanager
def watched(model: nn.Module) -> Iterator[Added]:
    """Inside the block, collect what adapters add to linears; filled at its end."""
    kept: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    found: Added = {}

    def keep(path: str, layer: Any, args: Any, output: Any) -> None:
        if sum(len(given) for given, _ in kept.get(path, ())) >= ROWS:
            return
        base = layer.base_layer
        bias = None if base.skip_bias_add else base.bias
        plain = base.quant_method.apply(base, args[0], bias)
        gave = output[0] if isinstance(output, tuple) else output
        added = gave.float() - plain.float()
        pair = (args[0].detach().float().cpu(), added.detach().cpu())
        kept.setdefault(path, []).append(pair)

    handles = [
        module.register_forward_hook(
            lambda layer, args, output, path=path: keep(path, layer, args, output)
        )
        for path, module in model.named_modules()
        if isinstance(module, BaseLinearLayerWithLoRA)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    for path, pairs in kept.items():
        given, added = (torch.cat(side) for side in zip(*pairs, strict=True))
        found[path] = (given, added)


def by_hand(
    model: nn.Module, added: Added, adapter: Adapter, packed: dict[str, list[str]]
) -> list[dict[str, Any]]:
    """Return per layer of the adapter how far what was added is from scale * B @ A @ input.

    `packed`: fused layer -> its parts, in the order in which they were loaded.
    Keys: path (the original's), layer (the port's, "" if no layer under adapters holds it),
    difference (upper quartile over the tokens, relative to what should be added).
    """
    holders = {}
    for layer in added:
        parent, _, attr = layer.rpartition(".")
        names = packed.get(attr, [attr])
        holders |= {
            f"{parent}.{name}": (layer, part, len(names)) for part, name in enumerate(names)
        }
    rows = []
    for path, (a, b) in adapter.items():
        layer, part, count = holders.get(in_port(path, type(model)), ("", 0, 0))
        row = {"path": path, "layer": layer, "difference": float("inf")}
        rows.append(row)
        if not layer:
            continue
        given, sums = added[layer]
        module: Any = model.get_submodule(layer)
        sizes = list(getattr(module.base_layer, "output_partition_sizes", ()))
        if len(sizes) != count:
            sizes = [sums.shape[1]] if count == 1 else []
        if not sizes or sizes[part] != b.shape[0] or given.shape[1] != a.shape[1]:
            continue
        wanted = ALPHA / RANK * given @ a.T @ b.T
        norm = torch.linalg.vector_norm
        share = norm(sums.split(sizes, dim=1)[part] - wanted, dim=1) / norm(wanted, dim=1)
        share = share.nan_to_num(nan=float("inf"))
        row["difference"] = float(share.quantile(0.75, interpolation="nearest"))
    return rows
