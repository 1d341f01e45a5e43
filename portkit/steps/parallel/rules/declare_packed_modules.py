"""Fused layers say which checkpoint layers they are made of."""

from __future__ import annotations

import libcst as cst

from portkit.lint.finding import Invalid, PortContext, Valid
from portkit.lint.rule import Rule
from portkit.lint.source import ClassFacts, Layer, argument

FUSING = ("QKVParallelLinear", "MergedColumnParallelLinear")
USUAL = ("qkv_proj", "gate_up_proj")


class DeclarePackedModules(Rule):
    """Declare fused layers in `packed_modules_mapping`.

    ## What it does
    Reports fused layers (QKVParallelLinear, MergedColumnParallelLinear) that the causal LM's
    `packed_modules_mapping` lacks, and entries with too few parts. A layer that is fused in the
    checkpoint already (it has the same name in the copied code) needs no entry.

    ## Why vLLM wants it
    Quantisation configs, LoRA adapters and bitsandbytes speak of `q_proj`; the model has
    `qkv_proj`. Without the mapping they are refused or, for ignored layers, quietly mismatched.

    ## Example
        self.qkv_proj = QKVParallelLinear(...)

    ## Use instead
        packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}

    ## Fix safety
    None: the names are the checkpoint's.

    ## References
    - vLLM guide, Basic model: 3. Implement tensor parallelism and quantization support
    - vLLM issues 18114, 41874; pull request 11924
    """

    VALID = [
        Valid(
            """
            class A(nn.Module):
                def __init__(self):
                    self.qkv_proj = QKVParallelLinear(4, 2, 2)

            class ToyForCausalLM(nn.Module):
                packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
            """
        ),
        Valid(
            """
            class A(nn.Module):
                def __init__(self):
                    self.qkv_proj = QKVParallelLinear(4, 2, 2)

            class ToyForCausalLM(nn.Module):
                pass
            """,
            PortContext(original_linears=frozenset({"qkv_proj", "o_proj"})),
        ),
        Valid(
            """
            class A(nn.Module):
                def __init__(self):
                    self.query_key_value = QKVParallelLinear(4, 2, 2)

            class ToyForCausalLM(nn.Module):
                pass
            """
        ),
    ]
    INVALID = [
        Invalid(
            """
            class A(nn.Module):
                def __init__(self):
                    self.qkv_proj = QKVParallelLinear(4, 2, 2)

            class ToyForCausalLM(nn.Module):
                pass
            """,
            line=3,
            names="qkv_proj",
        ),
        Invalid(
            """
            class A(nn.Module):
                def __init__(self):
                    self.gate_up_proj = MergedColumnParallelLinear(4, [8] * 2)

            class ToyForCausalLM(nn.Module):
                packed_modules_mapping = {"gate_up_proj": ["gate_proj"]}
            """,
            line=6,
            names="gate_up_proj",
        ),
    ]

    def visit_Module(self, node: cst.Module) -> None:
        top = self.source.top
        if top is None or (top.has_base_elsewhere and "packed_modules_mapping" not in top.values):
            return
        declared = self._declared(top)
        if declared is None:
            return
        reported = set()
        for _, layer in self.source.layers:
            name = layer.attribute
            if self.source.vllm_name(layer.call.func) not in FUSING or name in reported:
                continue
            if name not in declared:
                if self._fused_by_port(name):
                    reported.add(name)
                    self.report(
                        layer.call,
                        f"`{name}` is fused but not in `{top.name}.packed_modules_mapping`: add "
                        f'"{name}": [the checkpoint\'s names, in order].',
                    )
            elif (
                (parts := self._parts(layer)) and len(declared[name].elements) not in (parts, 1)
            ) or (
                parts and len(declared[name].elements) == 1 and self._only(declared[name]) != name
            ):
                self._too_few(declared[name], name, parts)

    def _too_few(self, node: cst.CSTNode, name: str, parts: int) -> None:
        self.report(
            node,
            f'packed_modules_mapping["{name}"] is {self.source.code(node)}, but the '
            f"layer has {parts} parts.",
        )

    def _declared(self, top: ClassFacts) -> dict[str, cst.List] | None:
        """Literal entries of the mapping; {} if there is none; None if it is computed."""
        value = top.values.get("packed_modules_mapping")
        if value is None:
            return {}
        if not isinstance(value, cst.Dict):
            return None
        found = {}
        for element in value.elements:
            if not isinstance(element, cst.DictElement) or not isinstance(
                element.key, cst.SimpleString
            ):
                return None
            if isinstance(element.value, (cst.List, cst.Tuple)):
                found[str(element.key.evaluated_value)] = element.value
        return found

    def _only(self, node: cst.List) -> str:
        value = node.elements[0].value
        return str(value.evaluated_value) if isinstance(value, cst.SimpleString) else ""

    def _fused_by_port(self, name: str) -> bool:
        if self.port.original_linears:
            return name not in self.port.original_linears
        return name in USUAL

    def _parts(self, layer: Layer) -> int:
        """How many checkpoint layers one fused layer holds; 0 if the code does not say."""
        if self.source.vllm_name(layer.call.func) == "QKVParallelLinear":
            return 3
        sizes = argument(layer.call, 1, "output_sizes")
        if isinstance(sizes, cst.List):
            return len(sizes.elements)
        if isinstance(sizes, cst.BinaryOperation) and isinstance(sizes.left, cst.List):
            times = sizes.right
            return (
                len(sizes.left.elements) * int(times.value) if isinstance(times, cst.Integer) else 0
            )
        return 0
