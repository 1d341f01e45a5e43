"""A model can be cut into pipeline stages."""

from __future__ import annotations

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule


class SupportPipelineRanks(Rule):
    """Support pipeline parallelism: `SupportsPP` and `make_empty_intermediate_tensors`.

    ## What it does
    Reports a causal LM without the interface `SupportsPP`, and one with it that sets no
    `make_empty_intermediate_tensors`.

    ## Why vLLM wants it
    Large models are cut by layers as well. Each rank builds its layers only, receives
    `intermediate_tensors` and sends them on; the engine needs to know their names and shapes to
    allocate them. Without the interface `--pipeline-parallel-size 2` is refused.

    ## Example
        class ToyForCausalLM(nn.Module): ...

    ## Use instead
        class ToyForCausalLM(nn.Module, SupportsPP):
            def __init__(self, *, vllm_config, prefix=""):
                self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    ## Fix safety
    None: `forward` must take and return the tensors.

    ## References
    - vllm/model_executor/models/interfaces.py (SupportsPP)
    - vLLM pull request 55913
    """

    VALID = [
        Valid(
            """
            class ToyForCausalLM(nn.Module, SupportsPP):
                def __init__(self):
                    made = self.model.make_empty_intermediate_tensors
                    self.make_empty_intermediate_tensors = made
            """
        ),
        Valid("class ToyForCausalLM(LlamaForCausalLM):\n    pass\n"),
    ]
    INVALID = [
        Invalid("class ToyForCausalLM(nn.Module):\n    pass\n", line=1, names="SupportsPP"),
        Invalid(
            "class ToyForCausalLM(nn.Module, SupportsPP):\n    pass\n",
            line=1,
            names="make_empty_intermediate_tensors",
        ),
    ]

    def visit_Module(self, node: cst.Module) -> None:
        top = self.source.top
        if top is None or top.has_base_elsewhere:
            return
        if not any(base.endswith("SupportsPP") for base in top.bases):
            self.report(
                top.node,
                f"`{top.name}` lacks the interface `SupportsPP`: pipeline parallelism is refused.",
            )
        elif "make_empty_intermediate_tensors" not in top.text:
            self.report(
                top.node,
                f"`{top.name}` sets no `make_empty_intermediate_tensors`: pipeline ranks "
                "need it to "
                "allocate what they receive.",
            )
