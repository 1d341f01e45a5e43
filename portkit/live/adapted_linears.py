"""Each layer under an adapter on the input that it really got: what the adapter added to it.

In float16, which vLLM's LoRA kernels for GPUs take, a router may choose another expert by rounding
alone, and the whole model then moves as far as an adapter moves it. What one layer adds to its own
live input does not depend on that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

from portkit.live import live_inputs
from portkit.live.adapters import ALPHA, RANK, Adapter
from portkit.live.live_inputs import Pairs, share_off
from portkit.live.quantised import in_port


def watched(model: nn.Module) -> AbstractContextManager[Pairs]:
    """Watch the linears that take adapters: what they get, and what adapters add to it."""
    return live_inputs.watched(model, lambda m: isinstance(m, BaseLinearLayerWithLoRA), _added)


def _added(layer: Any, given: torch.Tensor, gave: torch.Tensor) -> torch.Tensor:
    # As the layer does it, but for the adapter: a router's own forward casts (GateLinear).
    layer._apply_lora_to_output = lambda _, output: output
    try:
        plain = layer.forward(given)
    finally:
        del layer._apply_lora_to_output
    return gave.float() - (plain[0] if isinstance(plain, tuple) else plain).float()


def by_hand(
    model: nn.Module, added: Pairs, adapter: Adapter, packed: dict[str, list[str]]
) -> list[dict[str, Any]]:
    """Return per layer of the adapter how far what was added is from scale * B @ A @ input.

    `packed`: fused layer -> its parts, in the order in which they were loaded.
    Keys: path (the original's), layer (the port's, "" if no layer under adapters holds it),
    difference (upper quartile over the tokens, relative to what should be added).
    """
    own = {in_port(path, type(model)): len(b) for path, (_, b) in adapter.items()}
    holders = {}
    for layer in added:
        parent, _, attr = layer.rpartition(".")
        names = [f"{parent}.{name}" for name in packed.get(attr, [attr])]
        holders |= {name: (layer, part, names) for part, name in enumerate(names)}
    rows = []
    for path, (a, b) in adapter.items():
        layer, part, names = holders.get(in_port(path, type(model)), ("", 0, []))
        row = {"path": path, "layer": layer, "difference": float("inf")}
        rows.append(row)
        if not layer:
            continue
        given, sums = added[layer]
        module: Any = model.get_submodule(layer)
        sizes = list(getattr(module.base_layer, "output_partition_sizes", ()))
        if len(sizes) != len(names):  # a part may hold several of the layer's
            sizes = [own.get(name, 0) for name in names]
        if sum(sizes) != sums.shape[1] or sizes[part] != b.shape[0] or given.shape[1] != a.shape[1]:
            continue
        wanted = ALPHA / RANK * given @ a.T @ b.T
        row["difference"] = share_off(sums.split(sizes, dim=1)[part], wanted, 0.75)
    return rows


def rows_in_blocks(model: nn.Module) -> dict[str, int]:
    """Return name -> rows, those of all ranks together, of the linears in vLLM's own blocks.

    MambaMixer2 with fewer groups than ranks repeats groups in in_proj, which has more rows then
    than in the checkpoint; vLLM cuts an adapter's for ranks as if it did not.
    """
    return {name: int(m.base_layer.output_size) for name, m in _in_blocks_of_vllm(model)}


def halved_in_blocks(model: nn.Module) -> list[str]:
    """Return names of linears in vLLM's own blocks whose adapters it cuts for ranks in two halves.

    A MergedColumnParallelLinear that is one tensor of the checkpoint, gate and up for vLLM's LoRA
    (lora/layers/column_parallel_linear.py, slice_lora_b); Qwen3-Next's in_proj_qkvz is no such.
    """
    return [
        name
        for name, module in _in_blocks_of_vllm(model)
        if getattr(module, "is_merged_col_linear", False)
        and len(module.base_layer.output_sizes) == 1
    ]


def _in_blocks_of_vllm(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules():
        parent, _, name = path.rpartition(".")
        around = type(model.get_submodule(parent)).__module__
        if isinstance(module, BaseLinearLayerWithLoRA) and around.startswith("vllm."):
            yield name, module
