"""What torch.compile and CUDA graphs record has no branches on values."""

from __future__ import annotations

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule

READS = frozenset(
    {"item", "any", "all", "max", "min", "sum", "tolist", "equal", "allclose", "nonzero"}
)


class AvoidTensorBranches(Rule):
    """Branch on no tensor's value in `forward`.

    ## What it does
    Reports `if`, `while` and conditional expressions of a `forward` whose condition reads a
    tensor: `.item()`, `.any()`, `.all()`, `.max()`, `torch.any(...)` and the like.

    ## Why vLLM wants it
    The model is compiled and recorded once and replayed for every batch: a branch on a value
    breaks the compilation or, recorded, goes the same way for ever. It also makes the GPU wait.

    ## Example
        if positions.max() > self.limit: ...

    ## Use instead
        x = torch.where(positions.unsqueeze(-1) > self.limit, a, b)

    ## Fix safety
    None: whether both sides may be computed is for you to see.

    ## References
    - vLLM guide, Basic model: 2. Make your code compatible with vLLM; vLLM pull request 12340
    """

    VALID = [
        Valid(
            """
            class A(nn.Module):
                def forward(self, x):
                    if x is None or x.shape[0] > 4:
                        return x
            """
        ),
        Valid(
            """
            class A(nn.Module):
                def load(self, x):
                    if x.max() > 4:
                        return x
            """
        ),
        Valid(
            """
            class A(nn.Module):
                def forward(self, x):
                    if max(self.sizes) > 4:
                        return x
            """
        ),
    ]
    INVALID = [
        Invalid(
            """
            class A(nn.Module):
                def forward(self, positions):
                    if positions.max() > 4:
                        return positions
            """,
            line=3,
            names="positions.max()",
        ),
        Invalid(
            """
            class A(nn.Module):
                def forward(self, x):
                    return x if torch.any(x > 0) else -x
            """,
            line=3,
            names="torch.any(x > 0)",
        ),
        Invalid(
            """
            class A(nn.Module):
                def forward(self, x, n):
                    while n.item() > 0:
                        n -= 1
            """,
            line=3,
            names="n.item()",
        ),
    ]

    def visit_If(self, node: cst.If) -> None:
        self._test(node.test)

    def visit_While(self, node: cst.While) -> None:
        self._test(node.test)

    def visit_IfExp(self, node: cst.IfExp) -> None:
        self._test(node.test)

    def _test(self, test: cst.BaseExpression) -> None:
        function = self.source.function_of(test)
        if (
            function is None
            or function.name.value != "forward"
            or self.source.class_of(test) is None
        ):
            return
        calls = _Calls()
        test.visit(calls)
        for call in calls.found:
            name = call.func.attr.value if isinstance(call.func, cst.Attribute) else ""
            if name in READS and not self.source.dotted(call.func).startswith(
                ("self.config", "config.")
            ):
                self.report(
                    call,
                    f"`{self.source.code(call)}` decides a branch of `forward`: compiled "
                    "and recorded "
                    "code cannot branch on a tensor's value; use torch.where.",
                )


class _Calls(cst.CSTVisitor):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[cst.Call] = []

    def visit_Call(self, node: cst.Call) -> None:
        self.found.append(node)
