"""Each part of a fused weight goes to its own place."""

from __future__ import annotations

import re

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule

PLACES: tuple[tuple[str, str, str], ...] = (
    (r"(^|[._])q(_proj|uery)?$|query$", "q", '"q"'),
    (r"(^|[._])k(_proj)?$|key$", "k", '"k"'),
    (r"(^|[._])v(_proj)?$|value$", "v", '"v"'),
    (r"gate_proj$", "0", "0"),
    (r"up_proj$", "1", "1"),
)


class KeepShardOrder(Rule):
    """Map each checkpoint layer to its own part of the fused one.

    ## What it does
    Reports literal mappings that swap parts: `k_proj` to "v", `up_proj` to 0 and so on, in
    WeightsMapper's `orig_to_new_stacked`, in a `stacked_params_mapping`, and by order in
    `packed_modules_mapping`.

    ## Why vLLM wants it
    K and V have the same shape, gate and up too: swapped, everything loads, nothing complains,
    and the model talks nonsense.

    ## Example
        ".k_proj": (".qkv_proj", "v"),

    ## Use instead
        ".k_proj": (".qkv_proj", "k"),

    ## Fix safety
    Unsafe: right by the names; a checkpoint that misnames its layers is possible.

    ## References
    - vLLM guide, Basic model: 4. Implement the weight loading logic
    - vllm/model_executor/layers/linear.py (QKVParallelLinear, MergedColumnParallelLinear)
    """

    fix_safety = "unsafe"

    VALID = [
        Valid('m = {".q_proj": (".qkv_proj", "q"), ".up_proj": (".gate_up_proj", 1)}\n'),
        Valid('m = [("qkv_proj", "v_proj", "v"), ("gate_up_proj", "gate_proj", 0)]\n'),
        Valid('m = {".up_proj": (".experts", 0), "value": ("x", "k")}\n'),
        Valid('packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}\n'),
    ]
    INVALID = [
        Invalid(
            'm = {".k_proj": (".qkv_proj", "v"), ".v_proj": (".qkv_proj", "k")}\n',
            line=1,
            count=2,
            names=".k_proj",
            fixed='m = {".k_proj": (".qkv_proj", "k"), ".v_proj": (".qkv_proj", "v")}\n',
        ),
        Invalid(
            """
            m = [
                ("gate_up_proj", "gate_proj", 1),
                ("gate_up_proj", "up_proj", 0),
            ]
            """,
            line=2,
            count=2,
            names="gate_proj",
            fixed="""
            m = [
                ("gate_up_proj", "gate_proj", 0),
                ("gate_up_proj", "up_proj", 1),
            ]
            """,
        ),
        Invalid(
            'packed_modules_mapping = {"qkv_proj": ["q_proj", "v_proj", "k_proj"]}\n',
            line=1,
            names="qkv_proj",
            fixed='packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}\n',
        ),
    ]

    def visit_DictElement(self, node: cst.DictElement) -> None:
        name, value = _text(node.key), node.value
        if name is None:
            return
        if isinstance(value, cst.Tuple) and len(value.elements) == 2:
            self._compare(name, _text(value.elements[0].value), value.elements[1].value)
        elif isinstance(value, cst.List) and self._names_mapping(node):
            names = [_text(e.value) or "" for e in value.elements]
            self._order(name, names, value)

    def _order(self, fused: str, names: list[str], value: cst.List) -> None:
        places = [_place(name) or "" for name in names]
        if sorted(places) not in (["k", "q", "v"], ["0", "1"]):
            return
        order = sorted(range(len(places)), key=lambda i: "qkv01".index(places[i]))
        if order != list(range(len(places))):
            right = [names[i] for i in order]
            elements = [
                old.with_changes(value=value.elements[i].value)
                for old, i in zip(value.elements, order, strict=True)
            ]
            self.report(
                value,
                f'packed_modules_mapping["{fused}"] is {names}: the order must be {right}, that of '
                "the fused weight.",
                replacement=value.with_changes(elements=elements),
            )

    def visit_Tuple(self, node: cst.Tuple) -> None:
        if len(node.elements) == 3:
            fused, name = _text(node.elements[0].value), _text(node.elements[1].value)
            if fused and name:
                self._compare(name, fused, node.elements[2].value)

    def _compare(self, name: str, fused: str | None, shard: cst.BaseExpression) -> None:
        place = _place(name)
        if place is None or not fused or not isinstance(shard, (cst.SimpleString, cst.Integer)):
            return
        written = str(shard.evaluated_value)
        family = ("q", "k", "v") if place in "qkv" else ("0", "1")
        fits = (
            "qkv" in fused or "query_key_value" in fused if place in "qkv" else "gate_up" in fused
        )
        if fits and written in family and written != place:
            right = next(code for _, p, code in PLACES if p == place)
            self.report(
                shard,
                f"`{name}` goes to part {self.source.code(shard)} of `{fused}`: it is "
                f"part {right}.",
                replacement=cst.parse_expression(right),
            )

    def _names_mapping(self, node: cst.CSTNode) -> bool:
        for parent in self.source.ancestors(node):
            if isinstance(parent, (cst.Assign, cst.AnnAssign)):
                target = (
                    parent.targets[0].target if isinstance(parent, cst.Assign) else parent.target
                )
                return self.source.code(target).endswith("packed_modules_mapping")
        return False


def _text(node: cst.BaseExpression) -> str | None:
    return str(node.evaluated_value) if isinstance(node, cst.SimpleString) else None


def _place(name: str) -> str | None:
    return next((place for pattern, place, _ in PLACES if re.search(pattern, name)), None)
