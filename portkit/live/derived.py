"""Checkpoints derived from a port's: the head tied to the embedding, or a head of its own.

Only config.json and the shards that change are written; the others are linked.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from portkit.analysis.conversion import Renaming, conversions_of
from portkit.live.checkpoint import INDEX, Checkpoint, TensorInfo
from portkit.live.loader import read_tensors

SHARD = "portkit-rewritten.safetensors"


@dataclass(frozen=True)
class Head:
    """Where the original keeps embedding and head."""

    embedding: str
    """Tensor name of the embedding's weight."""
    weight: str
    """Tensor name of the head's weight."""


def head_of(cls: type, checkpoint: Checkpoint) -> Head | None:
    """Return the checkpoint's names of embedding and head; None if the original cannot tie them."""
    config = AutoConfig.from_pretrained(str(checkpoint.root), local_files_only=True)
    if not hasattr(config, "tie_word_embeddings"):
        return None
    config.tie_word_embeddings = False
    with torch.device("meta"):
        model = cls(config)
    names = {id(p): name for name, p in model.named_parameters()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or head is None or embedding.weight.shape != head.weight.shape:
        return None
    stored = {_renamed(cls.__name__, name): name for name in checkpoint.names}
    own, other = (names[id(m.weight)] for m in (embedding, head))
    return Head(stored.get(own, own), stored.get(other, other))


def _renamed(architecture: str, name: str) -> str:
    """Return what Transformers' model calls a tensor of the checkpoint."""
    for conversion in conversions_of(architecture):
        if isinstance(conversion, Renaming):
            name = re.sub(conversion.source, conversion.target, name)
    return name


def tensors_for(checkpoint: Checkpoint, head: Head, tied: bool) -> tuple[TensorInfo, ...]:
    """Return the checkpoint's tensors as they would be with a tied or an untied head."""
    found = {t.name: t for t in checkpoint.tensors}
    if tied:
        found.pop(head.weight, None)
    elif head.weight not in found:
        found[head.weight] = replace(found[head.embedding], name=head.weight)
    return tuple(found.values())


def write_variant(checkpoint: Checkpoint, head: Head, tied: bool, target: Path) -> None:
    """Write the checkpoint with a tied or an untied head; an untied one is the embedding reversed.

    Its rows are in reverse order and its sign is changed, so that it cannot pass for the embedding.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    wanted = {t.name for t in tensors_for(checkpoint, head, tied)}
    stored = set(checkpoint.names)
    changed = _shards_with(checkpoint, {head.weight} | ({head.embedding} if tied else set()))
    for shard in checkpoint.shards:
        if shard.name not in changed:
            (target / shard.name).symlink_to(shard.resolve())
    rewritten = {
        name: tensor.contiguous()
        for name, tensor in read_tensors(_only(checkpoint, changed))
        if name in wanted
    }
    if not tied and head.weight not in stored:
        embedding = next(t for name, t in read_tensors(checkpoint) if name == head.embedding)
        rewritten[head.weight] = -embedding.flip(0).contiguous()
    places = {t.name: t.shard for t in checkpoint.tensors if t.shard not in changed}
    if rewritten:
        save_file(rewritten, target / SHARD, metadata={"format": "pt"})
        places |= dict.fromkeys(rewritten, SHARD)
    # Without an index Transformers accepts a single file of one name only.
    index = {"metadata": {}, "weight_map": places}
    (target / INDEX).write_text(json.dumps(index, indent=2))
    config = {**checkpoint.config, "tie_word_embeddings": tied}
    (target / "config.json").write_text(json.dumps(config, indent=2))
    for path in checkpoint.root.iterdir():
        if path.suffix == ".json" and path.name not in ("config.json", INDEX):
            shutil.copyfile(path, target / path.name)


def _shards_with(checkpoint: Checkpoint, names: Collection[str]) -> set[str]:
    return {t.shard for t in checkpoint.tensors if t.name in names}


def _only(checkpoint: Checkpoint, shards: Collection[str]) -> Checkpoint:
    return replace(checkpoint, tensors=tuple(t for t in checkpoint.tensors if t.shard in shards))
