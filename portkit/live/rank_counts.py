"""Which numbers of tensor-parallel ranks a model allows, from its config alone, in words.

What must divide: vLLM gives each rank whole query heads, whole KV heads (or a copy of one), equal
slices of the MLP, whole groups of a Mamba 2 layer (or a copy of the only one), whole heads of a
gated delta net, and equal parts of a vocabulary padded to a multiple of 64
(docs/contributing/model/basic.md, step 3; layers/linear.py; layers/mamba/mamba_mixer2.py;
layers/mamba/gdn; layers/vocab_parallel_embedding.py).
Imports neither torch nor vLLM.
"""

from __future__ import annotations

from typing import Any

HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")
INTERMEDIATE = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff")
GROUPS = ("n_groups", "mamba_n_groups", "mamba_ngroups")
LINEAR_HEADS = ("linear_num_key_heads", "linear_num_value_heads")
PADDING = 64
"""DEFAULT_VOCAB_PADDING_SIZE of vLLM's vocab_parallel_embedding.py."""


def refusal(config: dict[str, Any], ranks: int) -> str:
    """Return why a model of this config cannot run on `ranks` ranks, or ""."""
    config = {**config, **(config.get("text_config") or {})}
    if ranks < 1:
        return f"{ranks} is no number of ranks."
    heads = _first(config, HEADS)
    if heads and heads % ranks:
        return (
            f"its {heads} query heads cannot be shared evenly by {ranks} ranks ({heads} / "
            f"{ranks} is "
            "not whole)"
        )
    kv = _first(config, KV_HEADS)
    if kv and kv % ranks and ranks % kv:
        return (
            f"its {kv} KV heads can neither be shared evenly by {ranks} ranks nor be copied to "
            f"them "
            f"an equal number of times"
        )
    width = _first(config, INTERMEDIATE)
    if width and width % ranks:
        return f"the MLP's width of {width} (intermediate_size) is not divisible by {ranks}"
    groups = _first(config, GROUPS)
    if groups and groups > 1 and groups % ranks:
        return (
            f"the {groups} groups of its state-space layers cannot be shared evenly by {ranks} "
            f"ranks, and only a single one is copied"
        )
    for name in LINEAR_HEADS:
        linear = config.get(name)
        if isinstance(linear, int) and linear % ranks:
            return (
                f"the {linear} heads of its linear attention ({name}) cannot be shared evenly by "
                f"{ranks} ranks"
            )
    vocab = config.get("vocab_size")
    if isinstance(vocab, int):
        padded = -(-vocab // PADDING) * PADDING
        if padded % ranks:
            return (
                f"the vocabulary of {vocab}, padded to {padded} rows, is not divisible by {ranks}"
            )
    return ""


def possible(config: dict[str, Any], up_to: int = 8) -> tuple[int, ...]:
    """Return the rank counts up to `up_to` that the config allows."""
    return tuple(n for n in range(1, up_to + 1) if not refusal(config, n))


def _first(config: dict[str, Any], names: tuple[str, ...]) -> int | None:
    return next((config[n] for n in names if isinstance(config.get(n), int)), None)
