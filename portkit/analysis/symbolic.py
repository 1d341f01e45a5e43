"""A tiny interpreter for straight-line tensor code, over whatever values a domain defines.

`norms` runs it with formulas as values, `rotary` with vectors of names: instead of recognising
known spellings, we compute what the code computes. Code it does not understand raises `CannotTell`
with the line, so a fact is either known or said to be unknown.
"""

from __future__ import annotations

import ast
from typing import Any

from portkit.analysis.classes import text


class CannotTell(Exception):
    """The interpreter met code whose meaning it does not know."""

    def __init__(self, what: str, node: ast.AST | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.line = getattr(node, "lineno", 0)


class Interpreter:
    """Runs a function body on symbolic values; subclasses give meaning to operations."""

    def run(self, function: ast.FunctionDef, values: dict[str, Any]) -> Any:
        """Value of the function's return statement."""
        result = self._block(function.body, dict(values))
        if result is None:
            raise CannotTell(f"{function.name} returns nothing", function)
        return result[0]

    def _block(self, body: list[ast.stmt], values: dict[str, Any]) -> tuple[Any] | None:
        for statement in body:
            if isinstance(statement, ast.Return) and statement.value is not None:
                return (self.value(statement.value, values),)
            if isinstance(statement, ast.Assign):
                try:
                    value = self.value(statement.value, values)
                except CannotTell as unknown:
                    # Told only if it is used: a device's name, say, changes nothing here.
                    for target in statement.targets:
                        for name in ast.walk(target):
                            if isinstance(name, ast.Name):
                                values[name.id] = unknown
                    continue
                for target in statement.targets:
                    self._bind(target, value, values)
            elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
                self._bind(statement.target, self.value(statement.value, values), values)
            elif isinstance(statement, ast.With):
                result = self._block(statement.body, values)
                if result is not None:
                    return result
            elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                continue
            else:
                raise CannotTell(f"cannot follow `{text(statement).splitlines()[0]}`", statement)
        return None

    def _bind(self, target: ast.expr, value: Any, values: dict[str, Any]) -> None:
        if isinstance(target, ast.Name):
            values[target.id] = value
        elif (
            isinstance(target, ast.Tuple)
            and isinstance(value, tuple)
            and len(value) == len(target.elts)
        ):
            for element, part in zip(target.elts, value, strict=False):
                self._bind(element, part, values)
        else:
            raise CannotTell(f"cannot follow the assignment to `{text(target)}`", target)

    def value(self, node: ast.expr, values: dict[str, Any]) -> Any:
        if isinstance(node, ast.Name):
            if node.id in values:
                if isinstance(values[node.id], CannotTell):
                    raise values[node.id]
                return values[node.id]
            return self.free(node)
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Tuple | ast.List):
            return tuple(self.value(element, values) for element in node.elts)
        if isinstance(node, ast.BinOp):
            return self.binary(node, self.value(node.left, values), self.value(node.right, values))
        if isinstance(node, ast.UnaryOp):
            return self.unary(node, self.value(node.operand, values))
        if isinstance(node, ast.Call):
            return self.call(node, values)
        if isinstance(node, ast.Attribute):
            return self.attribute(node, values)
        if isinstance(node, ast.Subscript):
            return self.subscript(node, values)
        raise CannotTell(f"cannot follow `{text(node)}`", node)

    def free(self, node: ast.Name) -> Any:
        raise CannotTell(f"does not know the name {node.id!r}", node)

    def binary(self, node: ast.BinOp, left: Any, right: Any) -> Any:
        raise CannotTell(f"cannot follow `{text(node)}`", node)

    def unary(self, node: ast.UnaryOp, operand: Any) -> Any:
        raise CannotTell(f"cannot follow `{text(node)}`", node)

    def call(self, node: ast.Call, values: dict[str, Any]) -> Any:
        raise CannotTell(f"cannot follow `{text(node)}`", node)

    def attribute(self, node: ast.Attribute, values: dict[str, Any]) -> Any:
        raise CannotTell(f"cannot follow `{text(node)}`", node)

    def subscript(self, node: ast.Subscript, values: dict[str, Any]) -> Any:
        raise CannotTell(f"cannot follow `{text(node)}`", node)
