"""Rotary embedding is a vLLM layer that takes flat positions."""

from __future__ import annotations

import re

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule

HELPERS = re.compile(
    r"^(apply_(multimodal_)?rotary_(pos_)?emb\w*|rotate_half|rotate_every_two|create_sinusoidal_positions|"
    r"dynamic_rope_update)$"
)


class UseGetRope(Rule):
    """Rotate queries and keys with `get_rope`.

    ## What it does
    Reports own rotary code: `rotate_half`, `apply_rotary_pos_emb` and classes that compute
    `inv_freq`. Helpers report once where they are defined and once at each call in a class.

    ## Why vLLM wants it
    `get_rope` takes positions of shape [num_tokens], caches cos and sin, shares one table between
    layers, and runs a fused kernel. Code that expects [batch, sequence] positions does not fit.

    ## Example
        query, key = apply_rotary_pos_emb(query, key, cos, sin)

    ## Use instead
        self.rotary_emb = get_rope(self.head_dim, max_position=config.max_position_embeddings,
                                   rope_parameters=config.rope_parameters, is_neox_style=...)
        q, k = self.rotary_emb(positions, q, k)

    ## Fix safety
    None: the layout (`is_neox_style`) must be read off the code that goes.

    ## References
    - vllm/model_executor/layers/rotary_embedding
    """

    VALID = [
        Valid(
            """
            class ToyAttention(nn.Module):
                def forward(self, positions, q, k):
                    return self.rotary_emb(positions, q, k)
            """
        ),
        Valid(
            """
            class A(nn.Module):
                def forward(self, x):
                    return self.apply_rotary_emb(x)
            """
        ),
        Valid("class ToyRotaryEmbedding(RotaryEmbedding):\n    pass\n"),
    ]
    INVALID = [
        Invalid("def rotate_half(x):\n    return x\n", line=1, names="rotate_half"),
        Invalid(
            """
            class ToyAttention(nn.Module):
                def forward(self, q, k, cos, sin):
                    return apply_rotary_pos_emb(q, k, cos, sin)
            """,
            line=3,
            names="apply_rotary_pos_emb",
        ),
        Invalid(
            """
            class ToyRotaryEmbedding(nn.Module):
                def __init__(self, f):
                    self.inv_freq = nn.Buffer(f)
            """,
            line=1,
            names="ToyRotaryEmbedding",
        ),
    ]

    def visit_FunctionDef(self, node: cst.FunctionDef) -> None:
        if HELPERS.match(node.name.value):
            self.report(node, f"`{node.name.value}` rotates by hand: get_rope's layer replaces it.")

    def visit_ClassDef(self, node: cst.ClassDef) -> None:
        facts = self.source.classes.get(node.name.value)
        if (
            facts is not None
            and facts.node is node
            and re.search(r"\binv_freq\b", facts.text)
            and ("torch.nn.Module" in facts.bases and "Rotary" in facts.name)
        ):
            self.report(
                node,
                f"`{facts.name}` computes cos and sin by itself: get_rope's layer replaces it.",
            )

    def visit_Call(self, node: cst.Call) -> None:
        facts = self.source.class_of(node)
        dotted = self.source.dotted(node.func)
        name = dotted.rpartition(".")[2]
        if facts is not None and HELPERS.match(name) and not dotted.startswith(("self.", "vllm.")):
            self.report(
                node,
                f"`{name}` rotates by hand in `{facts.name}`: write `q, k = "
                "self.rotary_emb(positions, q, k)` "
                "with a layer from get_rope.",
            )
