"""vLLM passes the inputs of `forward` by keyword, under fixed names."""

from __future__ import annotations

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule
from portkit.lint.source import ClassFacts, parameters, takes_kwargs

TOP = {
    "input_ids": "the tokens, [num_tokens]; vLLM refuses a model without it",
    "positions": "where each token stands, [num_tokens]; vLLM refuses a model without it",
    "intermediate_tensors": "what the pipeline rank before this one sends, else None",
    "inputs_embeds": "embeddings instead of tokens, [num_tokens, hidden], else None",
}
BACKBONE = ("intermediate_tensors", "inputs_embeds")


class NameForwardInputs(Rule):
    """Name the inputs of `forward` as vLLM passes them.

    ## What it does
    Reports each of `input_ids`, `positions`, `intermediate_tensors`, `inputs_embeds` that the
    causal LM's `forward` lacks, and the last two on the model inside it.

    ## Why vLLM wants it
    The runner calls `model(input_ids=..., positions=..., intermediate_tensors=...,
    inputs_embeds=...)`, and before that inspects the signature: without `input_ids` and
    `positions` the class is not taken for a vLLM model at all.

    ## Example
        def forward(self, input_ids, position_ids=None): ...

    ## Use instead
        def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None): ...

    ## Fix safety
    None: the body must use what it is given.

    ## References
    - vLLM guide, Basic model: 2. Make your code compatible with vLLM, Computation Code
    - vllm/model_executor/models/interfaces_base.py
    """

    VALID = [
        Valid(
            """
            class ToyModel(nn.Module):
                def forward(self, ids, position_ids, intermediate_tensors, inputs_embeds=None): ...

            class ToyForCausalLM(nn.Module):
                def forward(
                    self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None
                ): ...
            """
        ),
        Valid("class ToyForCausalLM(LlamaForCausalLM):\n    pass\n"),
        Valid(
            """
            class ToyForCausalLM(nn.Module):
                def forward(self, input_ids, positions, **kwargs): ...
            """
        ),
    ]
    INVALID = [
        Invalid(
            """
            class ToyForCausalLM(nn.Module):
                def forward(self, input_ids, position_ids=None): ...
            """,
            line=2,
            count=3,
            names="positions",
        ),
        Invalid(
            """
            class ToyModel(nn.Module):
                def forward(self, input_ids, positions, inputs_embeds=None): ...

            class ToyForCausalLM(nn.Module):
                def forward(
                    self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None
                ): ...
            """,
            line=2,
            names="intermediate_tensors",
        ),
    ]

    def visit_Module(self, node: cst.Module) -> None:
        if self.source.top is not None:
            self._compare(self.source.top, tuple(TOP))
        if self.source.backbone is not None:
            self._compare(self.source.backbone, BACKBONE)

    def _compare(self, facts: ClassFacts, wanted: tuple[str, ...]) -> None:
        forward = facts.methods.get("forward")
        if forward is None:
            return
        have = parameters(forward)
        for name in wanted:
            if name in have or (takes_kwargs(forward) and name not in ("input_ids", "positions")):
                continue
            self.report(forward, f"`{facts.name}.forward` takes no `{name}`: {TOP[name]}.")
