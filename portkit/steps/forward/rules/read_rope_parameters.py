"""Transformers 5 keeps theta and scaling in `config.rope_parameters`."""

from __future__ import annotations

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule

CONFIGS = ("config", "self.config", "hf_config", "text_config", "self.text_config")
MOVED = frozenset({"rope_theta", "rope_scaling"})


class ReadRopeParameters(Rule):
    """Read theta and scaling from `config.rope_parameters`.

    ## What it does
    Reports `config.rope_theta`, `config.rope_scaling` and `getattr(config, "rope_theta", ...)`.

    ## Why vLLM wants it
    Transformers 5 moved both into the dictionary `config.rope_parameters`; vLLM fills it for older
    configs too. The old attribute may be gone: reading it fails, and `getattr` with a default is
    worse, since it answers 10000 for every model.

    ## Example
        rope_theta = getattr(config, "rope_theta", 10000)

    ## Use instead
        rope_parameters = config.rope_parameters

    ## Fix safety
    None: `get_rope` takes the dictionary, not the number.

    ## References
    - vLLM pull request 29111; transformers/modeling_rope_utils.py
    """

    VALID = [
        Valid("theta = config.rope_parameters['rope_theta']\n"),
        Valid("self.rope_theta = theta\n"),
    ]
    INVALID = [
        Invalid("theta = config.rope_theta\n", line=1, names="config.rope_theta"),
        Invalid("theta = getattr(self.config, 'rope_theta', 10000)\n", line=1, names="rope_theta"),
        Invalid("x = self.config.rope_scaling\n", line=1, names="rope_scaling"),
    ]

    def visit_Attribute(self, node: cst.Attribute) -> None:
        if node.attr.value in MOVED and self._is_config(node.value):
            self._say(node, f"{self.source.code(node)}")

    def visit_Call(self, node: cst.Call) -> None:
        if isinstance(node.func, cst.Name) and node.func.value == "getattr" and len(node.args) >= 2:
            key = node.args[1].value
            name = key.evaluated_value if isinstance(key, cst.SimpleString) else ""
            if name in MOVED and self._is_config(node.args[0].value):
                self._say(node, f"{self.source.code(node)}")

    def _is_config(self, node: cst.CSTNode) -> bool:
        return self.source.dotted(node) in CONFIGS

    def _say(self, node: cst.CSTNode, what: str) -> None:
        self.report(
            node,
            f"`{what}` is where older Transformers kept it: it now stands in "
            "config.rope_parameters; pass that dictionary to get_rope.",
        )
