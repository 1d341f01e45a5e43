"""What one rank holds: bytes, heads, rows of the vocabulary. Runs inside the ranks."""

from __future__ import annotations

from typing import Any

from torch import nn
from vllm.distributed import get_pp_group, get_tp_group
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding


def sizes(model: nn.Module) -> dict[str, Any]:
    """Return this rank's share: `Engine.on_model` calls it on each rank.

    A weight that two modules share (a tied head) counts once, as it takes memory once.
    """
    own = {id(p): p for p in model.parameters()}
    attentions = [m for m in model.modules() if isinstance(m, Attention)]
    qkv = [m for m in model.modules() if isinstance(m, QKVParallelLinear)]
    rows = [m for m in model.modules() if isinstance(m, RowParallelLinear)]
    vocabulary = [m for m in model.modules() if isinstance(m, VocabParallelEmbedding)]
    return {
        "rank": get_tp_group().rank_in_group,
        "stage": get_pp_group().rank_in_group,
        "bytes": sum(p.numel() * p.element_size() for p in own.values()),
        "attentions": len(attentions),
        "heads": max((m.num_heads for m in attentions), default=0),
        "kv_heads": max((m.num_kv_heads for m in attentions), default=0),
        "kv_copies": max((m.num_kv_head_replicas for m in qkv), default=1),
        "vocab_rows": max((m.num_embeddings_per_partition for m in vocabulary), default=0),
        "vocab_padding": max(
            (m.num_embeddings_padded - m.org_vocab_size for m in vocabulary), default=0
        ),
        # vLLM's own layer adds it on the first rank alone, since the sum over ranks follows.
        "summed_biases": sum(m.bias is not None for m in rows),
    }
