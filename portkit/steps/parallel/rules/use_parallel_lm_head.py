"""The LM head is split over ranks along the vocabulary."""

from __future__ import annotations

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule


class UseParallelLmHead(Rule):
    """Replace the LM head by `ParallelLMHead`.

    ## What it does
    Reports an LM head that is a plain `nn.Linear`: by its name, or by its output over the
    vocabulary.

    ## Why vLLM wants it
    Each rank computes the logits of its part of the (padded) vocabulary; `LogitsProcessor`
    gathers them and cuts the padding off. Tied heads share the embedding by `tie_weights`.
    Mind the order of the arguments: vocabulary first, as in an embedding.

    ## Example
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    ## Use instead
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size,
                                      quant_config=quant_config,
                                      prefix=maybe_prefix(prefix, "lm_head"))

    ## Fix safety
    None: compute_logits changes with it, and tying is by `self.lm_head.tie_weights(...)`.

    ## References
    - vLLM guide, Basic model: 3. Implement tensor parallelism and quantization support
    - vllm/model_executor/layers/vocab_parallel_embedding.py
    """

    VALID = [
        Valid(
            """
            class ToyForCausalLM(nn.Module):
                def __init__(self):
                    self.lm_head = ParallelLMHead(8, 4)
            """
        ),
        Valid(
            """
            class ToyMLP(nn.Module):
                def __init__(self):
                    self.fc2 = nn.Linear(8, 4)
            """
        ),
    ]
    INVALID = [
        Invalid(
            """
            class ToyForCausalLM(nn.Module):
                def __init__(self):
                    self.lm_head = nn.Linear(4, 8, bias=False)
            """,
            line=3,
            names="lm_head",
        ),
        Invalid(
            """
            class ToyForCausalLM(nn.Module):
                def __init__(self, c):
                    self.out = nn.Linear(4, c.vocab_size)
            """,
            line=3,
            names="out",
        ),
    ]

    def visit_Module(self, node: cst.Module) -> None:
        for _, layer in self.source.layers:
            if layer.dotted != "torch.nn.Linear":
                continue
            over_vocabulary = any(
                "vocab_size" in self.source.code(a.value) for a in layer.call.args[:2]
            )
            if layer.attribute in ("lm_head", "embed_out") or over_vocabulary:
                self.report(
                    layer.call,
                    f"`{layer.attribute}` is a plain nn.Linear: use ParallelLMHead(vocab_size, "
                    "hidden_size, ...), which splits the vocabulary over ranks.",
                )
