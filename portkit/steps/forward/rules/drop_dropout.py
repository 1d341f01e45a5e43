"""Dropout does nothing at inference."""

from __future__ import annotations

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule


class DropDropout(Rule):
    """Drop dropout.

    ## What it does
    Reports `nn.Dropout` layers and calls of `dropout`.

    ## Why vLLM wants it
    At inference dropout returns its input. As a layer it costs a call for every token, as a
    function it may even be active, since its `training` argument defaults to True.

    ## Example
        self.dropout = nn.Dropout(config.resid_pdrop)

    ## Use instead
        Nothing: write `hidden_states` where `self.dropout(hidden_states)` stood.

    ## Fix safety
    None: each use of the layer goes with it.

    ## References
    - vLLM guide, Basic model: 2. Make your code compatible with vLLM
    """

    VALID = [
        Valid("class A(nn.Module):\n    def forward(self, x):\n        return self.act(x)\n"),
        Valid("rate = config.attention_dropout\n"),
    ]
    INVALID = [
        Invalid(
            "class A(nn.Module):\n    def __init__(self):\n        self.drop = nn.Dropout(0.1)\n",
            line=3,
            names="drop",
        ),
        Invalid("def f(x):\n    return nn.functional.dropout(x, p=0.1)\n", line=2, names="dropout"),
    ]

    def visit_Call(self, node: cst.Call) -> None:
        dotted = self.source.dotted(node.func)
        if not dotted.startswith("torch.nn."):
            return
        name = dotted.rpartition(".")[2]
        if name.startswith("Dropout") or name.endswith("dropout"):
            statement = self.source.statement_of(node)
            target = (
                self.source.code(statement.targets[0].target)
                if isinstance(statement, cst.Assign)
                else ""
            )
            self.report(
                node,
                f"`{name}`{f' as `{target}`' if target else ''} does nothing at "
                "inference: drop it.",
            )
