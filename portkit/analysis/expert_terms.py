"""What one expert computes on its tokens, as a term; see `Expert`."""

from __future__ import annotations

import ast
from typing import Any

from portkit.analysis.classes import ClassView, argument, call_name, text
from portkit.analysis.symbolic import CannotTell, Interpreter

_CASTS = ("to", "type", "type_as", "float")


def stacked_parameters(view: ClassView, dimensions: int = 3) -> dict[str, tuple[ast.expr, ...]]:
    """Attribute → sizes of each parameter with so many dimensions: three for experts' weights."""
    found = {}
    for item in view.assigned:
        if not call_name(item.value).endswith("Parameter") or not item.value.args:
            continue
        inner = item.value.args[0]
        if isinstance(inner, ast.Call) and call_name(inner).startswith("torch."):
            sizes = inner.args
            if len(sizes) == 1 and isinstance(sizes[0], ast.Tuple):
                sizes = sizes[0].elts
            if len(sizes) == dimensions:
                found[item.attr] = tuple(sizes)
    return found


class Expert(Interpreter):
    """One expert on its tokens.

    Values are terms: ("x",), ("weight",), ("stack", attr), ("expert", attr), ("turned", attr) for
    an expert's .T, ("linear", attr, x, transposed), ("biased", linear, attr), ("act", name, x),
    ("part", x, i), ("every", x, i) for x[..., i::2], ("mul", x, y), ("add", x, number),
    ("neg", x), ("clamp", x, low, high), ("sigmoid", x), ("own", source) for a number of the class.
    """

    def __init__(self, view: ClassView, stacked: set[str], biases: set[str]) -> None:
        self.view, self.stacked, self.biases = view, stacked | biases, biases
        self.handed_on_from = ""
        """Number of the first expert that returns its tokens as they are, as source."""
        self.viewed: dict[str, tuple[str, str]] = {}
        """Sizes [out, in] (or turned) of each expert's part of a parameter with two dimensions."""

    def follow(self, body: list[ast.stmt], values: dict[str, Any]) -> Any:
        """Value that the loop adds to the result."""
        for node in body:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                if call_name(node.value).endswith(".index_add_"):
                    return self.value(node.value.args[2], values)
                continue
            if isinstance(node, ast.If):
                self._choice(node, values)
            if isinstance(node, ast.Assign | ast.AnnAssign):
                self._block([node], values)
        raise CannotTell(f"{self.view.name} adds nothing by index_add_", self.view.node)

    def _choice(self, node: ast.If, values: dict[str, Any]) -> None:
        """`if expert >= n: y = x`, else what experts do: experts from n on hand their tokens on.

        Other branches must not assign: those that skip an expert without tokens, say.
        """
        assigned = [n for n in ast.walk(node) if isinstance(n, ast.Assign | ast.AugAssign)]
        if not assigned:
            return
        tests = node.test.values if isinstance(node.test, ast.BoolOp) else [node.test]
        made = [t for t in tests if text(t).removesuffix(" is None") not in self._parameters()]
        yes = dict(values)
        self._block(node.body, yes)
        changed = {n: v for n, v in yes.items() if n not in values or values[n] != v}
        many = made[0] if len(made) == 1 and isinstance(made[0], ast.Compare) else None
        if (
            many is None
            or not isinstance(many.ops[0], ast.GtE)
            or set(changed.values()) != {("x",)}
            or (len(tests) > 1 and not isinstance(node.test.op, ast.Or))
        ):
            raise CannotTell(f"cannot follow `if {text(node.test)}`", node)
        count = self.view.resolve(many.comparators[0])
        self.handed_on_from = text(count).replace("self.config.", "config.")
        self._block(node.orelse, values)

    def _parameters(self) -> set[str]:
        return {f"self.{attr}" for attr in self.stacked}

    def attribute(self, node: ast.Attribute, values: dict[str, Any]) -> Any:
        if text(node.value) == "self" and node.attr in self.stacked:
            return ("stack", node.attr)
        if text(node.value) == "self" and self.view.get(node.attr) is not None:
            return ("own", text(self.view.resolve(node)).replace("self.config.", "config."))
        if node.attr == "T" and text(node.value) != "self":
            inner = self.value(node.value, values)
            if inner[0] == "expert":
                return ("turned", inner[1])
        return super().attribute(node, values)

    def subscript(self, node: ast.Subscript, values: dict[str, Any]) -> Any:
        inner = self.value(node.value, values)
        if inner[0] == "stack":
            return ("expert", inner[1])
        if inner in (("x",), ("weight",)):
            return inner
        written = {"..., ::2": 0, "..., 0::2": 0, "..., 1::2": 1}.get(text(node.slice).strip("()"))
        if written is not None:
            return ("every", inner, written)
        return super().subscript(node, values)

    def binary(self, node: ast.BinOp, left: Any, right: Any) -> Any:
        if isinstance(node.op, ast.Mult):
            return ("mul", left, right)
        if isinstance(node.op, ast.MatMult) and right[0] in ("expert", "turned"):
            return ("linear", right[1], left, right[0] == "expert")
        if isinstance(node.op, ast.Add):
            for x, y in ((left, right), (right, left)):
                if isinstance(y, int | float):
                    return ("add", x, y)
                if self._is_bias(y) and x[0] == "linear":
                    return ("biased", x, y[1])
        return super().binary(node, left, right)

    def unary(self, node: ast.UnaryOp, operand: Any) -> Any:
        return ("neg", operand) if isinstance(node.op, ast.USub) else super().unary(node, operand)

    def _is_bias(self, term: Any) -> bool:
        is_expert = isinstance(term, tuple) and term[0] == "expert"
        return is_expert and term[1] in self.biases and term[1] not in self.viewed

    def _viewed(self, node: ast.Call, inner: Any) -> Any:
        """stack.view(-1, a, b) has an entry for each expert; x.view(-1, a) has the same rows."""
        shape = node.args[0] if len(node.args) == 1 else ast.Tuple(node.args, ast.Load())
        if isinstance(shape, ast.Name):
            made = [
                n.value
                for n in ast.walk(self.view.forward)
                if isinstance(n, ast.Assign) and text(n.targets[0]) == shape.id
            ]
            shape = made[0] if len(made) == 1 else shape
        sizes = shape.elts if isinstance(shape, ast.Tuple) else []
        first = text(sizes[0]) if sizes else ""
        if inner[0] == "stack" and len(sizes) == 3 and first == "-1":
            out, into = (
                text(self.view.resolve(s)).replace("self.config.", "config.") for s in sizes[1:]
            )
            self.viewed[inner[1]] = (out, into)
            return inner
        if inner[0] != "stack" and len(sizes) == 2 and first == "-1":
            return inner
        raise CannotTell(f"cannot follow `{text(node)}`", node)

    def _method(self, function: ast.FunctionDef, given: list[Any], node: ast.Call) -> Any:
        """What a method of the class's own makes of these values."""
        names = [a.arg for a in function.args.args[1:]]
        if len(names) != len(given) or node.keywords:
            raise CannotTell(f"cannot follow `{text(node)}`", node)
        return self.run(function, dict(zip(names, given, strict=True)))

    def call(self, node: ast.Call, values: dict[str, Any]) -> Any:
        name = call_name(node)
        short = name.rsplit(".", 1)[-1]
        if short == "linear" and len(node.args) == 2 and not node.keywords:
            x, weight = (self.value(a, values) for a in node.args)
            if weight[0] == "expert":
                return ("linear", weight[1], x, False)
        if short == "linear" and len(node.args) == 3 and not node.keywords:
            x, weight, bias = (self.value(a, values) for a in node.args)
            if weight[0] == "expert" and self._is_bias(bias):
                return ("biased", ("linear", weight[1], x, False), bias[1])
        attr = name.removeprefix("self.")
        if name.startswith("self.") and attr in self.view.methods:
            given = [self.value(a, values) for a in node.args]
            return self._method(self.view.methods[attr], given, node)
        if short == "sigmoid":
            return ("sigmoid", self.value(node.args[0] if node.args else node.func.value, values))
        if name.startswith("self.") and len(node.args) == 1:
            made = self.view.get(attr)
            if made is not None and text(made.value) == "nn.Identity()":
                return self.value(node.args[0], values)
            if made is not None:
                return ("act", text(made.value), self.value(node.args[0], values))
        if isinstance(node.func, ast.Attribute):
            if short == "chunk" and (
                text(argument(node, 0, "chunks")),
                text(argument(node, 1, "dim")),
            ) == ("2", "-1"):
                inner = self.value(node.func.value, values)
                return (("part", inner, 0), ("part", inner, 1))
            if short in _CASTS:
                return self.value(node.func.value, values)
            if short in ("view", "reshape") and not node.keywords:
                return self._viewed(node, self.value(node.func.value, values))
            if short == "matmul" and len(node.args) == 1:
                return self.binary(
                    ast.copy_location(
                        ast.BinOp(node.func.value, ast.MatMult(), node.args[0]), node
                    ),
                    self.value(node.func.value, values),
                    self.value(node.args[0], values),
                )
            if short in ("clamp", "clip"):
                inner = self.value(node.func.value, values)
                low, high = (argument(node, i, n) for i, n in ((0, "min"), (1, "max")))
                ends = [self.value(e, values) if e is not None else None for e in (low, high)]
                return ("clamp", inner, *ends)
        return super().call(node, values)
