"""Each quantised linear on the input that it really got: what it gave, beside the same by hand.

A whole model in 16 bits says little about its scales: an activation that crosses a rounding step,
or a router that then chooses another expert, moves it as far as quantising does. One layer on its
own live input crosses almost none. Weights come from the same port, run unquantised.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

from portkit.live import live_inputs
from portkit.live.live_inputs import Pairs, share_off
from portkit.live.quantised import Format, rounded, rounded_weight


def watched(model: nn.Module) -> AbstractContextManager[Pairs]:
    """Watch the quantised linears: what they get, and what they give, bias and all."""
    return live_inputs.watched(
        model,
        lambda m: (
            isinstance(m, LinearBase) and not isinstance(m.quant_method, UnquantizedLinearMethod)
        ),
        lambda layer, given, gave: gave,
    )


def by_hand(
    plain: nn.Module,
    seen: Pairs,
    format: Format,
    packed: dict[str, list[str]],
    dtype: torch.dtype,
) -> list[dict[str, Any]]:
    """Return per layer how far it is from its own input rounded alike; `plain` is unquantised.

    `dtype` is what weights were in when they were rounded.
    Keys: path, tokens, difference (upper quartile over the tokens, relative to the output), effect
    (the median of what rounding itself changes), part (of a fused layer, the one that is furthest
    off; "" if that is no single one).
    """
    rows = []
    for path, (given, gave) in seen.items():
        layer: Any = plain.get_submodule(path)
        weight = _weight(layer, given.shape[1]).to(dtype).float()
        alike = given if format == "int4" else rounded(given, format)
        wanted = alike @ rounded_weight(weight, format).T
        if layer.bias is not None and not layer.skip_bias_add:
            # Not the quantised layer's own: Marlin keeps it in an order of its kernel's.
            gave = gave - layer.bias.detach().float().cpu()
        rows.append(
            {
                "path": path,
                "tokens": len(wanted),
                "difference": share_off(gave, wanted, 0.75),
                "effect": share_off(given @ weight.T, wanted, 0.5),
                "part": _part(layer, gave - wanted, packed.get(path.rpartition(".")[2], [])),
            }
        )
    return rows


def _weight(layer: Any, wide: int) -> torch.Tensor:
    """Return float32 [out, in]: what the layer multiplies by, however it keeps it."""
    parameter = next(layer.parameters())
    one = torch.eye(wide, dtype=torch.float32, device=parameter.device)
    with torch.inference_mode():
        return layer.quant_method.apply(layer, one, None).float().cpu().T


def _part(layer: Any, difference: torch.Tensor, names: list[str]) -> str:
    """Return the part of a fused layer whose outputs hold nine tenths of the difference."""
    sizes = list(getattr(layer, "output_partition_sizes", ()))
    if len(sizes) != len(names) or sum(sizes) != difference.shape[1]:
        return ""
    held = torch.stack([part.square().sum() for part in difference.split(sizes, dim=1)])
    most = int(held.argmax())
    return names[most] if len(names) > 1 and held[most] > 0.9 * held.sum() else ""
