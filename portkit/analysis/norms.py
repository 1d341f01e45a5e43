"""What a normalisation class computes, found by running its `forward` on formulas.

The formula decides whether vLLM's RMSNorm may take the class's place: (1 + w) instead of w, a mean
that is subtracted, or a bias are different functions with the same shapes and the same names.
"""

from __future__ import annotations

import ast
from typing import Any, Literal

from portkit.analysis.classes import ClassView, call_name, text
from portkit.analysis.symbolic import CannotTell, Interpreter

Formula = Literal[
    "rms", "rms_fp32_weight", "rms_one_plus_weight", "rms_no_weight", "layernorm", "unknown"
]
"""rms: w * (x * rsqrt(mean(x^2) + eps)), statistics in float32, cast back before the weight.
rms_fp32_weight: the same, multiplied by the weight in float32 and cast back after.
rms_one_plus_weight: Gemma's, multiplied by (1 + w) in float32.
layernorm: a mean is subtracted."""

# Terms are nested tuples: ("x",), ("w",), ("eps",), ("f32", t), ("in", t), ("mul", t, u), ...
X, W, B, EPS = ("x",), ("w",), ("b",), ("eps",)
_PLAIN = ("mul", ("f32", X), ("rsqrt", ("add", ("mean", ("square", ("f32", X))), EPS)))


def _sorted(operator: str, left: Any, right: Any) -> tuple[Any, ...]:
    first, second = sorted((left, right), key=repr)
    return (operator, first, second)


def _normal(term: Any) -> Any:
    """Order the operands of + and *, and drop casts that change nothing."""
    if not isinstance(term, tuple):
        return term
    parts = tuple(_normal(part) for part in term[1:])
    if term[0] in ("add", "mul"):
        return _sorted(term[0], *parts)
    if term[0] == "f32" and isinstance(parts[0], tuple) and _is_f32(parts[0]):
        return parts[0]
    if term[0] == "in" and parts[0] == X:
        return X
    return (term[0], *parts)


def _is_f32(term: tuple[Any, ...]) -> bool:
    if term[0] in ("x", "w", "b", "in"):
        return False
    return term[0] == "f32" or any(isinstance(part, tuple) and _is_f32(part) for part in term[1:])


class _Formula(Interpreter):
    """Values are terms; `self.weight`, `self.bias` and the epsilon are the leaves."""

    def __init__(self, view: ClassView) -> None:
        self.view = view

    def binary(self, node: ast.BinOp, left: Any, right: Any) -> Any:
        if isinstance(node.op, ast.Add):
            return ("add", left, right)
        if isinstance(node.op, ast.Sub):
            return ("sub", left, right)
        if isinstance(node.op, ast.Mult):
            return ("square", left) if left == right else ("mul", left, right)
        if isinstance(node.op, ast.Pow) and right == 2:
            return ("square", left)
        if isinstance(node.op, ast.Pow) and right == -0.5:
            return ("rsqrt", left)
        if isinstance(node.op, ast.Div) and isinstance(right, tuple) and right[0] == "sqrt":
            return ("mul", left, ("rsqrt", right[1]))
        return super().binary(node, left, right)

    def unary(self, node: ast.UnaryOp, operand: Any) -> Any:
        if isinstance(node.op, ast.USub) and isinstance(operand, int | float):
            return -operand
        return super().unary(node, operand)

    def attribute(self, node: ast.Attribute, values: dict[str, Any]) -> Any:
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            if node.attr == "weight":
                return W
            if node.attr == "bias":
                return B
            if "eps" in node.attr:
                return EPS
        if text(node) in ("torch.float32", "torch.float"):
            return "f32"
        if node.attr == "dtype" and self.value(node.value, values) == X:
            return "in"
        return super().attribute(node, values)

    def call(self, node: ast.Call, values: dict[str, Any]) -> Any:
        name = call_name(node)
        arguments = [self.value(a, values) for a in node.args]
        keywords = {k.arg: self.value(k.value, values) for k in node.keywords if k.arg}
        if name in ("torch.rsqrt", "torch.sqrt", "torch.square"):
            return (name.removeprefix("torch."), arguments[0])
        if name == "torch.mean":
            return self._mean(node, arguments[0], arguments[1:], keywords)
        if not isinstance(node.func, ast.Attribute):
            return super().call(node, values)
        method = node.func.attr
        if isinstance(node.func.value, ast.Name) and node.func.value.id == "self":
            helper = self.view.methods.get(method)
            if helper is None:
                return super().call(node, values)
            return self.run(
                helper, dict(zip([a.arg for a in helper.args.args[1:]], arguments, strict=False))
            )
        subject = self.value(node.func.value, values)
        if method == "float":
            return ("f32", subject)
        if method in ("to", "type"):
            kind = arguments[0] if arguments else keywords.get("dtype")
            if kind in ("f32", "in"):
                return (kind, subject)
        if method == "type_as" and arguments[0] == X:
            return ("in", subject)
        if method == "pow" and arguments == [2]:
            return ("square", subject)
        if method in ("square", "rsqrt", "sqrt"):
            return (method, subject)
        if method == "mean":
            return self._mean(node, subject, arguments, keywords)
        return super().call(node, values)

    def _mean(
        self, node: ast.Call, subject: Any, arguments: list[Any], keywords: dict[str, Any]
    ) -> Any:
        dimension = arguments[0] if arguments else keywords.get("dim")
        if dimension not in (-1, (-1,)) or not keywords.get("keepdim"):
            raise CannotTell("the mean is not over the last dimension", node)
        return ("mean", subject)


_FORMULAS: dict[Any, Formula] = {
    _normal(("mul", W, ("in", _PLAIN))): "rms",
    _normal(("in", ("mul", ("f32", W), _PLAIN))): "rms_fp32_weight",
    _normal(("in", ("mul", W, _PLAIN))): "rms_fp32_weight",
    _normal(("in", ("mul", _PLAIN, ("add", 1.0, ("f32", W))))): "rms_one_plus_weight",
    _normal(("in", _PLAIN)): "rms_no_weight",
}


def is_norm(view: ClassView) -> bool:
    """Does the class look like a normalisation: one input, a mean and a root inside?"""
    forward = view.forward
    if forward is None or len(forward.args.args) != 2:
        return False
    calls = {call_name(n).rsplit(".", 1)[-1] for m in view.methods.values() for n in ast.walk(m)}
    return bool(calls & {"rsqrt", "sqrt"}) and "mean" in calls


def formula_of(view: ClassView) -> tuple[Formula, str, int]:
    """(formula, why it is unknown, line). Runs `forward(x)` symbolically."""
    forward = view.forward
    if forward is None or len(forward.args.args) != 2:
        return "unknown", f"{view.name}.forward does not take exactly one tensor", view.line
    try:
        term = _normal(_Formula(view).run(forward, {forward.args.args[1].arg: X}))
    except CannotTell as unknown:
        return "unknown", unknown.what, unknown.line or forward.lineno
    if term in _FORMULAS:
        return _FORMULAS[term], "", forward.lineno
    if "'sub'" in repr(term):
        return "layernorm", "", forward.lineno
    return "unknown", f"{view.name} computes none of the formulas portkit knows", forward.lineno
