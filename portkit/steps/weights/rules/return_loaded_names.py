"""`load_weights` says what it loaded."""

from __future__ import annotations

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule


class ReturnLoadedNames(Rule):
    """Return the set of loaded names from `load_weights`.

    ## What it does
    Reports a `load_weights` without a `return` of a value.

    ## Why vLLM wants it
    vLLM compares the returned names with the model's parameters and complains about what was
    never written. Returning None switches that check off: a parameter that nobody loaded keeps
    its random numbers, and the engine starts.

    ## Example
        def load_weights(self, weights):
            AutoWeightsLoader(self).load_weights(weights)

    ## Use instead
        def load_weights(self, weights):
            return AutoWeightsLoader(self).load_weights(weights)

    ## Fix safety
    Safe: offered where the last line calls a loader whose result is dropped.

    ## References
    - vLLM guide, Basic model: 4. Implement the weight loading logic
    - vllm/model_executor/model_loader/default_loader.py
    """

    fix_safety = "safe"

    VALID = [
        Valid(
            """
            class A:
                def load_weights(self, weights):
                    return loader.load_weights(weights)
            """
        ),
        Valid(
            """
            class A:
                def load_weights(self, weights):
                    loaded = set()
                    return loaded
            """
        ),
        Valid("class A:\n    def load_weights(self, weights):\n        yield 1\n"),
        Valid("class A:\n    def load_weights(self, weights): ...\n"),
    ]
    INVALID = [
        Invalid(
            """
            class A:
                def load_weights(self, weights):
                    loader = AutoWeightsLoader(self)
                    loader.load_weights(weights)
            """,
            line=2,
            names="A.load_weights",
            fixed="""
            class A:
                def load_weights(self, weights):
                    loader = AutoWeightsLoader(self)
                    return loader.load_weights(weights)
            """,
        ),
        Invalid(
            """
            class A:
                def load_weights(self, weights):
                    for name, tensor in weights:
                        self.params[name] = tensor
                    return None
            """,
            line=2,
            names="A.load_weights",
        ),
    ]

    def visit_FunctionDef(self, node: cst.FunctionDef) -> None:
        facts = self.source.class_of(node)
        if (
            facts is None
            or facts.methods.get("load_weights") is not node
            or not isinstance(node.body, cst.IndentedBlock)
        ):
            return
        returns = _Returns()
        node.body.visit(returns)
        if returns.found or self.source.code(node.body) in ("...", "pass"):
            return
        last = node.body.body[-1]
        fixed = self._returning(last)
        self.report(
            node,
            f"`{facts.name}.load_weights` returns nothing: return the set of names it "
            "loaded, or vLLM's "
            "check for missing weights is off.",
            replaces=last if fixed else node,
            replacement=fixed,
        )

    def _returning(self, last: cst.BaseStatement) -> cst.SimpleStatementLine | None:
        if not (isinstance(last, cst.SimpleStatementLine) and isinstance(last.body[-1], cst.Expr)):
            return None
        call = last.body[-1].value
        if (
            isinstance(call, cst.Call)
            and isinstance(call.func, cst.Attribute)
            and call.func.attr.value == "load_weights"
        ):
            return last.with_changes(body=[*last.body[:-1], cst.Return(call)])
        return None


class _Returns(cst.CSTVisitor):
    """Finds a return of something, or a yield, outside nested functions."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def visit_FunctionDef(self, node: cst.FunctionDef) -> bool:
        return False

    def visit_Return(self, node: cst.Return) -> None:
        if node.value is not None and not (
            isinstance(node.value, cst.Name) and node.value.value == "None"
        ):
            self.found = True

    def visit_Yield(self, node: cst.Yield) -> None:
        self.found = True
