"""The token embedding is split over ranks along the vocabulary."""

from __future__ import annotations

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule
from portkit.lint.source import Layer

HOME = "vllm.model_executor.layers.vocab_parallel_embedding"


class UseVocabParallelEmbedding(Rule):
    """Replace the token embedding by `VocabParallelEmbedding`.

    ## What it does
    Reports `nn.Embedding` over the vocabulary. Position embeddings stay as they are: each rank
    needs all of them.

    ## Why vLLM wants it
    Each rank holds a part of the vocabulary (padded so that it divides); the layer masks foreign
    tokens and sums over ranks. A head tied to the embedding needs it to be of this class.

    ## Example
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)

    ## Use instead
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)

    ## Fix safety
    Unsafe: `padding_idx` is dropped (it matters in training only), and a subclass of
    `nn.Embedding` that scales its output must be looked at.

    ## References
    - vLLM guide, Basic model: 3. Implement tensor parallelism and quantization support
    - vllm/model_executor/layers/vocab_parallel_embedding.py
    """

    fix_safety = "unsafe"

    VALID = [
        Valid(
            """
            class A(nn.Module):
                def __init__(self, c):
                    self.embed_tokens = VocabParallelEmbedding(c.vocab_size, 4)
            """
        ),
        Valid(
            """
            class A(nn.Module):
                def __init__(self, c):
                    self.wpe = nn.Embedding(c.n_positions, 4)
            """
        ),
    ]
    INVALID = [
        Invalid(
            """
            from torch import nn

            class A(nn.Module):
                def __init__(self, config):
                    self.embed_tokens = nn.Embedding(config.vocab_size, 4, self.padding_idx)
            """,
            line=5,
            names="embed_tokens",
            fixed=f"""
            from torch import nn
            from {HOME} import VocabParallelEmbedding

            class A(nn.Module):
                def __init__(self, config):
                    self.embed_tokens = VocabParallelEmbedding(config.vocab_size, 4)
            """,
        ),
        Invalid(
            """
            class A(nn.Module):
                def __init__(self, n):
                    self.wte = nn.Embedding(n, 4, padding_idx=0)
            """,
            line=3,
            names="wte",
            fixed=f"from {HOME} import VocabParallelEmbedding\n"
            "class A(nn.Module):\n    def __init__(self, n):\n        self.wte = "
            "VocabParallelEmbedding(n, 4)\n",
        ),
    ]

    def visit_Module(self, node: cst.Module) -> None:
        for _, layer in self.source.layers:
            if layer.dotted == "torch.nn.Embedding" and self._is_vocabulary(layer):
                args = [
                    a.with_changes(comma=cst.MaybeSentinel.DEFAULT)
                    for i, a in enumerate(layer.call.args)
                    if (i < 2 if a.keyword is None else a.keyword.value != "padding_idx")
                ]
                self.report(
                    layer.call,
                    f"`{layer.attribute}` is a plain nn.Embedding over the vocabulary: use "
                    "VocabParallelEmbedding, which splits it over ranks.",
                    replacement=layer.call.with_changes(
                        func=cst.Name("VocabParallelEmbedding"), args=args
                    ),
                    imports=((HOME, "VocabParallelEmbedding"),),
                )

    def _is_vocabulary(self, layer: Layer) -> bool:
        first = self.source.code(layer.call.args[0].value) if layer.call.args else ""
        return "vocab_size" in first or layer.attribute in (
            "embed_tokens",
            "wte",
            "word_embeddings",
            "embed_in",
        )
