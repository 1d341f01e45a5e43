"""Outputs are tensors, not Transformers' output objects."""

from __future__ import annotations

import re

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule

OUTPUT = re.compile(
    r"^\w*(ModelOutput|OutputWithPast|OutputWithPastAndCrossAttentions|LMOutput\w*)$"
)


class ReturnPlainTensors(Rule):
    """Return tensors, not Transformers' output objects.

    ## What it does
    Reports calls of output classes such as `BaseModelOutputWithPast`.

    ## Why vLLM wants it
    The engine indexes what `forward` returns as one tensor of hidden states, [num_tokens,
    hidden]; pipeline ranks but the last return `IntermediateTensors`.

    ## Example
        return BaseModelOutputWithPast(last_hidden_state=hidden_states)

    ## Use instead
        return hidden_states

    ## Fix safety
    None: callers read attributes of the object.

    ## References
    - vLLM guide, Basic model: 2. Make your code compatible with vLLM, Computation Code
    """

    VALID = [
        Valid("def forward(x):\n    return x\n"),
        Valid("def forward(x):\n    return IntermediateTensors({'hidden_states': x})\n"),
    ]
    INVALID = [
        Invalid(
            "def forward(x):\n    return BaseModelOutputWithPast(last_hidden_state=x)\n",
            line=2,
            names="BaseModelOutputWithPast",
        ),
        Invalid(
            "def forward(x):\n    return CausalLMOutputWithPast(logits=x)\n",
            line=2,
            names="CausalLMOutputWithPast",
        ),
    ]

    def visit_Call(self, node: cst.Call) -> None:
        name = self.source.dotted(node.func).rpartition(".")[2]
        if OUTPUT.match(name):
            self.report(
                node, f"`{name}` wraps the result: vLLM wants the tensor of hidden states itself."
            )
