"""Each quantised linear on the input that it really got: what it gave, beside the same by hand.

A whole model in 16 bits says little about its scales: an activation that crosses a rounding step,
or a router that then chooses another expert, moves it as far as quantising does. One layer on its
own live input crosses almost none. Weights come from the same port, run unquantised.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

from portkit.live.quantised import Format, rounded, rounded_weight

ROWS = 200
"""Tokens that are kept of each layer."""


@dataclass(frozen=True)
class Seen:
    """What one layer computed; both float32 on the CPU."""

    given: torch.Tensor
    """[tokens, in]."""
    gave: torch.Tensor
    """[tokens, out]."""


@contextmanager
def watched(model: nn.Module) -> Iterator[dict[str, Seen]]:
    """Inside the block, collect what the quantised linears compute; filled at its end."""
    kept: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    found: dict[str, Seen] = {}
    handles = []

    def keep(path: str, layer: Any, args: Any, output: Any) -> None:
        gave = output[0] if isinstance(output, tuple) else output
        if sum(len(given) for given, _ in kept.get(path, ())) >= ROWS:
            return
        pair = (args[0].detach().float().cpu(), gave.detach().float().cpu())
        kept.setdefault(path, []).append((pair[0].clone(), pair[1].clone()))

    for path, module in model.named_modules():
        if isinstance(module, LinearBase) and not isinstance(
            module.quant_method, UnquantizedLinearMethod
        ):
            handles.append(
                module.register_forward_hook(
                    lambda layer, args, output, path=path: keep(path, layer, args, output)
                )
            )
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    for path, pairs in kept.items():
        given, gave = (torch.cat(side) for side in zip(*pairs, strict=True))
        found[path] = Seen(given, gave)


def by_hand(
    plain: nn.Module,
    seen: dict[str, Seen],
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
    for path, one in seen.items():
        layer: Any = plain.get_submodule(path)
        weight = _weight(layer, one.given.shape[1]).to(dtype).float()
        given = one.given if format == "int4" else rounded(one.given, format)
        wanted = given @ rounded_weight(weight, format).T
        unrounded = one.given @ weight.T
        gave = one.gave
        if layer.bias is not None and not layer.skip_bias_add:
            # Not the quantised layer's own: Marlin keeps it in an order of its kernel's.
            gave = gave - layer.bias.detach().float().cpu()
        rows.append(
            {
                "path": path,
                "tokens": len(wanted),
                "difference": _share(gave - wanted, wanted, 0.75),
                "effect": _share(unrounded - wanted, wanted, 0.5),
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


def _share(difference: torch.Tensor, of: torch.Tensor, quantile: float) -> float:
    norm = torch.linalg.vector_norm
    share = norm(difference, dim=1) / norm(of, dim=1).clamp(min=1e-30)
    return float(
        torch.nan_to_num(share, nan=float("inf")).quantile(quantile, interpolation="nearest")
    )


def _part(layer: Any, difference: torch.Tensor, names: list[str]) -> str:
    """Return the part of a fused layer whose outputs hold nine tenths of the difference."""
    sizes = list(getattr(layer, "output_partition_sizes", ()))
    if len(sizes) != len(names) or sum(sizes) != difference.shape[1]:
        return ""
    held = torch.stack([part.square().sum() for part in difference.split(sizes, dim=1)])
    most = int(held.argmax())
    return names[most] if len(names) > 1 and held[most] > 0.9 * held.sum() else ""
