"""Models are registered through ModelRegistry, not by editing a table."""

from __future__ import annotations

import re

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule

TABLES = re.compile(r"(^|\.)(_MODELS|_VLLM_MODELS|_TEXT_GENERATION_MODELS|_OOT_MODELS)$")


class UseModelRegistry(Rule):
    """Register with `ModelRegistry.register_model`, not by writing into `_MODELS`.

    ## What it does
    Reports writes to `_MODELS` and the tables of vLLM's registry in the plugin.

    ## Why vLLM wants it
    Older guides add a row to `_MODELS` in `models/__init__.py`. Today rows stand in the tables of
    `registry.py`, which are read once at import; writing into them from outside has no effect.

    ## Example
        _MODELS["ToyForCausalLM"] = ("toy", "ToyForCausalLM")

    ## Use instead
        ModelRegistry.register_model("ToyForCausalLM", "vllm_toy.modeling_toy:ToyForCausalLM")

    ## Fix safety
    None: the module and the class must be named.

    ## References
    - vLLM guide, Registering a model; vllm/model_executor/models/registry.py
    """

    target = "init"

    VALID = [
        Valid('def register():\n    ModelRegistry.register_model("T", "m:T")\n'),
        Valid('MODELS = {"T": "m:T"}\n'),
    ]
    INVALID = [
        Invalid('_MODELS["T"] = ("toy", "T")\n', line=1, names="_MODELS"),
        Invalid(
            """
            from vllm.model_executor.models import registry

            def register():
                registry._VLLM_MODELS['T'] = ('toy', 'T')
            """,
            line=4,
            names="_VLLM_MODELS",
        ),
        Invalid("def register():\n    _MODELS.update(T=('toy', 'T'))\n", line=2, names="_MODELS"),
    ]

    def visit_AssignTarget(self, node: cst.AssignTarget) -> None:
        if isinstance(node.target, cst.Subscript):
            self._look(node, node.target.value)

    def visit_Call(self, node: cst.Call) -> None:
        if isinstance(node.func, cst.Attribute) and node.func.attr.value in (
            "update",
            "setdefault",
        ):
            self._look(node, node.func.value)

    def _look(self, node: cst.CSTNode, table: cst.BaseExpression) -> None:
        written = self.source.code(table)
        if TABLES.search(written):
            self.report(
                node, f"`{written}` is vLLM's own table: call ModelRegistry.register_model instead."
            )
