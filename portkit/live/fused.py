"""Which layers of the checkpoint each fused layer of the port holds.

`packed_modules_mapping` says it; where it is silent, the port's own weights mapper does, so that a
missing entry does not look like a missing layer: that it is missing is for the check `prefixes`.
"""

from __future__ import annotations

from typing import Any

ORDER = ("q", "k", "v")


def fused_parts(model: Any) -> dict[str, list[str]]:
    """Return attribute name -> names of its parts, in order; `model` is a model or its class."""
    declared = dict(getattr(model, "packed_modules_mapping", None) or {})
    return stacked_parts(model) | declared


def disputed(packed: dict[str, list[str]], stacked: dict[str, list[str]]) -> list[str]:
    """Return the attributes whose parts the two name in different orders: one of them is wrong."""
    return [
        name
        for name, parts in stacked.items()
        if parts != packed.get(name, parts) and sorted(parts) == sorted(packed[name])
    ]


def stacked_parts(model: Any) -> dict[str, list[str]]:
    """Return the same by the port's weights mapper alone: parts in the order of their shard ids."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    parts: dict[str, list[tuple[Any, str]]] = {}
    for old, (new, shard) in (getattr(mapper, "orig_to_new_stacked", None) or {}).items():
        name = new.strip(".").rpartition(".")[2]
        shard = min(shard) if isinstance(shard, tuple) else shard  # several shards in one tensor
        if isinstance(shard, int | str):
            part = (shard, old.strip(".").rpartition(".")[2])
            if part not in parts.setdefault(name, []):  # an MLP's, and those of shared experts
                parts[name].append(part)
    return {
        name: [part for _, part in sorted(members, key=lambda m: _place(m[0]))]
        for name, members in parts.items()
    }


def _place(shard: int | str) -> int:
    return ORDER.index(shard) if shard in ORDER else int(shard) if str(shard).isdigit() else 99
