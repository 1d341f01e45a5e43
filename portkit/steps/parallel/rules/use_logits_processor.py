"""Logits of all ranks are gathered by LogitsProcessor."""

from __future__ import annotations

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule


class UseLogitsProcessor(Rule):
    """Compute logits with `LogitsProcessor`.

    ## What it does
    Reports a `compute_logits` that calls the LM head by itself.

    ## Why vLLM wants it
    Each rank's head gives the logits of its part of the vocabulary, with padding rows.
    `LogitsProcessor` gathers the parts, cuts the padding and applies scale and soft-cap; a
    padding row that gets sampled is a token that does not exist.

    ## Example
        return self.lm_head(hidden_states)

    ## Use instead
        self.logits_processor = LogitsProcessor(config.vocab_size)   # in __init__
        return self.logits_processor(self.lm_head, hidden_states)

    ## Fix safety
    None: the processor must be built in `__init__`, with the model's own scale and soft-cap.

    ## References
    - vLLM guide, Basic model: 3. Implement tensor parallelism and quantization support
    - vllm/model_executor/layers/logits_processor.py
    """

    VALID = [
        Valid(
            """
            class T(nn.Module):
                def compute_logits(self, hidden_states):
                    return self.logits_processor(self.lm_head, hidden_states)
            """
        ),
        Valid(
            """
            class T(nn.Module):
                def compute_logits(self, hidden_states):
                    return self.logits_processor(self.decoder, self.lm_head(hidden_states))
            """
        ),
        Valid("class T(nn.Module):\n    def forward(self, x):\n        return self.lm_head(x)\n"),
    ]
    INVALID = [
        Invalid(
            """
            class T(nn.Module):
                def compute_logits(self, hidden_states):
                    return self.lm_head(hidden_states)
            """,
            line=3,
            names="lm_head",
        ),
        Invalid(
            """
            class T(nn.Module):
                def compute_logits(self, hidden_states):
                    return nn.functional.linear(hidden_states, self.lm_head.weight)
            """,
            line=3,
            names="lm_head",
        ),
    ]

    def visit_Call(self, node: cst.Call) -> None:
        function = self.source.function_of(node)
        if function is None or function.name.value != "compute_logits":
            return
        dotted = self.source.dotted(node.func)
        by_hand = dotted.endswith((".linear", ".matmul")) and "lm_head" in self.source.code(node)
        if self._feeds_the_processor(node):
            return
        if dotted in ("self.lm_head", "self.embed_out") or by_hand:
            self.report(
                node,
                f"`{self.source.code(node)}` gives one rank's logits, padding included: call "
                "`self.logits_processor(self.lm_head, hidden_states)`.",
            )

    def _feeds_the_processor(self, node: cst.Call) -> bool:
        """Is it a prediction head, a module before the projection to the vocabulary?"""
        return any(
            isinstance(outer, cst.Call)
            and self.source.dotted(outer.func).endswith("logits_processor")
            and any(argument.value is node for argument in outer.args[1:2])
            for outer in self.source.ancestors(node)
        )
