"""ALiBi slopes belong to heads, and heads to ranks."""

from __future__ import annotations

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule
from portkit.lint.source import keyword


class SliceAlibiSlopes(Rule):
    """Give `Attention` the ALiBi slopes of this rank's heads.

    ## What it does
    Reports `Attention(alibi_slopes=...)` in a class that splits q, k and v over ranks and never
    asks for its rank.

    ## Why vLLM wants it
    Rank 1 has the second half of the heads and needs the second half of the slopes. With all
    slopes, or the first, rank 0 is right and the others are not.

    ## Example
        self.attn = Attention(self.num_heads, 8, 1.0, alibi_slopes=slopes[: self.num_heads])

    ## Use instead
        first = get_tensor_model_parallel_rank() * self.num_heads
        slopes = slopes[first : first + self.num_heads].tolist()

    ## Fix safety
    None: where the slopes come from differs.

    ## References
    - vllm/model_executor/models/bloom.py
    """

    VALID = [
        Valid(
            """
            class A(nn.Module):
                def __init__(self, slopes):
                    tp_rank = get_tensor_model_parallel_rank()
                    self.qkv_proj = QKVParallelLinear(4, 2, 2)
                    self.attn = Attention(2, 2, 1.0, alibi_slopes=slopes[tp_rank * 2 :])
            """
        ),
        Valid(
            """
            class A(nn.Module):
                def __init__(self, slopes):
                    self.attn = Attention(2, 2, 1.0, alibi_slopes=slopes)
            """
        ),
        Valid(
            """
            class A(nn.Module):
                def __init__(self):
                    self.qkv_proj = QKVParallelLinear(4, 2, 2)
                    self.attn = Attention(2, 2, 1.0)
            """
        ),
    ]
    INVALID = [
        Invalid(
            """
            class A(nn.Module):
                def __init__(self, slopes):
                    self.qkv_proj = QKVParallelLinear(4, 2, 2)
                    self.attn = Attention(2, 2, 1.0, alibi_slopes=slopes)
            """,
            line=4,
            names="slopes",
        ),
        Invalid(
            """
            class A(nn.Module):
                def __init__(self, slopes, n):
                    self.query_key_value = QKVParallelLinear(4, 2, 2)
                    self.attn = Attention(n, 2, 1.0, alibi_slopes=slopes[:n])
            """,
            line=4,
            names="slopes[:n]",
        ),
    ]

    def visit_Module(self, node: cst.Module) -> None:
        for facts, layer in self.source.layers:
            slopes = keyword(layer.call, "alibi_slopes")
            if slopes is None or self.source.vllm_name(layer.call.func) != "Attention":
                continue
            if self.source.code(slopes.value) == "None" or "rank" in facts.text:
                continue
            if any(self.source.vllm_name(o.call.func) == "QKVParallelLinear" for o in facts.layers):
                self.report(
                    layer.call,
                    f"`{layer.attribute}` gets `{self.source.code(slopes.value)}` on every rank: "
                    "slice the slopes to this rank's heads.",
                )
