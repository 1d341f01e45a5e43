"""The model knows how its checkpoint's names map to its parameters."""

from __future__ import annotations

import libcst as cst

from portkit.lint.edits import with_method
from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule
from portkit.lint.source import ClassFacts

UTILS = "vllm.model_executor.models.utils"
SHARDS = {3: ('"q"', '"k"', '"v"'), 2: ("0", "1")}


class AddLoadWeights(Rule):
    """Add `load_weights`.

    ## What it does
    Reports a causal LM without `load_weights(weights)`.

    ## Why vLLM wants it
    vLLM streams (name, tensor) pairs from the checkpoint into this method. It puts the separate
    q, k, v of the checkpoint into the fused parameter (each rank its part) and returns the names
    of what it wrote, so that vLLM can say what was never loaded.

    ## Example
        class ToyForCausalLM(nn.Module): ...

    ## Use instead
        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
            loader = AutoWeightsLoader(self)
            return loader.load_weights(weights, mapper=self.hf_to_vllm_mapper)

    ## Fix safety
    Unsafe: written from `packed_modules_mapping`; a checkpoint whose other names differ from the
    model's needs more in the mapper. Not offered if an entry has an unusual number of parts.

    ## References
    - vLLM guide, Basic model: 4. Implement the weight loading logic
    - vllm/model_executor/models/utils.py (AutoWeightsLoader, WeightsMapper)
    """

    fix_safety = "unsafe"

    VALID = [
        Valid("class ToyForCausalLM(nn.Module):\n    def load_weights(self, weights): ...\n"),
        Valid("class ToyForCausalLM(LlamaForCausalLM):\n    pass\n"),
    ]
    INVALID = [
        Invalid(
            """
            import torch

            class ToyForCausalLM(nn.Module):
                packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}

                def forward(self): ...
            """,
            line=3,
            names="ToyForCausalLM",
            fixed=f"""
            import torch
            from collections.abc import Iterable
            from {UTILS} import AutoWeightsLoader
            from {UTILS} import WeightsMapper

            class ToyForCausalLM(nn.Module):
                packed_modules_mapping = {{"qkv_proj": ["q_proj", "k_proj", "v_proj"]}}
                hf_to_vllm_mapper = WeightsMapper(
                    orig_to_new_stacked={{
                        ".q_proj": (".qkv_proj", "q"),
                        ".k_proj": (".qkv_proj", "k"),
                        ".v_proj": (".qkv_proj", "v"),
                    }}
                )

                def forward(self): ...

                def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
                    loader = AutoWeightsLoader(self)
                    return loader.load_weights(weights, mapper=self.hf_to_vllm_mapper)
            """,
        ),
        Invalid(
            "class ToyForCausalLM(nn.Module):\n    packed_modules_mapping = make_mapping()\n",
            line=1,
            names="load_weights",
        ),
    ]

    def visit_Module(self, node: cst.Module) -> None:
        top = self.source.top
        if top is None or "load_weights" in top.methods or top.has_base_elsewhere:
            return
        replacement = self._written(top)
        self.report(
            top.node,
            f"`{top.name}` has no `load_weights`: vLLM gives it the checkpoint's tensors by name.",
            replacement=replacement,
            imports=(
                ("collections.abc", "Iterable"),
                (UTILS, "AutoWeightsLoader"),
                (UTILS, "WeightsMapper"),
            ),
        )

    def _written(self, top: ClassFacts) -> cst.ClassDef | None:
        declared = top.values.get("packed_modules_mapping")
        rows: list[str] = []
        if declared is not None and not isinstance(declared, cst.Dict):
            return None
        for element in declared.elements if declared is not None else ():
            value = getattr(element, "value", None)
            parts = value.elements if isinstance(value, (cst.List, cst.Tuple)) else ()
            names = [
                p.value.evaluated_value for p in parts if isinstance(p.value, cst.SimpleString)
            ]
            fused = element.key.evaluated_value if isinstance(element.key, cst.SimpleString) else ""
            if len(names) == 1 and names[0] == fused:
                continue
            if len(names) not in SHARDS or not fused:
                return None
            rows += [
                f'        ".{name}": (".{fused}", {shard}),\n'
                for name, shard in zip(names, SHARDS[len(names)], strict=True)
            ]
        mapper = "hf_to_vllm_mapper" in top.values
        node = top.node
        if rows and not mapper:
            code = (
                "hf_to_vllm_mapper = WeightsMapper(\n    orig_to_new_stacked={\n"
                + "".join(rows)
                + "    }\n)\n"
            )
            at = next(
                i
                for i, line in enumerate(node.body.body)
                if "packed_modules_mapping" in self.source.code(line)
            )
            body = [*node.body.body[: at + 1], cst.parse_statement(code), *node.body.body[at + 1 :]]
            node = node.with_changes(body=node.body.with_changes(body=body))
        given = ", mapper=self.hf_to_vllm_mapper" if rows or mapper else ""
        return with_method(
            node,
            "def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:\n"
            "    loader = AutoWeightsLoader(self)\n    return "
            f"loader.load_weights(weights{given})\n",
        )
