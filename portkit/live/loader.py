"""The `portkit` model loader: weights for a port that has no load_weights yet (steps 2 and 3).

Registered through vLLM's own `register_model_loader`, so vLLM builds, loads and post-processes the
model as it does any other. Each checkpoint tensor goes to the parameter of its name or, through
the class's `packed_modules_mapping`, to a shard of a fused parameter, by the parameter's own
`weight_loader` where it has one (which takes this rank's share). Tensors are streamed one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from portkit.errors import PortkitError
from portkit.live.checkpoint import Checkpoint, open_checkpoint
from portkit.live.expert_names import ExpertNames, Place
from portkit.live.fused import fused_parts

LOAD_FORMAT = "portkit"
DERIVED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
"""Tensors that old checkpoints carry but every implementation computes from the config."""


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor and parameter; by name, as the checkpoint and the port say it."""

    written: dict[str, str]
    """Checkpoint tensor -> where it went, e.g. "model.layers.0.self_attn.qkv_proj.weight [q]"."""
    left_over: dict[str, tuple[int, ...]]
    """Checkpoint tensors with no place in the port, with their shapes."""
    unwritten: dict[str, tuple[int, ...]]
    """Parameters of the port that no tensor filled (in full), with their shapes."""
    twice: tuple[str, ...]
    """Parameters that two tensors were written to."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Target:
    """Where a tensor goes."""

    parameter: str
    shard: str | int | tuple[int, ...] | None
    """The id that the parameter's weight_loader takes; several, if the tensor holds several."""
    shards: tuple[str | int | tuple[int, ...], ...]
    """All the shards that fill the parameter; empty for a plain one."""


def read_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each tensor of the checkpoint, shard by shard, holding one at a time."""
    from safetensors import SafetensorError, safe_open

    for shard in checkpoint.shards:
        try:
            with safe_open(shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (no mapping, it cannot be iterated)
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise PortkitError(
                f"{shard.name} cannot be read: {error}.",
                str(shard),
                "Download or save this shard again.",
            ) from error


def find_target(model: nn.Module, parameters: dict[str, torch.Tensor], name: str) -> Target | None:
    """Return the parameter (and shard of it) that the checkpoint tensor `name` belongs to."""
    if name in parameters:
        return Target(name, None, ())
    parts = name.split(".")
    for fused, members in fused_parts(model).items():
        for position, part in enumerate(parts):
            if part not in members:
                continue
            path = [*parts[:position], fused]
            # A part may be a module around its linear in the original.
            inside = (parts[position + 1 :], parts[-1:])
            named = (".".join([*path, *rest]) for rest in inside)
            new = next((name for name in named if name in parameters), "")
            if not new:
                continue
            if len(members) == 1:
                return Target(new, None, ())
            module = model.get_submodule(".".join(path))
            # vLLM names the shards of an attention's projection by letter, all others by number.
            qkv = isinstance(module, QKVParallelLinear) and len(members) == 3
            ids: tuple[str | int, ...] = ("q", "k", "v") if qkv else tuple(range(len(members)))
            return Target(new, ids[members.index(part)], ids)
    return None


def target_of(model: nn.Module, parameters: dict[str, torch.Tensor], name: str) -> Target | None:
    """Return where a tensor belongs by its name, or by what the class's mapper makes of it."""
    renamed = _renamed(model, parameters, name)
    if renamed is not None and any(isinstance(shard, tuple) for shard in renamed.shards):
        return renamed  # packed_modules_mapping has no word for a tensor of several shards
    return find_target(model, parameters, name) or renamed


