"""LoRA adapters for a checkpoint, in peft's file format, and Transformers computing with one.

An adapter names layers by Transformers' module paths and adds `scale * B @ A` to their weight.
The library peft is not needed: its file is safetensors, and its sum one line.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

RANK = 8
ALPHA = 16
"""Twice the rank, so that a scale that is left out shows."""
STRENGTH = 0.1
"""How large an adapter's change is beside the weight, in standard deviations."""

Adapter = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Module path in the original -> (A [rank, in], B [out, rank])."""


def adaptable(original: nn.Module, tensors: Collection[str]) -> list[str]:
    """Return the linear layers that adapters are trained for: all but the head and routers.

    `tensors` are the checkpoint's names: a layer that is in none of them has no weight of its own.
    """
    head = original.get_output_embeddings()
    return [
        path
        for path, module in original.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not head
        and f"{path}.weight" in tensors
        # What stands beside experts chooses among them.
        and not hasattr(original.get_submodule(path.rpartition(".")[0]), "experts")
    ]


def random_adapter(original: nn.Module, paths: Collection[str], seed: int = 0) -> Adapter:
    """Return an adapter whose change is `STRENGTH` times as large as each weight."""
    generator = torch.Generator().manual_seed(seed)
    adapter = {}
    for path in paths:
        outputs, inputs = _shape(original.get_submodule(path))
        a = torch.randn(RANK, inputs, generator=generator)
        b = torch.randn(outputs, RANK, generator=generator)
        weight = original.get_submodule(path).weight.detach().float().cpu()
        change = (ALPHA / RANK * (b @ a)).std()
        adapter[path] = (a, b * (STRENGTH * weight.std() / change))
    return adapter


def zero_adapter(original: nn.Module, paths: Collection[str]) -> Adapter:
    """Return the adapter that training starts from: A random, B zero. It changes nothing."""
    made = random_adapter(original, paths)
    return {path: (a, torch.zeros_like(b)) for path, (a, b) in made.items()}


def write(folder: Path, adapter: Adapter) -> None:
    """Write adapter_config.json and adapter_model.safetensors, as peft does."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, (a, b) in adapter.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = b.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": sorted({path.rpartition(".")[2] for path in adapter}),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2))


@contextmanager
def adapted(original: nn.Module, adapter: Adapter) -> Iterator[nn.Module]:
    """Inside the block, Transformers' model computes with W + scale * B @ A."""
    kept = {}
    for path, (a, b) in adapter.items():
        module = original.get_submodule(path)
        kept[path] = module.weight.data
        change = (ALPHA / RANK) * (b @ a)
        change = change.t() if isinstance(module, Conv1D) else change
        module.weight.data = kept[path] + change.to(kept[path])
    try:
        yield original
    finally:
        for path, weight in kept.items():
            original.get_submodule(path).weight.data = weight


def _shape(module: nn.Module) -> tuple[int, int]:
    """Return (outputs, inputs); Conv1D stores its weight the other way round."""
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)
