"""vLLM's linears return a pair."""

from __future__ import annotations

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule
from portkit.lint.source import LINEAR_CLASSES, keyword, self_attribute


class UnpackLinearOutput(Rule):
    """Unpack what vLLM's linear layers return: `(output, bias)`.

    ## What it does
    Reports calls of a vLLM linear layer of the same class whose result is used as one tensor.

    ## Why vLLM wants it
    With `skip_bias_add` the bias is left to a fused kernel, so every linear returns a pair.
    Passing the pair on fails far away ("tuple has no attribute ...").

    ## Example
        x = self.down_proj(x)

    ## Use instead
        x, _ = self.down_proj(x)

    ## Fix safety
    Safe: the first of the pair is what `nn.Linear` returned (the bias is in it unless
    `skip_bias_add`).

    ## References
    - vllm/model_executor/layers/linear.py
    """

    fix_safety = "safe"

    VALID = [
        Valid(
            """
            class A(nn.Module):
                def __init__(self):
                    self.up = ColumnParallelLinear(4, 8)
                    self.one = ReplicatedLinear(4, 8, return_bias=False)
                def forward(self, x):
                    x, _ = self.up(x)
                    y = self.up(x)[0]
                    return self.one(y)
            """
        ),
        Valid(
            """
            class A(nn.Module):
                def __init__(self):
                    self.up = nn.Linear(4, 8)
                def forward(self, x):
                    return self.up(x)
            """
        ),
        Valid(
            """
            class A(nn.Module):
                def __init__(self):
                    self.up = ColumnParallelLinear(4, 8)
                def forward(self, x):
                    pair = self.up(x)
                    return pair[0]
            """
        ),
    ]
    INVALID = [
        Invalid(
            """
            class A(nn.Module):
                def __init__(self):
                    self.down = RowParallelLinear(8, 4)
                def forward(self, x):
                    x = self.down(x)
                    return x
            """,
            line=5,
            names="self.down",
            fixed="""
            class A(nn.Module):
                def __init__(self):
                    self.down = RowParallelLinear(8, 4)
                def forward(self, x):
                    x, _ = self.down(x)
                    return x
            """,
        ),
        Invalid(
            """
            class A(nn.Module):
                def __init__(self):
                    self.up = ColumnParallelLinear(4, 8)
                def forward(self, x):
                    return F.silu(self.up(x))
            """,
            line=5,
            names="self.up",
            fixed="""
            class A(nn.Module):
                def __init__(self):
                    self.up = ColumnParallelLinear(4, 8)
                def forward(self, x):
                    return F.silu(self.up(x)[0])
            """,
        ),
    ]

    def visit_Call(self, node: cst.Call) -> None:
        attribute = self_attribute(node.func)
        facts = self.source.class_of(node) if attribute else None
        if facts is None:
            return
        built = [layer for layer in facts.layers if layer.attribute == attribute]
        if not built or not all(self._returns_pair(layer.call) for layer in built):
            return
        parent = self.source.parents.get(node)
        if isinstance(parent, cst.Subscript) or self._keeps_pair(parent):
            return
        advice = f"`self.{attribute}` returns (output, bias): write `x, _ = self.{attribute}(...)`."
        if isinstance(parent, cst.Assign) and isinstance(parent.targets[0].target, cst.Name):
            pair = cst.Tuple(
                [cst.Element(parent.targets[0].target), cst.Element(cst.Name("_"))],
                lpar=[],
                rpar=[],
            )
            target = parent.targets[0].with_changes(target=pair)
            self.report(
                node,
                advice,
                replaces=parent,
                replacement=parent.with_changes(targets=[target]),
            )
        else:
            zero = cst.Subscript(node, [cst.SubscriptElement(cst.Index(cst.Integer("0")))])
            self.report(node, advice, replacement=zero)

    def _returns_pair(self, call: cst.Call) -> bool:
        if self.source.vllm_name(call.func) not in LINEAR_CLASSES:
            return False
        switch = keyword(call, "return_bias")
        return switch is None or self.source.code(switch.value) == "True"

    def _keeps_pair(self, parent: cst.CSTNode | None) -> bool:
        """True if the pair is unpacked, or kept under a name that is indexed or unpacked later."""
        if isinstance(parent, (cst.Assign, cst.AnnAssign)):
            target = parent.targets[0].target if isinstance(parent, cst.Assign) else parent.target
            if isinstance(target, (cst.Tuple, cst.List)):
                return True
            function = self.source.function_of(parent)
            name = self.source.code(target)
            text = self.source.code(function) if function is not None else ""
            return f"{name}[0]" in text or f"_ = {name}\n" in text
        return not isinstance(parent, (cst.Arg, cst.Return, cst.BinaryOperation, cst.Attribute))