def _renamed(model: nn.Module, parameters: dict[str, torch.Tensor], name: str) -> Target | None:
    """Return the parameter that the class's own WeightsMapper renames the tensor to."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    found = mapper._map_name_with_shard(name) if mapper is not None else None
    if found is None or found[0] == name or found[0] not in parameters:
        return None
    stacked = (mapper.orig_to_new_stacked or {}).values()
    ids = tuple(shard for new, shard in stacked if found[1] is not None and new in found[0])
    return Target(found[0], found[1], ids)


def load(model: nn.Module, checkpoint: Checkpoint) -> LoadReport:
    """Fill the model's parameters from the checkpoint; return what went where.

    Raises PortkitError for a tensor whose shape does not fit; leaves judging what was left over
    or unwritten to the caller.
    """
    parameters = loadable(model)
    # Quantising while loading puts other parameters in the place of those that are full.
    to_fill = list(model.named_parameters())
    filled: dict[int, list[str | int | tuple[int, ...] | None]] = {}
    targets: dict[int, Target] = {}
    written: dict[str, str] = {}
    left_over: dict[str, tuple[int, ...]] = {}
    twice: list[str] = []
    experts = ExpertNames(model)
    for name, tensor in read_tensors(checkpoint):
        own = experts.renamed(name)
        target = target_of(model, parameters, name) or target_of(model, parameters, own)
        place = None if target else _placed(experts, parameters, own, tensor, name)
        if target is None and place is None:
            if not name.endswith(DERIVED) and not _is_aliased_head(model, parameters, name):
                left_over[name] = tuple(tensor.shape)
            continue
        target = target or Target(place.parameter, place.shard, place.shards)
        parameter = parameters[target.parameter]
        if place is None:
            stored = tensor.t() if is_transposed(model, name) else tensor
            _write(model, parameter, stored, name, target)
        done = filled.setdefault(id(parameter), [])
        if target.shard in done:
            twice.append(target.parameter)
        done.append(target.shard)
        targets[id(parameter)] = target
        written[name] = target.parameter + ("" if target.shard is None else f" [{target.shard}]")
    unwritten = {}
    optional = _cache_scales(model)
    for name, parameter in to_fill:
        if id(parameter) in optional and id(parameter) not in filled:
            continue
        done = filled.get(id(parameter), [])
        missing = [s for s in targets[id(parameter)].shards if s not in done] if done else []
        if not done:
            unwritten[name] = tuple(parameter.shape)
        elif missing:
            more = ", …" if missing[4:] else ""
            shards = ", ".join(map(str, missing[:4])) + more
            unwritten[f"{name} [{shards}]"] = tuple(parameter.shape)
    return LoadReport(written, left_over, unwritten, tuple(twice))


def is_transposed(model: nn.Module, name: str) -> bool:
    """Does the class say that the checkpoint stores this linear's weight as [in, out]?"""
    *_, layer, kind = ("", *name.split("."))
    return kind == "weight" and layer in (getattr(model, "transposed_weights", None) or ())


def _placed(
    experts: ExpertNames,
    parameters: dict[str, torch.Tensor],
    own: str,
    tensor: torch.Tensor,
    name: str,
) -> Place | None:
    """Write an expert's tensor; PortkitError if it does not fit."""
    try:
        return experts.write(parameters, own, tensor)
    except (AssertionError, AttributeError, RuntimeError, IndexError) as error:
        raise PortkitError(
            f"The tensor {name} of shape {list(tensor.shape)} does not fit the port's experts: "
            f"{error}",
            own,
            "Compare the sizes given where the experts are constructed with the config's.",
        ) from error


