"""`linear_method` became `quant_config`."""

from __future__ import annotations

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule


class ReplaceLinearMethod(Rule):
    """Pass `quant_config` and `prefix`, not `linear_method`.

    ## What it does
    Reports `linear_method` as a parameter or an argument.

    ## Why vLLM wants it
    One method for all layers could not leave layers out. Today each layer asks `quant_config`
    for its method, by its `prefix`; the old argument is a TypeError.

    ## Example
        self.o_proj = RowParallelLinear(4, 4, linear_method=linear_method)

    ## Use instead
        self.o_proj = RowParallelLinear(4, 4, quant_config=quant_config, prefix=f"{prefix}.o_proj")

    ## Fix safety
    None: `quant_config` comes from `vllm_config`, from the top down.

    ## References
    - vLLM guide, Basic model: 3. Implement tensor parallelism and quantization support
    """

    VALID = [
        Valid("class A:\n    def __init__(self, quant_config): ...\n"),
        Valid("layer = RowParallelLinear(4, 4, quant_config=None)\n"),
    ]
    INVALID = [
        Invalid(
            "class A:\n    def __init__(self, linear_method=None): ...\n",
            line=2,
            names="linear_method",
        ),
        Invalid(
            "layer = RowParallelLinear(4, 4, linear_method=method)\n", line=1, names="linear_method"
        ),
    ]

    def visit_Param(self, node: cst.Param) -> None:
        self._say(node, node.name.value)

    def visit_Arg(self, node: cst.Arg) -> None:
        if node.keyword is not None:
            self._say(node, node.keyword.value)

    def _say(self, node: cst.CSTNode, name: str) -> None:
        if name == "linear_method":
            self.report(
                node,
                "`linear_method` is an older vLLM's argument: pass `quant_config` and `prefix`.",
            )
