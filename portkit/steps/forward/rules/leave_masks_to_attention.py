"""The model makes no mask: Attention and the engine's metadata do."""

from __future__ import annotations

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule

MASK_MAKERS = frozenset(
    {
        "create_causal_mask",
        "create_sliding_window_causal_mask",
        "create_chunked_causal_mask",
        "create_masks_for_generate",
        "create_bidirectional_mask",
        "_prepare_4d_causal_attention_mask",
        "_prepare_4d_causal_attention_mask_for_sdpa",
        "_prepare_decoder_attention_mask",
        "_update_causal_mask",
        "_prepare_4d_causal_attention_mask_with_cache_position",
        "AttentionMaskConverter",
        "triu",
        "tril",
        "triu_",
        "tril_",
        "get_mask",
    }
)


class LeaveMasksToAttention(Rule):
    """Make no causal mask in the model.

    ## What it does
    Reports calls that build attention masks: `create_causal_mask` and its relatives, `torch.triu`
    and `torch.tril` inside a class, and methods of that purpose.

    ## Why vLLM wants it
    The tokens of many sequences come in one flat tensor; which may see which stands in the
    engine's metadata. A mask built from shapes would let requests read each other. A sliding
    window is an argument of Attention (`per_layer_sliding_window`), ALiBi too (`alibi_slopes`).

    ## Example
        causal_mask = create_causal_mask(config=self.config, inputs_embeds=x, ...)

    ## Use instead
        attn_output = self.attn(q, k, v)

    ## Fix safety
    None: check first whether the mask holds more than causality (a window, a prefix).

    ## References
    - vLLM guide, Basic model: 2. Make your code compatible with vLLM; FAQ (interleaving windows)
    """

    VALID = [
        Valid(
            """
            class ToyModel(nn.Module):
                def forward(self, x):
                    return self.attn(x, x, x)
            """
        ),
        Valid("from transformers.masking_utils import create_causal_mask\n"),
    ]
    INVALID = [
        Invalid(
            """
            class ToyModel(nn.Module):
                def forward(self, x):
                    return create_causal_mask(config=self.config, inputs_embeds=x)
            """,
            line=3,
            names="create_causal_mask",
        ),
        Invalid(
            """
            class ToyAttention(nn.Module):
                def __init__(self, n):
                    self.bias = torch.tril(torch.ones(n, n))
            """,
            line=3,
            names="tril",
        ),
        Invalid(
            """
            class ToyModel(nn.Module):
                def forward(self, x):
                    x = self._update_causal_mask(x)
            """,
            line=3,
            names="_update_causal_mask",
        ),
    ]

    def visit_Call(self, node: cst.Call) -> None:
        name = self.source.dotted(node.func).rpartition(".")[2]
        if name in MASK_MAKERS and self.source.class_of(node) is not None:
            self.report(
                node,
                f"`{name}` builds a mask in the model: vLLM's Attention masks by itself; "
                "delete it (a window or ALiBi becomes an argument of Attention).",
            )