def loadable(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and persistent buffers by every name they have (tied ones have two)."""
    found: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[f"{path}.{name}" if path else name] = buffer
    return found


def _cache_scales(model: nn.Module) -> set[int]:
    """Return the ids of KV-cache scales: vLLM has defaults where a checkpoint has none."""
    return {
        id(parameter)
        for module in model.modules()
        if isinstance(getattr(module, "quant_method", None), BaseKVCacheMethod)
        for parameter in module.parameters(recurse=False)
    }


def _is_aliased_head(model: nn.Module, parameters: dict[str, torch.Tensor], name: str) -> bool:
    """Whether a stored copy of a tied head has no place of its own because the port ties it."""
    config = getattr(model, "config", None)
    return (
        name == "lm_head.weight"
        and name not in parameters
        and bool(getattr(config, "tie_word_embeddings", False))
    )


def _reorders(model: nn.Module, target: Target) -> nn.Module | None:
    """Return the block whose own load_weights puts the rows of its fused projection in order."""
    path, _, _ = target.parameter.rpartition(".")
    if target.shard is not None or not isinstance(model.get_submodule(path), QKVParallelLinear):
        return None
    block = model.get_submodule(path.rpartition(".")[0])
    return block if block is not model and hasattr(block, "load_weights") else None


def _rows_of(model: nn.Module, target: Target) -> int:
    """Return the rows that a fused linear has for a shard, on all ranks together; 0 if unknown."""
    path, _, kind = target.parameter.rpartition(".")
    module = model.get_submodule(path)
    if kind not in ("weight", "bias"):
        return 0
    if isinstance(module, QKVParallelLinear) and target.shard in ("q", "k", "v"):
        heads = module.total_num_heads if target.shard == "q" else module.total_num_kv_heads
        return heads * (module.v_head_size if target.shard == "v" else module.head_size)
    if isinstance(module, MergedColumnParallelLinear) and isinstance(target.shard, int):
        return int(module.output_sizes[target.shard])
    return 0


def _write(
    model: nn.Module, parameter: torch.Tensor, tensor: torch.Tensor, name: str, target: Target
) -> None:
    weight_loader = getattr(parameter, "weight_loader", default_weight_loader)
    block = _reorders(model, target)
    try:
        if block is not None:
            block.load_weights([(".".join(target.parameter.split(".")[-2:]), tensor)])
        elif target.shard is None:
            weight_loader(parameter, tensor)
        else:
            rows = _rows_of(model, target)
            if rows and len(tensor) > rows:  # vLLM's loader would cut it, without a word
                raise ValueError(f"the layer has {rows} rows for it")
            weight_loader(parameter, tensor, target.shard)
    except (AssertionError, RuntimeError, ValueError, IndexError) as error:
        raise PortkitError(
            f"The tensor {name} of shape {list(tensor.shape)} does not fit the port's "
            f"{target.parameter} of shape {list(parameter.shape)}"
            + ("" if target.shard is None else f" (shard {target.shard!r})")
            + (f": {error}" if str(error) else "."),
            target.parameter,
            "Compare the sizes given where that module is constructed with the config's.",
        ) from error


@register_model_loader(LOAD_FORMAT)
class PortkitLoader(BaseModelLoader):
    """vLLM's face of `load`; the report stays on the model as `portkit_load_report`."""

    def download_model(self, model_config: ModelConfig) -> None:
        open_checkpoint(Path(model_config.model))

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        report = load(model, open_checkpoint(Path(model_config.model)))
        model.portkit_load_report = report
        if report.unwritten:
            raise PortkitError(
                f"{len(report.unwritten)} of the port's parameters are in no tensor of the "
                f"checkpoint: {_some(report.unwritten)}"
                + (
                    f". Left over in the checkpoint: {_some(report.left_over)}."
                    if report.left_over
                    else "."
                ),
                next(iter(report.unwritten)),
                _advice(report),
            )


def _some(names: dict[str, Any], count: int = 4) -> str:
    shown = ", ".join(list(names)[:count])
    return shown + (f" and {len(names) - count} more" if len(names) > count else "")


def _advice(report: LoadReport) -> str:
    if "lm_head.weight" in report.unwritten and "lm_head.weight" not in report.left_over:
        return (
            "If the config ties word embeddings, the head shares the embedding's weight: tie "
            "self.lm_head to self.model.embed_tokens when config.tie_word_embeddings."
        )
    if report.left_over:
        return (
            "Attribute names should be those of the Transformers model; fused layers need their "
            "members in packed_modules_mapping."
        )
    return "Does the module exist in the Transformers model? A bias may be one too many."
