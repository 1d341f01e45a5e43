"""Arguments that the engine has taken over do not belong in `forward`."""

from __future__ import annotations

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule

CACHE = "the engine keeps the KV cache and binds it to each Attention layer"
MASK = "Attention masks by the engine's metadata: sequences are concatenated, not padded"
TRAIN = "vLLM never trains"
OUTPUT = "forward returns hidden states only"

WHY = {
    "attention_mask": MASK,
    "head_mask": MASK,
    "causal_mask": MASK,
    "causal_mask_mapping": MASK,
    "encoder_attention_mask": MASK,
    "layer_head_mask": MASK,
    "past_key_values": CACHE,
    "past_key_value": CACHE,
    "layer_past": CACHE,
    "use_cache": CACHE,
    "cache_position": CACHE,
    "past_states": CACHE,
    "labels": TRAIN,
    "num_items_in_batch": TRAIN,
    "loss_kwargs": TRAIN,
    "output_attentions": OUTPUT,
    "output_hidden_states": OUTPUT,
    "output_router_logits": OUTPUT,
    "return_dict": OUTPUT,
    "logits_to_keep": "compute_logits gets only the tokens to sample from",
    "num_logits_to_keep": "compute_logits gets only the tokens to sample from",
    "position_embeddings": "get_rope's layer computes cos and sin from `positions` by itself",
}


class DropHfArguments(Rule):
    """Drop arguments that the engine handles: masks, caches, labels, output switches.

    ## What it does
    Reports such parameters of every `forward` in the file, one finding each.

    ## Why vLLM wants it
    vLLM calls `forward` with flat `input_ids` and `positions`. The KV cache lives in pages that
    the engine owns; masks follow from its metadata. An argument left over is never passed, and
    the code behind it is dead or, worse, half alive.

    ## Example
        def forward(self, hidden_states, attention_mask=None, past_key_values=None): ...

    ## Use instead
        def forward(self, positions, hidden_states): ...

    ## Fix safety
    None: the code that used the argument must go with it.

    ## References
    - vLLM guide, Basic model: 2. Make your code compatible with vLLM, Computation Code
    """

    VALID = [
        Valid("class A(nn.Module):\n    def forward(self, positions, hidden_states): ...\n"),
        Valid("def build(attention_mask): ...\n"),
    ]
    INVALID = [
        Invalid(
            "class A(nn.Module):\n    def forward(self, x, attention_mask=None): ...\n",
            line=2,
            names="attention_mask",
        ),
        Invalid(
            """
            class A(nn.Module):
                def forward(
                    self,
                    input_ids,
                    past_key_values=None,
                    labels=None,
                ): ...
            """,
            line=5,
            count=2,
            names="past_key_values",
        ),
    ]

    def visit_Param(self, node: cst.Param) -> None:
        reason = WHY.get(node.name.value)
        if reason is None:
            return
        function = self.source.function_of(node)
        if function is not None and function.name.value == "forward" and self.source.class_of(node):
            self.report(
                node,
                f"`forward` still takes `{node.name.value}`: drop it and what it feeds; {reason}.",
            )
