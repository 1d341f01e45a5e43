"""A quantised copy of a checkpoint, and Transformers computing with the same rounded numbers.

Formats of compressed-tensors. 8 bits, one scale per output row for weights, one scale per token for
activations, found while running: on the CPU int8 (vLLM's oneDNN and AMX kernels), on GPUs from
compute capability 8.9 on fp8 (e4m3), before that int8. int4 for weights alone, a scale for each 32
inputs, eight weights in an int32, on either. An ignore list leaves some layers as they are, among
them the parts of a fused one: vLLM finds them only by right prefixes and packed_modules_mapping.

And fp8 without a copy: vLLM rounds while it loads the checkpoint as it is ("online", on either).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import save_file
from torch import nn

from portkit.analysis.conversion import conversions_of, in_model
from portkit.live.checkpoint import INDEX, Checkpoint
from portkit.live.loader import read_tensors

Way = Literal["8 bits", "4 bits", "online"]
"""What is quantised: a copy of the checkpoint in so many bits, or vLLM does it while loading."""
Format = Literal["int8", "fp8", "int4"]
LARGEST = {"int8": 127.0, "fp8": 448.0, "int4": 7.0}
LARGEST_WEIGHT = {"int8": 63.0, "fp8": 448.0, "int4": 7.0}
"""Weights stay within 7 bits: on a CPU without VNNI, oneDNN adds pairs of products of an unsigned
activation and a weight in 16 bits, and 2 * 255 * 127 does not fit there (2 * 255 * 63 does)."""
GROUP = 32
"""Inputs that share a scale in int4: the smallest group that vLLM's kernels take, so that a small
model has several."""
EXPERT = re.compile(r"(.+\.experts)\.\d+\.")
SHARD = "model.safetensors"


@dataclass(frozen=True)
class Plan:
    """Which of the original's linear layers are quantised."""

    quantised: tuple[str, ...]
    """Module paths in the original, e.g. "model.layers.0.mlp.up_proj"."""
    stored: Mapping[str, str]
    """Module path in the original -> what the checkpoint calls it."""
    ignored: tuple[str, ...]
    """Those left as they are; the head is always one, and so are routers that are no nn.Linear: a
    port's may be one."""
    experts: tuple[str, ...]
    """Modules that hold experts as one tensor each: left as they are. The copy does not round them,
    and vLLM's CPU build has no 8-bit kernel for experts."""


def format_for(device: str, way: Way) -> Format | None:
    """Return what vLLM can run on this device ("cpu" or "cuda"), None if it can't do that."""
    if way == "4 bits":
        return "int4"
    if device == "cpu":
        return "fp8" if way == "online" else "int8"
    from vllm.platforms import current_platform

    if current_platform.has_device_capability(89):
        return "fp8"
    return None if way == "online" else "int8"


def multiple_for(format: Format, device: str) -> int:
    """Return what a layer's sizes must divide by.

    vLLM's fp8 kernel for GPUs fills other sizes up, but stops where there is a scale for each row
    (scaled_mm/cutlass.py sets weight_loader on the weight a second time).
    """
    if format == "int4":
        return GROUP
    return 1 if device == "cpu" else 16


