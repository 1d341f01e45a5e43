"""Facts of feed-forward classes: which known shape one computes."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Any

from portkit.analysis.classes import ClassView, argument, call_name, text
from portkit.analysis.facts import MlpFacts
from portkit.analysis.read_blocks import linears_of
from portkit.analysis.symbolic import CannotTell, Interpreter

if TYPE_CHECKING:
    from portkit.analysis.read import Reader


class _Mlp(Interpreter):
    """Values are terms: ("x",), ("linear", attr, t), ("act", t), ("mul", t, u), ("part", t, i)."""

    def __init__(self, view: ClassView, linears: set[str]) -> None:
        self.view, self.linears = view, linears

    def binary(self, node: ast.BinOp, left: Any, right: Any) -> Any:
        if isinstance(node.op, ast.Mult):
            return ("mul", left, right)
        return super().binary(node, left, right)

    def call(self, node: ast.Call, values: dict[str, Any]) -> Any:
        name = call_name(node)
        attr = name.removeprefix("self.")
        if name.endswith("functional.dropout") or name == "F.dropout":
            return self.value(node.args[0], values)
        if name.startswith("self.") and "." not in attr and node.args:
            inner = self.value(node.args[0], values)
            if attr in self.linears:
                return ("linear", attr, inner)
            made = self.view.get(attr)
            if made is not None and "Dropout" in text(made.value):
                return inner
            if made is not None and ("ACT2FN" in text(made.value) or "act" in attr):
                return ("act", attr, inner)
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("chunk", "unflatten"):
            shape = (text(argument(node, 0, "chunks")), text(argument(node, 1, "dim")))
            if shape in (("2", "-1"), ("-1", "(2, -1)")):
                inner = self.value(node.func.value, values)
                return (("part", inner, 0), ("part", inner, 1))
        return super().call(node, values)

    def subscript(self, node: ast.Subscript, values: dict[str, Any]) -> Any:
        parts, at = self.value(node.value, values), text(node.slice)
        at = {"..., 0, :": "0", "..., 1, :": "1"}.get(at.strip("()"), at)
        if at in ("0", "1") and len(parts) == 2 and all(p[0] == "part" for p in parts):
            return parts[int(at)]
        return super().subscript(node, values)


def read_mlp(reader: Reader, view: ClassView) -> MlpFacts:
    """Which known shape the class computes: gated, gated with one fused linear, or plain."""
    linears = linears_of(view)
    acts = [a for a in view.assigned if "ACT2FN" in text(a.value) or "act" in a.attr]
    activation = text(acts[0].value) if acts else ""
    why = ""
    try:
        forward = view.forward
        if forward is None or len(forward.args.args) < 2:
            raise CannotTell(f"{view.name} has no forward(x)", view.node)
        term = _Mlp(view, set(linears)).run(forward, {forward.args.args[1].arg: ("x",)})
        match term:
            case (
                "linear",
                down,
                ("mul", ("act", act, ("linear", gate, ("x",))), ("linear", up, ("x",))),
            ) | (
                "linear",
                down,
                ("mul", ("linear", up, ("x",)), ("act", act, ("linear", gate, ("x",)))),
            ):
                return MlpFacts(
                    view.name,
                    view.line,
                    "gated",
                    linears[gate],
                    linears[up],
                    linears[down],
                    act,
                    activation,
                )
            case (
                "linear",
                down,
                ("mul", ("act", act, ("part", ("linear", up, ("x",)), 0)), ("part", _, 1)),
            ) | (
                "linear",
                down,
                ("mul", ("part", _, 1), ("act", act, ("part", ("linear", up, ("x",)), 0))),
            ):
                return MlpFacts(
                    view.name,
                    view.line,
                    "gated_fused",
                    None,
                    linears[up],
                    linears[down],
                    act,
                    activation,
                )
            case ("linear", down, ("act", act, ("linear", up, ("x",)))):
                return MlpFacts(
                    view.name, view.line, "plain", None, linears[up], linears[down], act, activation
                )
        why, line = (
            f"{view.name} is neither down(act(gate(x)) * up(x)) nor down(act(up(x)))",
            forward.lineno,
        )
    except CannotTell as unknown:
        why, line = unknown.what, unknown.line or view.line
    if all(
        linear.cls.endswith("nn.Linear") or linear.cls == "Linear" for linear in linears.values()
    ):
        reader.cannot_tell("mlp", why, line)
    return MlpFacts(
        view.name,
        view.line,
        "unknown",
        None,
        None,
        None,
        acts[0].attr if acts else "",
        activation,
        why,
    )
