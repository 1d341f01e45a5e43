"""A mapping's target must be a layer of the model."""

from __future__ import annotations

import re

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule

HELPERS = ("utils", "interfaces", "adapters", "vision", "interfaces_base")


class MapToExistingLayers(Rule):
    """Map stacked weights to layers that the model has.

    ## What it does
    Reports a target in `orig_to_new_stacked` or `stacked_params_mapping` that is no attribute of
    any class in the file. Silent if the file builds on layers of other vLLM models.

    ## Why vLLM wants it
    A checkpoint tensor mapped to a missing parameter stops loading with a KeyError, or is dropped
    where the loader skips unknown names.

    ## Example
        WeightsMapper(orig_to_new_stacked={".q_proj": (".qkv", "q")})   # the layer is qkv_proj

    ## Use instead
        WeightsMapper(orig_to_new_stacked={".q_proj": (".qkv_proj", "q")})

    ## Fix safety
    None: which layer was meant?

    ## References
    - vLLM guide, Basic model: 4. Implement the weight loading logic
    - vllm/model_executor/models/utils.py (WeightsMapper)
    """

    VALID = [
        Valid(
            """
            class A(nn.Module):
                def __init__(self):
                    self.qkv_proj = QKVParallelLinear(4, 2, 2)
                mapper = WeightsMapper(orig_to_new_stacked={".q_proj": (".qkv_proj", "q")})
            """
        ),
        Valid(
            """
            from vllm.model_executor.models.llama import LlamaAttention
            class A(nn.Module):
                mapper = WeightsMapper(orig_to_new_stacked={".q_proj": (".qkv_proj", "q")})
            """
        ),
    ]
    INVALID = [
        Invalid(
            """
            class A(nn.Module):
                def __init__(self):
                    self.qkv_proj = QKVParallelLinear(4, 2, 2)
                mapper = WeightsMapper(orig_to_new_stacked={".q_proj": (".qkv", "q")})
            """,
            line=4,
            names=".qkv",
        ),
        Invalid(
            """
            class A(nn.Module):
                def load_weights(self, weights):
                    stacked_params_mapping = [("gate_up_proj", "gate_proj", 0)]
            """,
            line=3,
            names="gate_up_proj",
        ),
    ]

    def visit_Module(self, node: cst.Module) -> None:
        self.attributes = {layer.attribute for _, layer in self.source.layers}
        self.silent = any(
            re.match(r"(vllm\.model_executor\.models\.|\.)(\w+)$", module)
            and module.rpartition(".")[2] not in HELPERS
            and name[:1].isupper()
            for module, name, _ in self.source.imports
        )

    def visit_Arg(self, node: cst.Arg) -> None:
        if (
            node.keyword is not None
            and node.keyword.value == "orig_to_new_stacked"
            and isinstance(node.value, cst.Dict)
        ):
            for element in node.value.elements:
                value = element.value
                if isinstance(value, cst.Tuple) and value.elements:
                    self._target(value.elements[0].value)

    def visit_Assign(self, node: cst.Assign) -> None:
        if self.source.code(node.targets[0].target) == "stacked_params_mapping" and isinstance(
            node.value, cst.List
        ):
            for element in node.value.elements:
                if isinstance(element.value, cst.Tuple) and len(element.value.elements) == 3:
                    self._target(element.value.elements[0].value)

    def _target(self, node: cst.BaseExpression) -> None:
        if self.silent or not isinstance(node, cst.SimpleString):
            return
        written = str(node.evaluated_value)
        parent, _, last = written.strip(".").rpartition(".")
        built = {layer.attribute: layer.name for _, layer in self.source.layers}
        if parent and built.get(parent.rpartition(".")[2]) not in self.source.classes:
            return  # a layer of a class that this file does not show
        if last and last not in self.attributes:
            self.report(node, f"`{written}` is no layer of this file: no class has `self.{last}`.")
