"""Which layers of the checkpoint each fused layer of the port holds.

`packed_modules_mapping` says it; where it is silent, the port's own weights mapper does, so that a
missing entry does not look like a missing layer: that it is missing is for the check `prefixes`.
"""

from __future__ import annotations

from typing import Any

ORDER = ("q", "k", "v")


def fused_parts(model: Any) -> dict[str, list[str]]:
    """Return attribute name -> names of its parts, in order; `model` is a model or its class.

    Where the two name the same parts in another order, the mapper's counts: it loads them.
    """
    declared = dict(getattr(model, "packed_modules_mapping", None) or {})
    stacked = {
        name: parts
        for name, parts in stacked_parts(model).items()
        if sorted(parts) == sorted(declared.get(name, parts))
    }
    return declared | stacked


def stacked_parts(model: Any) -> dict[str, list[str]]:
    """Return the same by the port's weights mapper alone: parts in the order of their shard ids."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    parts: dict[str, list[tuple[Any, str]]] = {}
    for old, (new, shard) in (getattr(mapper, "orig_to_new_stacked", None) or {}).items():
        name = new.strip(".").rpartition(".")[2]
        if isinstance(shard, int | str):
            parts.setdefault(name, []).append((shard, old.strip(".").rpartition(".")[2]))
    return {
        name: [part for _, part in sorted(members, key=lambda m: _place(m[0]))]
        for name, members in parts.items()
    }


def _place(shard: int | str) -> int:
    return ORDER.index(shard) if shard in ORDER else int(shard) if str(shard).isdigit() else 99
