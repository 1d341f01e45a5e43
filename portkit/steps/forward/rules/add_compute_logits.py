"""Logits are computed apart from the forward pass, for few tokens."""

from __future__ import annotations

import libcst as cst

from portkit.lint.edits import with_method
from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule


class AddComputeLogits(Rule):
    """Add the method `compute_logits`.

    ## What it does
    Reports a causal LM without `compute_logits(hidden_states)`.

    ## Why vLLM wants it
    Logits are wanted for the last token of each sequence only. The engine picks those rows out
    of what `forward` returns and passes them to `compute_logits`; a class without the method is
    not taken for a text generation model. (The older guide's `sample` is the sampler's now.)

    ## Example
        class ToyForCausalLM(nn.Module): ...

    ## Use instead
        def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
            return self.lm_head(hidden_states)

    ## Fix safety
    Unsafe: scaling or soft-capping of logits must be carried over by hand. Offered where
    `self.lm_head` is a plain linear.

    ## References
    - vLLM guide, Basic model: 2. Make your code compatible with vLLM, Computation Code
    - vllm/model_executor/models/interfaces_base.py
    """

    fix_safety = "unsafe"

    VALID = [
        Valid(
            "class ToyForCausalLM(nn.Module):\n    def compute_logits(self, hidden_states): ...\n"
        ),
        Valid("class ToyForCausalLM(LlamaForCausalLM):\n    pass\n"),
    ]
    INVALID = [
        Invalid("class ToyForCausalLM(nn.Module):\n    pass\n", line=1, names="ToyForCausalLM"),
        Invalid(
            """
            class ToyForCausalLM(nn.Module):
                def __init__(self):
                    self.lm_head = nn.Linear(4, 8, bias=False)
            """,
            line=1,
            names="compute_logits",
            fixed="""
            class ToyForCausalLM(nn.Module):
                def __init__(self):
                    self.lm_head = nn.Linear(4, 8, bias=False)

                def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
                    return self.lm_head(hidden_states)
            """,
        ),
    ]

    def visit_Module(self, node: cst.Module) -> None:
        facts = self.source.top
        if facts is None or "compute_logits" in facts.methods:
            return
        if facts.has_base_elsewhere and not any(
            base.startswith("transformers.") or base.endswith("PreTrainedModel")
            for base in facts.bases
        ):
            return
        head = facts.layer("lm_head")
        code = (
            "def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:\n"
            "    return self.lm_head(hidden_states)\n"
        )
        self.report(
            facts.node,
            f"`{facts.name}` has no `compute_logits`: vLLM computes logits only for the "
            "tokens it samples from, through this method.",
            replacement=with_method(facts.node, code)
            if head and head.dotted == "torch.nn.Linear"
            else None,
        )
