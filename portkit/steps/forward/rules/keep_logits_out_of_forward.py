"""`forward` ends at the hidden states."""

from __future__ import annotations

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule


class KeepLogitsOutOfForward(Rule):
    """Return hidden states from `forward`, not logits.

    ## What it does
    Reports a call of the LM head in the causal LM's `forward`.

    ## Why vLLM wants it
    A prompt of 10,000 tokens needs logits for one of them. `forward` returns hidden states for
    all; `compute_logits` gets the rows that matter. `forward` is also what CUDA graphs record.

    ## Example
        def forward(self, input_ids, positions):
            return self.lm_head(self.model(input_ids, positions))

    ## Use instead
        def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
            return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    ## Fix safety
    None: what follows the head (scaling, capping) belongs into compute_logits.

    ## References
    - vLLM guide, Basic model: 2. Make your code compatible with vLLM, Computation Code
    """

    VALID = [
        Valid(
            """
            class ToyForCausalLM(nn.Module):
                def forward(self, input_ids, positions):
                    return self.model(input_ids, positions)
                def compute_logits(self, hidden_states):
                    return self.lm_head(hidden_states)
            """
        ),
        Valid(
            "class ToyHead(nn.Module):\n    def forward(self, x):\n        return self.lm_head(x)\n"
        ),
    ]
    INVALID = [
        Invalid(
            """
            class ToyForCausalLM(nn.Module):
                def forward(self, x):
                    return self.lm_head(self.model(x))
            """,
            line=3,
            names="lm_head",
        ),
        Invalid(
            """
            class ToyForCausalLM(nn.Module):
                def forward(self, x):
                    logits = self.embed_out(self.model(x))
                    return logits
            """,
            line=3,
            names="embed_out",
        ),
    ]

    def visit_Call(self, node: cst.Call) -> None:
        dotted = self.source.dotted(node.func)
        if dotted not in ("self.lm_head", "self.embed_out", "self.output_layer"):
            return
        facts, function = self.source.class_of(node), self.source.function_of(node)
        if (
            facts is not None
            and facts is self.source.top
            and function is not None
            and function.name.value == "forward"
        ):
            self.report(
                node,
                f"`{dotted}` is called in `forward`: return the hidden states there and call it "
                "in compute_logits.",
            )
