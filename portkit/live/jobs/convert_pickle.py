"""Write a pickled checkpoint as safetensors, beside its configuration, for a new port.

Unpickles with `weights_only=True`: tensors and plain containers, no code. A file that needs more
than that is refused, whatever the reader said.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from portkit.errors import PortkitError
from portkit.live.job import JobRequest

SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "LICENSE*")
"""Configuration and tokenizer; copied along."""


def run(request: JobRequest, say: Callable[[str], None]) -> dict[str, Any]:
    """Convert `request.args["files"]` of the folder `source` into the folder `out`."""
    source, out = Path(request.args["source"]), Path(request.args["out"])
    out.mkdir(parents=True, exist_ok=True)
    for pattern in SMALL_FILES:
        for path in source.glob(pattern):
            if not path.name.endswith(".index.json"):
                shutil.copyfile(path, out / path.name)
    names: set[str] = set()
    for number, name in enumerate(request.args["files"]):
        say(f"Converting {name}")
        tensors = _tensors(source / name)
        twice = names & set(tensors)
        if twice:
            raise PortkitError(f"The tensor {min(twice)!r} is in two files.", str(source / name))
        names |= set(tensors)
        save_file(tensors, out / f"model-{number:05d}.safetensors", metadata={"format": "pt"})
    return {"tensors": len(names)}


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise PortkitError(
            f"{path.name} cannot be read as plain tensors: it is damaged, was not written by "
            "`torch.save`, or holds objects whose loading runs code.",
            str(path),
            "Download it again, or convert it yourself where you trust it: load it with "
            "Transformers and `save_pretrained`.",
        ) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    # A clone each: tied tensors share memory, which safetensors does not store.
    found = {k: v.contiguous().clone() for k, v in state.items() if isinstance(v, torch.Tensor)}
    if not found:
        raise PortkitError(f"{path.name} holds no tensors.", str(path))
    return found
