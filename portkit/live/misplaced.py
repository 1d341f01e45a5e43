"""Find what load_weights put in the wrong place, by the values themselves.

portkit's loader knows by name where each tensor of the checkpoint belongs. Writing it there once
more, into an emptied parameter, shows what should stand there; what does stand there may be another
tensor. One rank, plain weights. Says nothing where a fused tensor has to be taken apart first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from portkit.live.checkpoint import Checkpoint
from portkit.live.loader import Target, is_transposed, loadable, read_tensors, target_of


@dataclass(frozen=True)
class Misplaced:
    """One place of the port that does not hold its tensor."""

    parameter: str
    shard: str
    wanted: str
    """The tensor that belongs there."""
    held: str
    """The tensor that stands there instead; empty if it is none that was found."""

    def __str__(self) -> str:
        place = self.parameter + (f" [{self.shard}]" if self.shard else "")
        if self.held == self.wanted:
            return f"{place} holds {self.wanted} as it is stored, not transposed"
        return f"{place} holds {self.held or 'other numbers'} in place of {self.wanted}"


def misplaced(model: nn.Module, checkpoint: Checkpoint, most: int = 6) -> list[Misplaced]:
    """Return up to `most` places that do not hold the tensor of their name."""
    parameters = loadable(model)
    wrong: list[tuple[str, Target, torch.Tensor]] = []
    for name, tensor in read_tensors(checkpoint):
        target = target_of(model, parameters, name)
        if target is None:
            continue
        stored = tensor.t() if is_transposed(model, name) else tensor
        stands = _standing(parameters[target.parameter], stored, target)
        if stands is not None:
            wrong.append((name, target, stands))
        if len(wrong) == most:
            break
    found = []
    for name, target, stands in wrong:
        held = next(
            (
                other
                for other, tensor in read_tensors(checkpoint)
                if tensor.numel() == stands.numel()
                and torch.equal(tensor.flatten().float(), stands)
            ),
            "",
        )
        found.append(Misplaced(target.parameter, str(target.shard or ""), name, held))
    return found


def _standing(parameter: torch.Tensor, tensor: torch.Tensor, target: Target) -> torch.Tensor | None:
    """Return the values that stand where `tensor` belongs, flat; None if they are the tensor's."""
    if not parameter.is_floating_point():
        return None
    before = parameter.data.clone()
    load = getattr(parameter, "weight_loader", default_weight_loader)
    if load is default_weight_loader and target.shard is not None:
        return None  # vLLM replaced the parameter after loading: its shards cannot be told any more
    try:
        parameter.data.fill_(float("nan"))
        load(parameter, tensor, *(() if target.shard is None else (target.shard,)))
        written = ~torch.isnan(parameter.data)
        should, stands = parameter.data[written], before[written]
    except (AssertionError, RuntimeError, ValueError, IndexError):
        return None
    finally:
        parameter.data.copy_(before)
    if should.numel() < tensor.numel() or torch.equal(should, stands):
        return None
    # Padding that the loader filled is none of the tensor's.
    return stands[: tensor.numel()].float().cpu()
