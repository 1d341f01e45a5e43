"""Facts of stacked experts: what the loop over the experts computes for one of them."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

from portkit.analysis.classes import ClassView, argument, call_name, text
from portkit.analysis.expert_gates import clamped_gate
from portkit.analysis.moe_facts import ExpertsFacts
from portkit.analysis.symbolic import CannotTell, Interpreter

_CASTS = ("to", "type", "type_as", "float")


def is_experts(view: ClassView) -> bool:
    """Keeps parameters with one entry per expert, and takes (hidden, index, weights)."""
    if view.forward is None or len(view.forward.args.args) != 4:
        return False
    if "one_hot(" not in text(view.forward):
        return False
    return len(stacked_parameters(view)) >= 2


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


class _Expert(Interpreter):
    """One expert on its tokens.

    Values are terms: ("x",), ("weight",), ("stack", attr), ("expert", attr), ("linear", attr, x,
    transposed), ("biased", linear, attr), ("act", name, x), ("part", x, i), ("every", x, i) for
    x[..., i::2], ("mul", x, y), ("add", x, number), ("neg", x), ("clamp", x, low, high),
    ("sigmoid", x), ("own", source) for a number that the class keeps.
    """

    def __init__(self, view: ClassView, stacked: set[str], biases: set[str]) -> None:
        self.view, self.stacked, self.biases = view, stacked | biases, biases

    def follow(self, body: list[ast.stmt], values: dict[str, Any]) -> Any:
        """Value that the loop adds to the result."""
        for node in body:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                if call_name(node.value).endswith(".index_add_"):
                    return self.value(node.value.args[2], values)
                continue
            if isinstance(node, ast.Assign | ast.AnnAssign):
                self._block([node], values)
        raise CannotTell(f"{self.view.name} adds nothing by index_add_", self.view.node)

    def attribute(self, node: ast.Attribute, values: dict[str, Any]) -> Any:
        if text(node.value) == "self" and node.attr in self.stacked:
            return ("stack", node.attr)
        if text(node.value) == "self" and self.view.get(node.attr) is not None:
            return ("own", text(self.view.resolve(node)).replace("self.config.", "config."))
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
        if isinstance(node.op, ast.MatMult) and right[0] == "expert":
            return ("linear", right[1], left, True)
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
        return isinstance(term, tuple) and term[0] == "expert" and term[1] in self.biases

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
            if short in ("clamp", "clip"):
                inner = self.value(node.func.value, values)
                low, high = (argument(node, i, n) for i, n in ((0, "min"), (1, "max")))
                ends = [self.value(e, values) if e is not None else None for e in (low, high)]
                return ("clamp", inner, *ends)
        return super().call(node, values)


def read_experts(view: ClassView) -> ExpertsFacts:
    """Facts of an experts class; `why` says what vLLM's fused experts could not do."""
    stacked = stacked_parameters(view)
    parameters = [a.arg for a in view.forward.args.args[1:]]
    index, weights = _index_and_weights(view.forward, parameters)
    biases = stacked_parameters(view, 2)
    gated = Gated("", "", "", False)
    why = ""
    try:
        loop = next(
            (
                n
                for n in ast.walk(view.forward)
                if isinstance(n, ast.For) and ".index_add_(" in text(n)
            ),
            None,
        )
        if loop is None:
            raise CannotTell(f"{view.name} has no loop over its experts", view.forward)
        expert = _Expert(view, set(stacked), set(biases))
        term = expert.follow(loop.body, {parameters[0]: ("x",), weights: ("weight",)})
        gated = _gated(view, term)
    except CannotTell as unknown:
        why = unknown.what
    sizes = _sizes(view, stacked.get(gated.down), gated.transposed)
    return ExpertsFacts(
        view.name,
        view.line,
        gated.gate_up,
        gated.down,
        *sizes,
        gated.activation,
        gated.transposed,
        index,
        weights,
        parameters.index(index) < parameters.index(weights),
        why,
        gated.biases,
        gated.clamp,
        has_gate=gated.has_gate,
    )


