"""Weights of experts for ports without load_weights: the checkpoint's names, one expert each.

Transformers' conversions say which stacked parameter an expert's tensor belongs to, and where in
it. Before step parallel that is a slice of the author's parameter; after it, vLLM's fused experts
place the tensor themselves.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import MoERunner

from portkit.analysis.conversion import Conversion, Merge, conversions_of, in_model


@dataclass(frozen=True)
class Place:
    """Where a tensor goes: an entry of a stacked parameter, or a plain parameter (no shard)."""

    parameter: str
    shard: str | None
    shards: tuple[str, ...]


class ExpertNames:
    """Names of one checkpoint's tensors in one model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        config = getattr(model, "config", None)
        # Transformers' table knows some models by their class, others by their type.
        names = [type(model).__name__, *(getattr(config, "architectures", None) or ())]
        names.append(str(getattr(config, "model_type", "")))
        found = filter(None, map(conversions_of, names))
        self.conversions: tuple[Conversion, ...] = next(found, ())

    def renamed(self, name: str) -> str:
        """The model's name of a checkpoint's tensor, stacking left aside."""
        return in_model(name, self.conversions)

    def write(
        self, parameters: dict[str, torch.Tensor], name: str, tensor: torch.Tensor
    ) -> Place | None:
        """Put an expert's tensor where it belongs; None if it is no expert's.

        RuntimeError if its shape does not fit.
        """
        found = self._stacked(name)
        if found is not None and found[0] in parameters:
            stacked, expert, part, parts = found
            parameter = parameters[stacked]
            parameter.data[expert].chunk(parts)[part].copy_(tensor)
            every = tuple(f"{e}.{p}" for e in range(len(parameter)) for p in range(parts))
            return Place(stacked, f"{expert}.{part}", every)
        path, inside, rest = name.partition(".experts.")
        runner = self._runner(path + inside.rstrip(".")) if inside else None
        if runner is None:
            return None
        written: list[str] = []
        for own in dict.fromkeys((rest, rest.rpartition(".")[2])):  # a module between, of no use
            try:
                written = list(runner.load_weights([(own, tensor)]))
            except KeyError:
                continue
            break
        if not written:
            return None
        parameter = f"{path}.experts.{written[0]}"
        if found is None:
            return Place(parameter, None, ())
        _, expert, part, parts = found
        count = runner.routed_experts.global_num_experts
        every = tuple(f"{e}.{p}" for e in range(count) for p in range(parts))
        return Place(parameter, f"{expert}.{part}", every)

    def _stacked(self, name: str) -> tuple[str, int, int, int] | None:
        """(stacked parameter, expert, part of it, number of parts) of one expert's tensor."""
        for merge in self.conversions:
            if not isinstance(merge, Merge) or not merge.stacks_experts:
                continue
            for part, source in enumerate(merge.sources):
                pattern = re.escape(source.replace("\\", "")).replace(r"\*", r"(\d+)") + "$"
                match = re.search(pattern, name)
                if match:
                    stacked = name[: match.start()] + merge.target
                    return stacked, int(match.group(1)), part, len(merge.sources)
        return None

    def _runner(self, path: str) -> MoERunner | None:
        try:
            module = self.model.get_submodule(path)
        except AttributeError:
            return None
        return module if isinstance(module, MoERunner) else None
