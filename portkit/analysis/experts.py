"""Facts of stacked experts: what the loop over the experts computes for one of them."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import Any

from portkit.analysis.classes import ClassView, call_name, text
from portkit.analysis.expert_gates import clamped_gate
from portkit.analysis.expert_terms import Expert, stacked_parameters
from portkit.analysis.moe_facts import ExpertsFacts
from portkit.analysis.symbolic import CannotTell


def is_experts(view: ClassView) -> bool:
    """Keeps parameters with one entry per expert, and takes (hidden, index, weights)."""
    if view.forward is None or len(view.forward.args.args) != 4:
        return False
    if "one_hot(" not in text(view.forward):
        return False
    flat = stacked_parameters(view, 2) if ".view(" in text(view.forward) else {}
    return len(stacked_parameters(view)) >= 2 or len(flat) == 3


def read_experts(view: ClassView) -> ExpertsFacts:
    """Facts of an experts class; `why` says what vLLM's fused experts could not do."""
    stacked = stacked_parameters(view)
    parameters = [a.arg for a in view.forward.args.args[1:]]
    index, weights = _index_and_weights(view.forward, parameters)
    biases = stacked_parameters(view, 2)
    gated = Gated("", "", "", False)
    why, sizes, handed_on_from = "", ("", "", ""), ""
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
        expert = Expert(view, set(stacked), set(biases))
        term = expert.follow(loop.body, {parameters[0]: ("x",), weights: ("weight",)})
        gated, handed_on_from = _gated(view, term), expert.handed_on_from
        sizes = _sizes(view, stacked.get(gated.down), gated.transposed)
        if gated.parts:
            rows, columns = expert.viewed.get(gated.down, ("", ""))
            sizes = (_count(view, biases.get(gated.down, ()), expert.viewed), columns, rows)
    except CannotTell as unknown:
        why = unknown.what
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
        parts=gated.parts,
        handed_on_from=handed_on_from,
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
    parts: tuple[str, ...] = ()
    """gate, down and up, where each is a parameter."""


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
            ("mul", ("act", act, ("linear", gate, ("x",), False)), ("linear", up, ("x",), False)),
            True,
        ):
            parts = (gate, down, up)
            return Gated("", down, _activation(view, act), True, parts=parts)
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
        name = ast.parse(made.removeprefix("ACT2FN[").removesuffix("]"), mode="eval").body
        return text(view.resolve(name)).replace("self.config.", "config.")
    short = made.removesuffix("()").rsplit(".", 1)[-1].lower()
    if short in ("silu", "gelu"):
        return f'"{short}"'
    raise CannotTell(f"{view.name}: {made} is no activation that vLLM's experts have", view.node)


def _count(view: ClassView, sizes: tuple[ast.expr, ...], viewed: dict[str, tuple[str, str]]) -> str:
    """The number of experts: what a parameter of two dimensions has beside one expert's rows."""
    if len(set(viewed.values())) != 1 or len(viewed) != 3:
        raise CannotTell("its experts' parameters are viewed in ways that differ", view.node)
    rows, columns = next(iter(viewed.values()))
    shown = [text(view.resolve(s)).replace("self.config.", "config.") for s in sizes]
    count = re.sub(rf"^{re.escape(rows)} \* | \* {re.escape(rows)}$", "", shown[0])
    if shown[1] != columns or count == shown[0]:
        raise CannotTell("its experts are viewed by other sizes than they have", view.node)
    return count


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
