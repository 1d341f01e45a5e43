"""Attention over the paged KV cache is vLLM's layer, not a matrix product."""

from __future__ import annotations

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule

DEFINITIONS = frozenset({"eager_attention_forward", "repeat_kv"})
CALLS = frozenset(
    {
        "eager_attention_forward",
        "repeat_kv",
        "scaled_dot_product_attention",
        "flash_attn_func",
        "flash_attn_varlen_func",
        "_flash_attention_forward",
        "flex_attention",
    }
)


class UseVllmAttention(Rule):
    """Compute attention with vLLM's `Attention` layer.

    ## What it does
    Reports Transformers' attention interface (`ALL_ATTENTION_FUNCTIONS`,
    `eager_attention_forward`, `repeat_kv`), direct kernels (`scaled_dot_product_attention`,
    FlashAttention) and a softmax in an attention class that has no `Attention` layer.

    ## Why vLLM wants it
    Keys and values of past tokens lie in pages that only `Attention` can read. It also repeats
    KV heads, masks, scales and picks the kernel for the machine.

    ## Example
        attn_output, _ = attention_interface(self, query, key, value, attention_mask)

    ## Use instead
        self.attn = Attention(self.num_heads, self.head_dim, self.scaling,
                              num_kv_heads=self.num_kv_heads, cache_config=cache_config,
                              prefix=f"{prefix}.attn")
        attn_output = self.attn(q, k, v)

    ## Fix safety
    None: scale, soft-cap, window and ALiBi must be carried over by hand.

    ## References
    - vLLM guide, Basic model: 2. Make your code compatible with vLLM
    - vllm/model_executor/layers/attention
    """

    VALID = [
        Valid(
            """
            class ToyAttention(nn.Module):
                def __init__(self, prefix):
                    self.attn = Attention(4, 8, 1.0, prefix=f"{prefix}.attn")
                def forward(self, q, k, v):
                    return self.attn(q, k, v)
            """
        ),
        Valid(
            """
            class ToyRouter(nn.Module):
                def forward(self, x):
                    return torch.softmax(x, -1)
            """
        ),
    ]
    INVALID = [
        Invalid(
            """
            class ToyAttention(nn.Module):
                def forward(self, q, k, v):
                    return F.scaled_dot_product_attention(q, k, v)
            """,
            line=3,
            names="scaled_dot_product_attention",
        ),
        Invalid(
            """
            def repeat_kv(x, n):
                return x

            class ToyAttention(nn.Module):
                def forward(self, q, k, v):
                    interface = ALL_ATTENTION_FUNCTIONS["sdpa"]
                    return interface(self, q, k, v)
            """,
            line=1,
            count=2,
            names="repeat_kv",
        ),
        Invalid(
            """
            class ToyAttention(nn.Module):
                def forward(self, q, k, v):
                    return nn.functional.softmax(q @ k, dim=-1) @ v
            """,
            line=3,
            names="softmax",
        ),
    ]

    def visit_FunctionDef(self, node: cst.FunctionDef) -> None:
        if node.name.value in DEFINITIONS and self.source.class_of(node) is None:
            self.report(
                node,
                f"`{node.name.value}` is Transformers' own attention: vLLM's Attention "
                "replaces it.",
            )

    def visit_Call(self, node: cst.Call) -> None:
        facts = self.source.class_of(node)
        if facts is None:
            return
        name = self.source.dotted(node.func).rpartition(".")[2]
        if name in CALLS:
            self.report(
                node,
                f"`{name}` cannot see the paged KV cache: call vLLM's Attention layer instead.",
            )
        elif (
            name == "softmax"
            and "Attention" in facts.name
            and "Attention(" not in facts.text.partition("\n")[2]
        ):
            self.report(
                node,
                f"`softmax` in `{facts.name}` computes attention by hand: vLLM's Attention "
                "layer does it over the paged KV cache.",
            )

    def visit_Name(self, node: cst.Name) -> None:
        if node.value == "ALL_ATTENTION_FUNCTIONS" and self.source.class_of(node) is not None:
            self.report(
                node,
                "`ALL_ATTENTION_FUNCTIONS` is Transformers' choice of kernels: vLLM's Attention "
                "layer chooses its own and reads the paged KV cache.",
            )
