"""The mapping loop of older models is a table today."""

from __future__ import annotations

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule


class PreferWeightsMapper(Rule):
    """Prefer `WeightsMapper` and `AutoWeightsLoader` to a `stacked_params_mapping` loop.

    ## What it does
    Points out a `stacked_params_mapping` in `load_weights`. It works; a third of vLLM's models
    still have it.

    ## Why vLLM wants it
    As data the mapping serves quantisation and LoRA too, and the loader handles pipeline ranks,
    skipped prefixes, biases of quantised layers and the returned names, which loops forget.

    ## Example
        stacked_params_mapping = [("qkv_proj", "q_proj", "q"), ...]

    ## Use instead
        hf_to_vllm_mapper = WeightsMapper(orig_to_new_stacked={".q_proj": (".qkv_proj", "q"), ...})

    ## Fix safety
    None: what else the loop does must be kept.

    ## References
    - vllm/model_executor/models/utils.py (WeightsMapper, AutoWeightsLoader)
    """

    severity = "info"

    VALID = [
        Valid('mapper = WeightsMapper(orig_to_new_stacked={".q_proj": (".qkv_proj", "q")})\n'),
        Valid(
            """
            def load_weights(self, weights):
                return AutoWeightsLoader(self).load_weights(weights)
            """
        ),
    ]
    INVALID = [
        Invalid(
            """
            def load_weights(self, weights):
                stacked_params_mapping = [("qkv_proj", "q_proj", "q")]
            """,
            line=2,
            names="stacked_params_mapping",
        ),
        Invalid(
            "class A:\n    stacked_params_mapping = []\n", line=2, names="stacked_params_mapping"
        ),
    ]

    def visit_AssignTarget(self, node: cst.AssignTarget) -> None:
        if self.source.code(node.target).endswith("stacked_params_mapping"):
            self.report(
                node,
                "`stacked_params_mapping` is the older way: "
                "WeightsMapper(orig_to_new_stacked=...) with "
                "AutoWeightsLoader says the same as data.",
            )
