"""Positions come from the engine; the model must not count tokens."""

from __future__ import annotations

import re

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule

POSITION = re.compile(r"(^|_)(pos|position|positions|position_ids|cache_position)($|_)|wpe|rotary")


class UseGivenPositions(Rule):
    """Use the `positions` argument; do not count tokens.

    ## What it does
    Reports `torch.arange` or `cumsum` that makes positions in a `forward`.

    ## Why vLLM wants it
    A step may hold the end of one sequence, the middle of another and single new tokens of a
    third. Only the engine knows where each token stands. Counting is right for one prompt and
    wrong for batches, chunks and decoding; under rotary embedding only decoding shows it.

    ## Example
        position_ids = torch.arange(input_ids.shape[0], device=input_ids.device)

    ## Use instead
        def forward(self, input_ids, positions, ...): ...

    ## Fix safety
    None: `positions` may have to be passed down to where it is needed.

    ## References
    - vLLM guide, Basic model: 2. Make your code compatible with vLLM, Computation Code
    """

    VALID = [
        Valid(
            """
            class M(nn.Module):
                def forward(self, positions):
                    return self.wpe(positions)
            """
        ),
        Valid("class M(nn.Module):\n    def forward(self, x):\n        ids = torch.arange(4)\n"),
        Valid(
            "class M(nn.Module):\n    def __init__(self):\n        position_ids = torch.arange(4)\n"
        ),
    ]
    INVALID = [
        Invalid(
            """
            class M(nn.Module):
                def forward(self, x):
                    position_ids = torch.arange(x.shape[0])
            """,
            line=3,
            names="position_ids",
        ),
        Invalid(
            """
            class M(nn.Module):
                def forward(self, x):
                    return self.wpe(torch.arange(x.shape[0]))
            """,
            line=3,
            names="torch.arange",
        ),
    ]

    def visit_Call(self, node: cst.Call) -> None:
        dotted = self.source.dotted(node.func)
        method = node.func.attr.value if isinstance(node.func, cst.Attribute) else ""
        if dotted != "torch.arange" and method != "cumsum" and dotted != "torch.cumsum":
            return
        function = self.source.function_of(node)
        if (
            function is None
            or function.name.value != "forward"
            or self.source.class_of(node) is None
        ):
            return
        for parent in self.source.ancestors(node):
            if isinstance(parent, (cst.Assign, cst.AnnAssign)):
                target = (
                    parent.targets[0].target if isinstance(parent, cst.Assign) else parent.target
                )
                name = self.source.code(target)
            elif isinstance(parent, cst.Call):
                name = self.source.dotted(parent.func).rpartition(".")[2]
            elif isinstance(parent, cst.BaseStatement):
                return
            else:
                continue
            if POSITION.search(name):
                what = f"`{name}`" if not isinstance(parent, cst.Call) else f"the input of `{name}`"
                self.report(
                    node,
                    f"{what} is counted with `{dotted or method}`: use the `positions` argument "
                    "that vLLM passes; counting is wrong in batches, chunks and decoding.",
                )
                return
