"""Relative imports of the copied code point into Transformers' tree, not into the port's."""

from __future__ import annotations

import libcst as cst
from libcst.helpers import get_full_name_for_node

from portkit.lint.finding import Invalid, PortContext, Valid
from portkit.lint.rule import Rule

MODELS = {2: "transformers.models", 3: "transformers"}
"""What `..` and `...` mean in transformers/models/<name>/modeling_<name>.py."""


class UseAbsoluteImports(Rule):
    """Import from `transformers` by its full name.

    ## What it does
    Reports relative imports left from Transformers' tree. A relative import of a file that stands
    beside the modeling file in the port is fine.

    ## Why vLLM wants it
    The port is a package of its own: `...activations` does not exist above it, so importing the
    model fails with "attempted relative import beyond top-level package".

    ## Example
        from ...activations import ACT2FN

    ## Use instead
        from transformers.activations import ACT2FN

    ## Fix safety
    Safe: the same module is imported by its full name. `from .x import` is only fixed when the
    package that the code came from is known.

    ## References
    - vLLM guide, Basic model: 1. Bring your model code
    """

    fix_safety = "safe"

    VALID = [
        Valid("from transformers.activations import ACT2FN"),
        Valid(
            "from .configuration_toy import ToyConfig",
            PortContext(siblings=frozenset({"configuration_toy"})),
        ),
    ]
    INVALID = [
        Invalid(
            "from ...activations import ACT2FN\n",
            line=1,
            fixed="from transformers.activations import ACT2FN\n",
            names="...activations",
        ),
        Invalid(
            "import torch\nfrom .configuration_toy import ToyConfig\n",
            line=2,
            fixed="import torch\nfrom transformers.models.toy.configuration_toy import ToyConfig\n",
            given=PortContext(source_package="transformers.models.toy"),
            names=".configuration_toy",
        ),
        Invalid("from .configuration_toy import ToyConfig\n", line=1, names=".configuration_toy"),
    ]

    def visit_ImportFrom(self, node: cst.ImportFrom) -> None:
        level = len(node.relative)
        if not level:
            return
        name = get_full_name_for_node(node.module) if node.module else ""
        if level == 1 and (not name or name.partition(".")[0] in self.port.siblings):
            return
        written = "." * level + (name or "")
        base = MODELS.get(level, self.port.source_package if level == 1 else "")
        full = ".".join(part for part in (base, name) if part) if base else ""
        advice = f"write `from {full} import ...`" if full else "write the module's full name"
        self.report(
            node,
            f"`{written}` is relative to Transformers' tree and does not exist beside "
            f"the port: {advice}.",
            replacement=self._absolute(node, full) if full else None,
        )

    def _absolute(self, node: cst.ImportFrom, full: str) -> cst.ImportFrom:
        return node.with_changes(relative=(), module=cst.parse_expression(full))
