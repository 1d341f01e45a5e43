"""What a model consists of: its modules and parameters, built on the meta device (no memory)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from portkit.live.job import JobRequest
from portkit.live.reference import original_class
from portkit.port import Port


def run(request: JobRequest, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the parts of the port's original model: path, class, parameters, how many of each."""
    port = Port(Path(request.port_root))
    cls = original_class(port)
    config = _config(cls, port)
    with torch.device("meta"):
        model = cls(config)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    layers_at, layers = _layers(model)
    parts = _parts(model, layers_at, layers)
    total = sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings()
    if tied and head is not None and head.weight is not model.get_input_embeddings().weight:
        total -= head.weight.numel()
    return {
        "layers": len(layers),
        "layers_at": layers_at,
        "kinds": sorted({type(layer).__name__ for layer in layers}),
        "parameters": total,
        "tied": tied,
        "parts": parts,
        "buffers": [name for name, _ in model.named_buffers()],
        "config": {
            k: v for k, v in config.to_dict().items() if isinstance(v, (int, float, str, bool))
        },
    }


def _config(cls: type, port: Port) -> Any:
    """Read config.json with the class's own config class, or the one its model type names."""
    own = getattr(cls, "config_class", None)
    return (own or AutoConfig).from_pretrained(str(port.checkpoint), local_files_only=True)


def _layers(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """Return the path and the modules of the longest list of modules: the decoder layers."""
    lists = [(name, list(m)) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=lambda pair: len(pair[1]), default=("", []))


def _parts(model: nn.Module, layers_at: str, layers: list[nn.Module]) -> list[dict[str, Any]]:
    """Sum parameters by part: what stands outside the layers, and each child of a layer."""
    inside = {id(m) for layer in layers for m in layer.modules()}
    above = {layers_at.rsplit(".", n)[0] for n in range(layers_at.count(".") + 1)} | {"", layers_at}
    rows: list[dict[str, Any]] = []
    for name, module in model.named_modules():
        if name in above or id(module) in inside or _parent(name) not in above:
            continue
        rows.append(_row(name, module, 1))
    groups: Counter[tuple[str, str, int]] = Counter()
    for layer in layers:
        for name, child in layer.named_children():
            groups[name, type(child).__name__, sum(p.numel() for p in child.parameters())] += 1
    at = next((i for i, row in enumerate(rows) if "embed" not in row["path"]), len(rows))
    rows[at:at] = [
        {"path": f"{layers_at}.*.{name}", "class": kind, "parameters": size, "count": count}
        for (name, kind, size), count in groups.items()
    ]
    return rows


def _parent(name: str) -> str:
    return name.rsplit(".", 1)[0] if "." in name else ""


def _row(name: str, module: nn.Module, count: int) -> dict[str, Any]:
    size = sum(p.numel() for p in module.parameters())
    return {"path": name, "class": type(module).__name__, "parameters": size, "count": count}
