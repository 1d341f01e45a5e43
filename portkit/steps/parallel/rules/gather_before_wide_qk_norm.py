"""A norm over all heads needs all heads."""

from __future__ import annotations

import re

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule


class GatherBeforeWideQkNorm(Rule):
    """Gather q and k from all ranks before a norm over the whole projection.

    ## What it does
    Reports a `q_norm` or `k_norm` over `heads * head_dim` in a class that splits q, k and v over
    ranks and never gathers.

    ## Why vLLM wants it
    The mean square runs over all heads. A rank that has half of them computes another mean: TP=1
    is right, TP=2 is off by little enough to look fluent. (A norm per head needs no gathering.)

    ## Example
        self.q_norm = RMSNorm(self.num_heads * self.head_dim)

    ## Use instead
        q = self.q_norm(tensor_model_parallel_all_gather(q.contiguous()))
        q = split_tensor_along_last_dim(q, tp_size)[tp_rank]

    ## Fix safety
    None: see `_apply_qk_norm` in vLLM's olmoe.py.

    ## References
    - vllm/model_executor/models/olmoe.py; vLLM issue 18706
    """

    VALID = [
        Valid(
            """
            class A(nn.Module):
                def __init__(self):
                    self.qkv_proj = QKVParallelLinear(4, 2, 2)
                    self.q_norm = RMSNorm(self.head_dim)
            """
        ),
        Valid(
            """
            class A(nn.Module):
                def __init__(self):
                    self.qkv_proj = QKVParallelLinear(4, 2, 2)
                    self.q_norm = RMSNorm(self.total_num_heads * self.head_dim)
                def forward(self, q):
                    return self.q_norm(tensor_model_parallel_all_gather(q))
            """
        ),
    ]
    INVALID = [
        Invalid(
            """
            class A(nn.Module):
                def __init__(self):
                    self.qkv_proj = QKVParallelLinear(4, 2, 2)
                    self.q_norm = RMSNorm(self.num_heads * self.head_dim)
            """,
            line=4,
            names="q_norm",
        ),
        Invalid(
            """
            class A(nn.Module):
                def __init__(self):
                    self.qkv_proj = QKVParallelLinear(4, 2, 2)
                    self.k_norm = RMSNorm(self.total_num_kv_heads * self.head_dim, eps=1e-5)
            """,
            line=4,
            names="k_norm",
        ),
    ]

    def visit_Module(self, node: cst.Module) -> None:
        for facts, layer in self.source.layers:
            if (
                layer.attribute not in ("q_norm", "k_norm", "q_layernorm", "k_layernorm")
                or not layer.call.args
            ):
                continue
            if layer.name not in ("RMSNorm", "LayerNorm", "GemmaRMSNorm"):
                continue  # a class of its own may reduce over ranks by itself
            width = self.source.code(layer.call.args[0].value)
            if not re.search(r"heads\s*\*|\*\s*\S*heads", width) or "gather" in facts.text:
                continue
            if any(
                self.source.vllm_name(o.call.func) in ("QKVParallelLinear", "ColumnParallelLinear")
                for o in facts.layers
            ):
                self.report(
                    layer.call,
                    f"`{layer.attribute}` normalises over {width}, but each rank has a part of the "
                    "heads: all-gather before it, and take this rank's part after.",
                )
