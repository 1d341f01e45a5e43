"""Which tensors of a checkpoint Transformers itself ignores: asked of its class, on headers alone.

A tensor is ignored if the model has no place for it and its name matches a pattern of the class or
of a part of it (`_keys_to_ignore_on_load_unexpected`, which some compute from the config). A port
may leave out what Transformers leaves out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import nn
from transformers import AutoConfig

from portkit.analysis.ignored import ATTRIBUTE, POSITIONS
from portkit.live.checkpoint import Checkpoint


def ignored_by(cls: type, checkpoint: Checkpoint, names: Iterable[str] = ()) -> tuple[str, ...]:
    """Return those of `names` (default: all of the checkpoint) that `cls` ignores, in order."""
    config = AutoConfig.from_pretrained(str(checkpoint.root), local_files_only=True)
    with torch.device("meta"):
        model = cls(config)
    pattern = _pattern(model)
    if pattern is None:
        return ()
    places = model.state_dict()
    renamed = _renaming(model, places)
    return tuple(
        name
        for name in names or checkpoint.names
        if (own := renamed(name)) not in places and name not in places and pattern.search(own)
    )


def _pattern(model: nn.Module) -> re.Pattern[str] | None:
    """Every pattern in one, with those that Transformers adds for buffers that used to be saved."""
    patterns = {
        pattern for module in model.modules() for pattern in getattr(module, ATTRIBUTE, None) or ()
    }
    buffers = [name for name, _ in model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.add(POSITIONS)
    return re.compile("|".join(f"({p})" for p in sorted(patterns))) if patterns else None


def _renaming(model: nn.Module, places: dict[str, torch.Tensor]):
    """Return how Transformers renames a tensor of a checkpoint before it looks for its place."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # an older Transformers renames nothing that matters here
        return lambda name: name
    mapping = get_model_conversion_mapping(model)
    plain = [m for m in mapping if isinstance(m, WeightRenaming)]
    merging = [m for m in mapping if not isinstance(m, WeightRenaming)]
    prefix = model.base_model_prefix
    return lambda name: rename_source_key(name, plain, merging, prefix, places)[0]
