"""Which of vLLM's linear layers takes the place of a plain one."""

from __future__ import annotations

import re

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule
from portkit.lint.source import Layer

ROLES: tuple[tuple[str, str], ...] = (
    (
        r"^(q|k|v|query|key|value)(_?proj|_lin)?$|^(qkv_proj|query_key_value|Wqkv|c_attn|qkv|W_pack)$",
        "QKVParallelLinear as `{fused}` (q, k and v in one; heads split over ranks)",
    ),
    (
        r"^(gate_proj|up_proj|gate_up_proj|w1|w3|linear_1|linear_v)$",
        "MergedColumnParallelLinear as `{fused}` (gate and up in one, followed by "
        "SiluAndMul or its like)",
    ),
    (
        r"^(o_proj|out_proj|dense|down_proj|fc2|fc_out|c_proj|w2|wo|dense_4h_to_h|wo_proj|linear_2)$",
        "RowParallelLinear (input split over ranks, results all-reduced)",
    ),
    (r"^(fc1|fc_in|c_fc|dense_h_to_4h|wi)$", "ColumnParallelLinear (output split over ranks)"),
    (
        r"^(gate|router|shared_expert_gate)$",
        "ReplicatedLinear (small and needed whole on each rank)",
    ),
)
FUSED = {"Q": "qkv_proj", "M": "gate_up_proj"}


class UseParallelLinear(Rule):
    """Replace `nn.Linear` by the vLLM layer of its role.

    ## What it does
    Reports each `self.x = nn.Linear(...)` (or `Conv1D`) and names the layer for its role, as far
    as the attribute's name and its class tell it. The LM head is another rule's.

    ## Why vLLM wants it
    Plain linears hold the whole weight on each rank, cannot be quantised and take no LoRA. Column
    before Row needs one all-reduce per block: split the output of the first, the input of the
    second.

    ## Example
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    ## Use instead
        self.down_proj = RowParallelLinear(intermediate_size, hidden_size, bias=False,
                                           quant_config=quant_config, prefix=f"{prefix}.down_proj")

    ## Fix safety
    None: the layers return `(output, bias)`, fused ones change `forward`; the step's draft does it.

    ## References
    - vLLM guide, Basic model: 3. Implement tensor parallelism and quantization support
    - vllm/model_executor/layers/linear.py
    """

    VALID = [
        Valid(
            """
            class A(nn.Module):
                def __init__(self):
                    self.o_proj = RowParallelLinear(4, 4)
            """
        ),
        Valid(
            "class T(nn.Module):\n    def __init__(self):\n        self.lm_head = nn.Linear(4, 8)\n"
        ),
        Valid(
            "class A(nn.Module):\n    def __init__(self):\n        self.norm = nn.LayerNorm(4)\n"
        ),
    ]
    INVALID = [
        Invalid(
            """
            class ToyAttention(nn.Module):
                def __init__(self):
                    self.q_proj = nn.Linear(4, 4)
                    self.o_proj = nn.Linear(4, 4)
            """,
            line=3,
            count=2,
            names="`q_proj`",
        ),
        Invalid(
            """
            class ToyMLP(nn.Module):
                def __init__(self):
                    self.gate_proj = nn.Linear(4, 8)
            """,
            line=3,
            names="MergedColumnParallelLinear",
        ),
        Invalid(
            """
            from torch.nn import Linear
            class ToyMLP(nn.Module):
                def __init__(self):
                    self.fc2 = Linear(8, 4)
            """,
            line=4,
            names="RowParallelLinear",
        ),
        Invalid(
            """
            class ToyMoE(nn.Module):
                def __init__(self):
                    self.mix = nn.Linear(8, 4)
            """,
            line=3,
            names="ReplicatedLinear",
        ),
    ]

    def visit_Module(self, node: cst.Module) -> None:
        for facts, layer in self.source.layers:
            plain = layer.dotted == "torch.nn.Linear" or layer.name == "Conv1D"
            if plain and not (layer.attribute in ("lm_head", "embed_out") or self._is_head(layer)):
                self.report(
                    layer.call,
                    f"`{layer.attribute}` of `{facts.name}` is a plain {layer.name}: "
                    f"use {self._advice(layer)}.",
                )

    def _is_head(self, layer: Layer) -> bool:
        return any("vocab_size" in self.source.code(a.value) for a in layer.call.args[:2])

    def _advice(self, layer: Layer) -> str:
        for pattern, advice in ROLES:
            if re.search(pattern, layer.attribute):
                return advice.format(fused=FUSED.get(advice[0], ""))
        return (
            "ReplicatedLinear, or Column/RowParallelLinear if its output/input is what ranks share"
        )
