"""A quantised copy of a checkpoint, and Transformers computing with the same rounded numbers.

Format: compressed-tensors, 8 bits, one scale per output row for weights, one scale per token for
activations, found while running. On the CPU int8 (vLLM's oneDNN and AMX kernels), on GPUs from
compute capability 8.9 on fp8 (e4m3), before that int8. An ignore list leaves some layers as they
are, among them the parts of a fused one: vLLM finds them only by right prefixes and
packed_modules_mapping.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from portkit.live.checkpoint import INDEX, Checkpoint
from portkit.live.loader import read_tensors

Format = Literal["int8", "fp8"]
LARGEST = {"int8": 127.0, "fp8": 448.0}
LARGEST_WEIGHT = {"int8": 63.0, "fp8": 448.0}
"""Weights stay within 7 bits: on a CPU without VNNI, oneDNN adds pairs of products of an unsigned
activation and a weight in 16 bits, and 2 * 255 * 127 does not fit there (2 * 255 * 63 does)."""
SHARD = "model.safetensors"


@dataclass(frozen=True)
class Plan:
    """Which of the original's linear layers are quantised."""

    quantised: tuple[str, ...]
    """Module paths in the original, e.g. "model.layers.0.mlp.up_proj"."""
    ignored: tuple[str, ...]
    """Those left as they are; the head is always one."""
    experts: tuple[str, ...] = ()
    """Modules that hold experts as one tensor each: left as they are. The copy does not round them,
    and vLLM's CPU build has no 8-bit kernel for experts."""


def format_for(device: str) -> Format:
    """Return what vLLM can run on this device ("cpu" or "cuda")."""
    if device == "cpu":
        return "int8"
    from vllm.platforms import current_platform

    return "fp8" if current_platform.has_device_capability(89) else "int8"


def plan(original: nn.Module, tensors: Collection[str], packed: dict[str, list[str]]) -> Plan:
    """Choose the layers: all linears but the head, a fused group of the last, one of the first.

    `original` is Transformers' model (it may be on the meta device), `packed` the port's
    packed_modules_mapping. A plan without `quantised` means that there is nothing to quantise.
    """
    head = original.get_output_embeddings()
    names = [
        name
        for name, module in original.named_modules()
        if isinstance(module, nn.Linear) and module is not head and f"{name}.weight" in tensors
    ]
    heads = [n for n, m in original.named_modules() if m is head and head is not None]
    members = {part for parts in packed.values() for part in parts}
    fused = [n for n in names if n.rpartition(".")[2] in members]
    single = [n for n in names if n.rpartition(".")[2] not in members]
    left: list[str] = []
    if fused:
        parent, _, attr = fused[-1].rpartition(".")
        group = next(parts for parts in packed.values() if attr in parts)
        left += [f"{parent}.{part}" for part in group if f"{parent}.{part}" in names]
    if len(single) > 1:
        left.append(single[0])
    experts = [
        name
        for name, module in original.named_modules()
        if any(parameter.dim() > 2 for parameter in module.parameters(recurse=False))
        and not isinstance(module, nn.modules.conv._ConvNd)
    ]
    return Plan(tuple(n for n in names if n not in left), (*left, *heads), tuple(experts))


def write_copy(source: Checkpoint, target: Path, plan: Plan, format: Format) -> None:
    """Write the quantised copy: its config with a quantization_config, one shard."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    tensors: dict[str, torch.Tensor] = {}
    chosen = {f"{name}.weight" for name in plan.quantised}
    for name, tensor in read_tensors(source):
        if name in chosen:
            tensors[name], tensors[f"{name}_scale"] = quantise(tensor, format)
        else:
            tensors[name] = tensor.contiguous()
    save_file(tensors, target / SHARD, metadata={"format": "pt"})
    config = {**source.config, "quantization_config": settings(plan, format)}
    (target / "config.json").write_text(json.dumps(config, indent=2))
    for path in source.root.iterdir():
        if path.suffix == ".json" and path.name not in ("config.json", INDEX):
            shutil.copyfile(path, target / path.name)


def settings(plan: Plan, format: Format) -> dict[str, Any]:
    """Return the quantization_config of config.json, as compressed-tensors writes it."""
    kind = {"num_bits": 8, "type": "int" if format == "int8" else "float", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if format == "int8" else "float-quantized",
        "quantization_status": "compressed",
        # vLLM asks for an expert's linears by name: experts.0.w1.
        "ignore": [*plan.ignored, *(f"re:{re.escape(name)}\\..*" for name in plan.experts)],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**kind, "strategy": "channel", "dynamic": False},
                "input_activations": {**kind, "strategy": "token", "dynamic": True},
            }
        },
    }


def quantise(weight: torch.Tensor, format: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (8-bit weight [out, in], float32 scale [out, 1])."""
    weight = weight.float()
    scale = (weight.abs().amax(dim=1, keepdim=True) / LARGEST_WEIGHT[format]).clamp_min(1e-12)
    return _to_bits(weight / scale, format), scale


def rounded_weight(weight: torch.Tensor, format: Format) -> torch.Tensor:
    """Return a weight as vLLM computes with it after `quantise`."""
    bits, scale = quantise(weight, format)
    return bits.to(torch.float32) * scale


def rounded(values: torch.Tensor, format: Format) -> torch.Tensor:
    """Return activations as they come back from 8 bits with a scale per row."""
    scale = (values.abs().amax(dim=-1, keepdim=True) / LARGEST[format]).clamp_min(1e-12)
    return _to_bits(values / scale, format).to(values.dtype) * scale


def _to_bits(values: torch.Tensor, format: Format) -> torch.Tensor:
    limit = LARGEST[format]
    if format == "int8":
        return values.round().clamp(-limit, limit).to(torch.int8)
    return values.clamp(-limit, limit).to(torch.float8_e4m3fn)


@contextmanager
def quantised_original(model: nn.Module, plan: Plan, format: Format) -> Iterator[nn.Module]:
    """Inside the block, Transformers' model computes with rounded weights and activations."""
    hooks = []
    kept: dict[str, torch.Tensor] = {}

    def round_input(module: nn.Module, args: Any) -> Any:
        return (rounded(args[0], format), *args[1:])

    for name in plan.quantised:
        module = model.get_submodule(name)
        kept[name] = module.weight.data
        module.weight.data = rounded_weight(module.weight.data, format).to(kept[name].dtype)
        hooks.append(module.register_forward_pre_hook(round_input))
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()
        for name, weight in kept.items():
            model.get_submodule(name).weight.data = weight


def logprobs(model: nn.Module, ids: Sequence[int]) -> np.ndarray:
    """Return float32 [n, vocab] of Transformers' model for one prompt."""
    with torch.inference_mode():
        tokens = torch.tensor([list(ids)], device=next(model.parameters()).device)
        logits = model(input_ids=tokens, use_cache=False).logits[0]
        return torch.log_softmax(logits.float(), -1).cpu().numpy()
