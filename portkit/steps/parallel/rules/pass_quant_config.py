"""A layer that is not told of quantisation stays unquantised."""

from __future__ import annotations

import libcst as cst

from portkit.lint.edits import with_keyword
from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule
from portkit.lint.source import LINEAR_CLASSES, Layer, keyword, parameters, unpacks


class PassQuantConfig(Rule):
    """Pass `quant_config` to every linear layer.

    ## What it does
    Reports vLLM linear layers built without `quant_config`, but for routers
    (`gate`, `router`) and convolutions kept as linears (`conv1d`). To leave a layer
    unquantised on purpose, pass `quant_config=None`.

    ## Why vLLM wants it
    The layer asks it for its method of storing and multiplying weights. Without it the layer
    silently stays in full precision, or its `weight_scale` finds no home when loading.

    ## Example
        self.o_proj = RowParallelLinear(4, 4, prefix=f"{prefix}.o_proj")

    ## Use instead
        self.o_proj = RowParallelLinear(4, 4, quant_config=quant_config, prefix=f"{prefix}.o_proj")

    ## Fix safety
    Safe: without a quantised checkpoint the argument is None. Offered where `quant_config` is
    at hand.

    ## References
    - vLLM guide, Basic model: 3. Implement tensor parallelism and quantization support
    - vLLM pull request 22463
    """

    fix_safety = "safe"

    VALID = [
        Valid(
            """
            class A(nn.Module):
                def __init__(self, quant_config):
                    self.o = RowParallelLinear(4, 4, quant_config=quant_config)
            """
        ),
        Valid(
            """
            class A(nn.Module):
                def __init__(self):
                    self.gate = ReplicatedLinear(4, 4)
            """
        ),
        Valid(
            """
            class A(nn.Module):
                def __init__(self):
                    self.o = RowParallelLinear(4, 4, quant_config=None)
            """
        ),
        Valid("class A(nn.Module):\n    def __init__(self):\n        self.o = nn.Linear(4, 4)\n"),
    ]
    INVALID = [
        Invalid(
            """
            class A(nn.Module):
                def __init__(self, quant_config=None):
                    self.o_proj = RowParallelLinear(
                        4,
                        4,
                        bias=False,
                    )
            """,
            line=3,
            names="o_proj",
            fixed="""
            class A(nn.Module):
                def __init__(self, quant_config=None):
                    self.o_proj = RowParallelLinear(
                        4,
                        4,
                        bias=False,
                        quant_config=quant_config,
                    )
            """,
        ),
        Invalid(
            """
            class A(nn.Module):
                def __init__(self):
                    self.o_proj = RowParallelLinear(4, 4)
            """,
            line=3,
            names="o_proj",
        ),
    ]

    def visit_Module(self, node: cst.Module) -> None:
        for _, layer in self.source.layers:
            if self._lacks(layer):
                function = self.source.function_of(layer.call)
                near = function is not None and (
                    "quant_config" in parameters(function)
                    or "\n        quant_config = " in self.source.module.code_for_node(function)
                )
                self.report(
                    layer.call,
                    f"`{layer.attribute}` is built without `quant_config`: it would stay "
                    "unquantised; pass it on (or None, to say so).",
                    replacement=with_keyword(layer.call, "quant_config", "quant_config")
                    if near
                    else None,
                )

    def _lacks(self, layer: Layer) -> bool:
        if self.source.vllm_name(layer.call.func) not in LINEAR_CLASSES or unpacks(layer.call):
            return False
        if layer.attribute in ("gate", "router") or layer.attribute.endswith(("_gate", "conv1d")):
            return False
        by_position = any("quant_config" in self.source.code(a.value) for a in layer.call.args)
        return keyword(layer.call, "quant_config") is None and not by_position