@dataclass(frozen=True)
class Gated:
    """down(act(gate) * up): the parameters' attributes and the activation's name."""

    gate_up: str
    down: str
    activation: str
    transposed: bool
    biases: tuple[str, ...] = ()
    """Those of gate_up and down, where they have any."""
    clamp: tuple[str, str] = ("", "")
    """alpha and limit of a swigluoai."""
    has_gate: bool = True


def _gated(view: ClassView, term: Any) -> Gated:
    """The parts of down(act(gate) * up) * weight, or of down(act(up)) * weight."""
    match term:
        case ("mul", body, ("weight",)) | ("mul", ("weight",), body):
            pass
        case _:
            raise CannotTell(f"{view.name} does not weigh each expert's output", view.node)
    body, *bias_down = _without_bias(body)
    if body[0] == "linear" and (found := clamped_gate(body[2])) is not None:
        first, *bias_up = _without_bias(found.projection)
        match first:
            case ("linear", gate_up, ("x",), same) if same == body[3]:
                biases = (*bias_up, *bias_down)
                if len(biases) in (0, 2):
                    constants = (found.alpha, found.limit)
                    return Gated(gate_up, body[1], '"swigluoai"', same, biases, constants)
    if bias_down:
        raise CannotTell("its experts have biases and a gate that vLLM has not", view.node)
    match body:
        case ("linear", down, ("act", act, ("linear", up, ("x",), same)), turned) if same == turned:
            return Gated(up, down, _activation(view, act), turned, has_gate=False)
        case (
            "linear",
            down,
            ("mul", ("act", act, ("part", first, 0)), ("part", second, 1)),
            turned,
        ) | (
            "linear",
            down,
            ("mul", ("part", second, 1), ("act", act, ("part", first, 0))),
            turned,
        ) if first == second:
            match first:
                case ("linear", gate_up, ("x",), same) if same == turned:
                    return Gated(gate_up, down, _activation(view, act), turned)
    raise CannotTell("its experts are neither down(act(gate) * up) nor down(act(up))", view.node)


def _without_bias(term: Any) -> tuple[Any, ...]:
    """(linear, attribute of its bias) or (term,)."""
    return (term[1], term[2]) if term[0] == "biased" else (term,)


def _activation(view: ClassView, made: str) -> str:
    """The activation's name, from ACT2FN[name] or a function of torch."""
    if made.startswith("ACT2FN[") and made.endswith("]"):
        return made.removeprefix("ACT2FN[").removesuffix("]").replace("self.config.", "config.")
    short = made.removesuffix("()").rsplit(".", 1)[-1].lower()
    if short in ("silu", "gelu"):
        return f'"{short}"'
    raise CannotTell(f"{view.name}: {made} is no activation that vLLM's experts have", view.node)


def _sizes(
    view: ClassView, sizes: tuple[ast.expr, ...] | None, transposed: bool
) -> tuple[str, str, str]:
    """(experts, hidden size, intermediate size) from the sizes of the down projection."""
    if sizes is None:
        return "", "", ""
    shown = [text(view.resolve(s)).replace("self.config.", "config.") for s in sizes]
    return (shown[0], shown[2], shown[1]) if transposed else (shown[0], shown[1], shown[2])


def _index_and_weights(forward: ast.FunctionDef, parameters: list[str]) -> tuple[str, str]:
    """Which of forward's parameters are the chosen experts: the one that is one-hot encoded."""
    for node in ast.walk(forward):
        if isinstance(node, ast.Call) and call_name(node).endswith("one_hot") and node.args:
            name = text(node.args[0])
            rest = [p for p in parameters[1:] if p != name]
            if name in parameters and len(rest) == 1:
                return name, rest[0]
    return parameters[1], parameters[2]