def plan(
    original: nn.Module,
    tensors: Collection[str],
    packed: dict[str, list[str]],
    multiple: int,
    as_is: Callable[[str], bool] = lambda name: False,
) -> Plan:
    """Choose the layers: all linears but the head, a fused group of the last, one of the first.

    `original` is Transformers' model (it may be on the meta device), `tensors` the checkpoint's
    names, `packed` the port's packed_modules_mapping; sizes must divide by `multiple`; `as_is`
    tells by the checkpoint's name which linears the port cannot have quantised. A plan without
    `quantised` means that there is nothing to quantise.
    """
    conversions = conversions_of(str(getattr(original.config, "model_type", "")))
    stored = {
        in_model(name, conversions).removesuffix(".weight"): name.removesuffix(".weight")
        for name in tensors
        if name.endswith(".weight")
    }
    head = original.get_output_embeddings()
    linears = [
        name
        for name, module in original.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
    names = [
        name
        for name in linears
        if name in stored
        and not _is_gate(original, name)
        and not as_is(stored[name])
        and _fits(original, name, packed, multiple)
    ]
    heads = [n for n, m in original.named_modules() if m is head and head is not None]
    members = {part for parts in packed.values() for part in parts}
    fused = [n for n in names if _split(n, members)[1] in members]
    single = [n for n in names if _split(n, members)[1] not in members]
    left = [name for name in linears if name not in names]
    if fused:
        parent, attr, inner = _split(fused[-1], members)
        group = next(parts for parts in packed.values() if attr in parts)
        alike = [f"{parent}.{part}{inner}" for part in group]
        left += [name for name in alike if name in names]
    if len(single) > 1:
        left.append(single[0])
    experts = [name for name, module in original.named_modules() if is_stack(module)]
    if experts:  # the checkpoint, and vLLM with it, may call them otherwise (block_sparse_moe)
        holders = {match[1] for name in tensors if (match := EXPERT.match(name))}
        experts += sorted(holders - set(experts))
    routers = [
        name
        for name, module in original.named_modules()
        if not isinstance(module, nn.Linear | nn.Embedding)
        and getattr(getattr(module, "weight", None), "ndim", 0) == 2
        and name in stored
    ]
    # What Transformers calls otherwise than the checkpoint, a port may call as the checkpoint does.
    known = {name for name, _ in original.named_modules()}
    renamed = sorted(
        name.removesuffix(".weight")
        for name in tensors
        if name.endswith(".weight")
        and name.removesuffix(".weight") not in known
        and not name.startswith(tuple(f"{holder}." for holder in experts))
    )
    chosen = tuple(n for n in names if n not in left)
    rounded = {stored[n] for n in chosen}
    ignored = (*left, *heads, *routers, *(n for n in renamed if n not in rounded))
    return Plan(chosen, stored, ignored, tuple(experts))


def is_stack(module: nn.Module) -> bool:
    """Whether a module holds the weights of experts as one tensor."""
    stacked = any(parameter.dim() > 2 for parameter in module.parameters(recurse=False))
    return stacked and not isinstance(module, nn.modules.conv._ConvNd)


def _split(name: str, members: Collection[str]) -> tuple[str, str, str]:
    """Return what holds a linear, its name there, and the rest.

    The rest is "" unless the original wraps the linear: Moshi's q_proj.linear, a part of qkv_proj.
    """
    parent, _, attr = name.rpartition(".")
    outer, _, wrapper = parent.rpartition(".")
    if attr not in members and wrapper in members:
        return outer, wrapper, f".{attr}"
    return parent, attr, ""


def _is_gate(original: nn.Module, name: str) -> bool:
    """Whether the linear chooses among experts, or weighs the shared one: none quantises these."""
    block = name.rpartition(".")[0]
    for holder in (block, block.rpartition(".")[0]):
        experts = getattr(original.get_submodule(holder), "experts", None)
        if isinstance(experts, nn.Module) and (one := next(experts.parameters(), None)) is not None:
            count = len(experts) if isinstance(experts, nn.ModuleList) else one.shape[0]
            # Experts may lie under each other in one matrix, whose first size says nothing then.
            router = "router" in name.removeprefix(holder).split(".")
            return router or original.get_submodule(name).out_features in (1, count)
    return False


def _fits(original: nn.Module, name: str, packed: dict[str, list[str]], multiple: int) -> bool:
    """Whether vLLM's kernels take the layer, or the fused one that it is a part of."""
    parent, attr, inner = _split(name, {part for parts in packed.values() for part in parts})
    parts = next((parts for parts in packed.values() if attr in parts), [attr])
    modules = dict(original.named_modules())
    layers = (modules.get(f"{parent}.{part}{inner}") for part in parts)
    return all(
        size % multiple == 0
        for layer in layers
        if isinstance(layer, nn.Linear)
        for size in (layer.in_features, layer.out_features)
    )


def write_copy(source: Checkpoint, target: Path, plan: Plan, format: Format) -> None:
    """Write the quantised copy: its config with a quantization_config, one shard."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    tensors: dict[str, torch.Tensor] = {}
    chosen = {f"{plan.stored[name]}.weight" for name in plan.quantised}
    for name, tensor in read_tensors(source):
        if name in chosen:
            bits, tensors[f"{name}_scale"] = quantise(tensor, format)
            if format == "int4":
                tensors[f"{name}_packed"] = pack_to_int32(bits, 4)
                tensors[f"{name}_shape"] = torch.tensor(bits.shape)
            else:
                tensors[name] = bits
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
    kind = {
        "num_bits": 4 if format == "int4" else 8,
        "type": "float" if format == "fp8" else "int",
        "symmetric": True,
        "dynamic": False,
    }
    weights = {**kind, "strategy": "channel"}
    activations: dict[str, Any] | None = {**kind, "strategy": "token", "dynamic": True}
    if format == "int4":
        weights, activations = {**kind, "strategy": "group", "group_size": GROUP}, None
    return {
        "quant_method": "compressed-tensors",
        "format": {"int8": "int-quantized", "fp8": "float-quantized", "int4": "pack-quantized"}[
            format
        ],
        "quantization_status": "compressed",
        "ignore": ignore_list(plan),
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": activations,
            }
        },
    }


def online(plan: Plan, port_class: type) -> dict[str, Any]:
    """Return vllm.LLM's options for weights rounded to fp8 while loading, a scale per row.

    vLLM calls that fp8_per_channel; activations have a scale per token, as in the copy. Unlike a
    checkpoint's ignore list, this one has to speak of layers as the port does.
    """
    ignored = [*ignore_list(plan), *(in_port(name, port_class) for name in plan.ignored)]
    return {
        "quantization": "online",
        "quantization_config": {
            "linear": "fp8_per_channel",
            "ignore": [*dict.fromkeys(ignored)],
        },
    }


def in_port(name: str, port_class: type) -> str:
    """Return what the port calls a module of the checkpoint, the parts of fused layers as such."""
    mapper = getattr(port_class, "hf_to_vllm_mapper", None)
    if mapper is None:
        return name
    found = replace(mapper, orig_to_new_stacked={}).map_name(f"{name}.weight")
    return (found or name).removesuffix(".weight")


def ignore_list(plan: Plan) -> list[str]:
    """Return the layers to leave alone, as vLLM matches them."""
    # vLLM asks for an expert's linears by name: experts.0.w1.
    return [*plan.ignored, *(f"re:{re.escape(name)}\\..*" for name in plan.experts)]


def quantise(weight: torch.Tensor, format: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (8-bit weight [out, in], float32 scale [out, 1]).

    int4: int8 [out, in] of -7 to 7, bfloat16 scale [out, in / GROUP].
    """
    groups = _groups(weight.float(), format)
    scale = (groups.abs().amax(dim=-1, keepdim=True) / LARGEST_WEIGHT[format]).clamp_min(1e-12)
    if format == "int4":
        # vLLM keeps these scales in the dtype that it runs in; float16 holds these exactly.
        scale = scale.to(torch.bfloat16).clamp_min(2**-14)
    bits = _to_bits(groups / scale.float(), format)
    return bits.reshape(weight.shape), scale.squeeze(-1) if format == "int4" else scale


def rounded_weight(weight: torch.Tensor, format: Format) -> torch.Tensor:
    """Return a weight as vLLM computes with it after `quantise`."""
    bits, scale = quantise(weight, format)
    if format == "int4":
        scale = scale.unsqueeze(-1)
    return (_groups(bits.to(torch.float32), format) * scale.float()).reshape(weight.shape)


def _groups(values: torch.Tensor, format: Format) -> torch.Tensor:
    """Return [out, in], or [out, in / GROUP, GROUP] for int4: the last axis has one scale."""
    return values.reshape(values.shape[0], -1, GROUP) if format == "int4" else values


def rounded(values: torch.Tensor, format: Format) -> torch.Tensor:
    """Return activations as they come back from 8 bits with a scale per row."""
    scale = (values.abs().amax(dim=-1, keepdim=True) / LARGEST[format]).clamp_min(1e-12)
    return _to_bits(values / scale, format).to(values.dtype) * scale


def _to_bits(values: torch.Tensor, format: Format) -> torch.Tensor:
    limit = LARGEST[format]
    if format != "fp8":
        return values.round().clamp(-limit, limit).to(torch.int8)
    return values.clamp(-limit, limit).to(torch.float8_e4m3fn)


@contextmanager
def quantised_original(model: nn.Module, plan: Plan, format: Format) -> Iterator[nn.Module]:
    """Inside the block, Transformers' model computes with rounded weights and activations.

    int4 rounds weights alone.
    """
    hooks = []
    kept: dict[str, torch.Tensor] = {}

    def round_input(module: nn.Module, args: Any) -> Any:
        return (rounded(args[0], format), *args[1:])

    for name in plan.quantised:
        module = model.get_submodule(name)
        kept[name] = module.weight.data
        module.weight.data = rounded_weight(module.weight.data, format).to(kept[name].dtype)
        if format != "int4":
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
