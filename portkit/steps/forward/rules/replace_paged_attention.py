"""The older guide's attention classes have one successor."""

from __future__ import annotations

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule

TODAY = {
    "PagedAttention": "`Attention`",
    "PagedAttentionWithRoPE": "`get_rope` and `Attention`: rotate q and k, then attend",
    "PagedAttentionWithALiBi": "`Attention(..., alibi_slopes=...)`",
}


class ReplacePagedAttention(Rule):
    """Use `Attention` for what older guides call `PagedAttention`.

    ## What it does
    Reports `PagedAttention`, `PagedAttentionWithRoPE` and `PagedAttentionWithALiBi` where they
    are imported or called.

    ## Why vLLM wants it
    The classes are gone. `Attention` takes queries, keys and values as [num_tokens, heads *
    head_dim] and no cache; rotation is `get_rope`'s, ALiBi an argument.

    ## Example
        self.attn = PagedAttentionWithRoPE(self.num_heads, 64, self.scaling, rotary_dim=64)

    ## Use instead
        self.rotary_emb = get_rope(self.head_dim, max_position=4096, rope_parameters=parameters)
        self.attn = Attention(self.num_heads, self.head_dim, self.scaling, prefix=f"{prefix}.attn")

    ## Fix safety
    None: arguments and call have changed.

    ## References
    - vLLM guide, Basic model: 2. Make your code compatible with vLLM
    - vllm/model_executor/layers/attention
    """

    VALID = [
        Valid("from vllm.model_executor.layers.attention import Attention\n"),
        Valid("attn = Attention(4, 8, 1.0, alibi_slopes=slopes)\n"),
    ]
    INVALID = [
        Invalid(
            "attn = PagedAttentionWithALiBi(4, 8, 1.0, slopes)\n",
            line=1,
            names="PagedAttentionWithALiBi",
        ),
        Invalid(
            """
            from vllm.model_executor.layers.attention import PagedAttentionWithRoPE
            attn = PagedAttentionWithRoPE(4, 8, 1.0)
            """,
            line=1,
            count=2,
            names="PagedAttentionWithRoPE",
        ),
        Invalid("attn = PagedAttention(4, 8, 1.0)\n", line=1, names="PagedAttention"),
    ]

    def visit_Call(self, node: cst.Call) -> None:
        self._say(node, self.source.vllm_name(node.func))

    def visit_ImportAlias(self, node: cst.ImportAlias) -> None:
        self._say(node, node.evaluated_name)

    def _say(self, node: cst.CSTNode, name: str) -> None:
        if name in TODAY:
            self.report(node, f"`{name}` is an older vLLM's name: today it is {TODAY[name]}.")
