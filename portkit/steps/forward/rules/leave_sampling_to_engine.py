"""Models compute logits; the engine samples."""

from __future__ import annotations

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule


class LeaveSamplingToEngine(Rule):
    """Define no `sample`; leave sampling to the engine.

    ## What it does
    Reports a method `sample` of the causal LM, and the names `Sampler`, `SamplerOutput` and
    `SamplingMetadata` where they are imported or called.

    ## Why vLLM wants it
    Older models sampled by themselves. Today a model ends with `compute_logits(hidden_states)`,
    and the runner's sampler does the rest for all models.

    ## Example
        def sample(self, logits, sampling_metadata): ...

    ## Use instead
        def compute_logits(self, hidden_states): ...

    ## Fix safety
    None: logits processing inside `sample` may have to move.

    ## References
    - vLLM guide, Basic model: 2. Make your code compatible with vLLM, Computation Code
    """

    VALID = [
        Valid(
            "class ToyForCausalLM(nn.Module):\n    def compute_logits(self, hidden_states): ...\n"
        ),
        Valid("class ToyData:\n    def sample(self): ...\n"),
    ]
    INVALID = [
        Invalid(
            """
            class ToyForCausalLM(nn.Module):
                def sample(self, logits, sampling_metadata): ...
            """,
            line=2,
            names="sample",
        ),
        Invalid(
            """
            from vllm.sequence import SamplerOutput
            class ToyForCausalLM(nn.Module):
                def __init__(self):
                    self.sampler = Sampler(8)
            """,
            line=1,
            count=2,
            names="SamplerOutput",
        ),
    ]

    def visit_FunctionDef(self, node: cst.FunctionDef) -> None:
        top = self.source.top
        if top is not None and top.methods.get("sample") is node:
            self.report(
                node,
                f"`{top.name}.sample` is never called: the engine samples from compute_logits.",
            )

    def visit_Call(self, node: cst.Call) -> None:
        if self.source.vllm_name(node.func) == "Sampler":
            self.report(node, "`Sampler` belongs to the engine: a model ends with compute_logits.")

    def visit_ImportAlias(self, node: cst.ImportAlias) -> None:
        if node.evaluated_name in ("SamplerOutput", "SamplingMetadata"):
            self.report(
                node,
                f"`{node.evaluated_name}` belongs to the engine: a model ends with compute_logits.",
            )
