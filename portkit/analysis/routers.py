"""Facts of routers: which experts a token goes to, by what weights."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from typing import Any

from portkit.analysis.classes import ClassView, argument, call_name, text
from portkit.analysis.moe_facts import RouterFacts, Routing
from portkit.analysis.symbolic import CannotTell, Interpreter

_CASTS = ("to", "type", "type_as", "float", "detach")
_FLOAT = ("torch.float32", "torch.float")
SMALL = 1e-5
"""Up to here a constant only keeps a division from dividing by zero."""


def is_router(view: ClassView) -> bool:
    """Computes logits by a linear map and returns them, the chosen experts and their weights."""
    if view.forward is None or logits_of(view) is None:
        return False
    last = view.forward.body[-1]
    return (
        isinstance(last, ast.Return)
        and isinstance(last.value, ast.Tuple)
        and len(last.value.elts) >= 3
    )


def logits_of(view: ClassView) -> tuple[ast.Assign, ast.Call, str] | None:
    """(statement, the linear call in it, where the weight is) that makes the router's logits."""
    linears = {i.attr for i in view.assigned if call_name(i.value).endswith("Linear")}
    for node in ast.walk(view.forward):
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        for call in (n for n in ast.walk(node.value) if isinstance(n, ast.Call)):
            name = call_name(call)
            if name.endswith(".linear") and "self.weight" in text(call):
                return node, call, ""
            if name == "super().forward":
                return node, call, "super"
            if name.removeprefix("self.") in linears and name.startswith("self."):
                return node, call, name.removeprefix("self.")
            if name.endswith(".linear") and len(call.args) > 1:
                for attr in linears:
                    if f"self.{attr}.weight" in text(call.args[1]):
                        return node, call, attr
    return None


def read_router(view: ClassView) -> RouterFacts:
    """Facts of a router class; its rule only if it is one of vLLM's."""
    statement, call, linear = logits_of(view)
    if linear == "super":
        made = next(
            n
            for n in ast.walk(view.init)
            if isinstance(n, ast.Call) and call_name(n) == "super().__init__"
        )
        hidden, experts = (
            argument(made, i, n) for i, n in ((0, "in_features"), (1, "out_features"))
        )
        biased = text(argument(made, 2, "bias")) != "False"
    elif linear:
        made = view.get(linear).value
        hidden, experts = (
            argument(made, i, n) for i, n in ((0, "in_features"), (1, "out_features"))
        )
        biased = text(argument(made, 2, "bias")) != "False"
        if call_name(call).endswith(".linear"):  # F.linear(x, self.gate.weight)
            biased = len(call.args) > 2
    else:
        sizes = view.get("weight").value.args[0].args
        experts, hidden = sizes[0], sizes[1]
        biased = len(call.args) > 2
    written = text(statement.value)
    casts = ".float()" in written or any(f"({t})" in written for t in _FLOAT)
    full = casts and "float" in text(call)
    made = view.get(linear) if linear and linear != "super" else None
    full = full or (made is not None and "float32" in text(made.value))
    last = view.forward.body[-1]
    logits = statement.targets[0].id
    routing, top_k = _routing(view)
    return RouterFacts(
        cls=view.name,
        line=view.line,
        linear=linear,
        biased=biased,
        num_experts=_shown(view, experts),
        hidden_size=_shown(view, hidden),
        full_precision=full,
        top_k=top_k,
        logits=logits,
        returns=tuple(text(e) for e in last.value.elts),
        routing=routing,
    )


def _shown(view: ClassView, node: ast.expr | None) -> str:
    return text(view.resolve(node)).replace("self.config.", "config.") if node is not None else ""


# ---- the rule -----------------------------------------------------------------------------------


class _Rule(Interpreter):
    """Terms over the logits; what it cannot follow is none of vLLM's rules.

    ("logits",), ("softmax", t), ("sigmoid", t), ("values", t), ("index", t) of topk,
    ("gather", t, index), ("biased", t, bias), ("sum", t), ("div", t, u), ("scaled", t, factor),
    ("if", condition, t, u); groups: ("grouped", t, n), ("best", t, how), ("mask", ...),
    ("masked", t, groups, topk_group).
    """

    def __init__(self, view: ClassView) -> None:
        self.view = view
        self.made = logits_of(view)[0]
        self.logits = self.made.targets[0].id
        self.top_k = ""

    def follow(self, function: ast.FunctionDef) -> tuple[Any, ...]:
        values: dict[str, Any] = {a.arg: ("given", a.arg) for a in function.args.args[1:]}
        result = self._block(function.body, values)
        if result is None:
            raise CannotTell(f"{function.name} returns nothing", function)
        return result[0]

    def _block(self, body: list[ast.stmt], values: dict[str, Any]) -> tuple[Any] | None:
        for node in body:
            if node is self.made:
                values[self.logits] = ("logits",)
                continue
            if isinstance(node, ast.AugAssign):
                value = ast.BinOp(node.target, node.op, node.value)
                ast.copy_location(value, node)
                self._bind(node.target, self.value(value, values), values)
            elif isinstance(node, ast.Expr) and call_name(node.value).endswith(".scatter_"):
                self._scatter(node.value, values)
            elif isinstance(node, ast.If):
                self._branch(node, values)
            else:
                result = super()._block([node], values)
                if result is not None:
                    return result
        return None

    def _branch(self, node: ast.If, values: dict[str, Any]) -> None:
        condition = text(self.view.resolve(node.test)).replace("self.config.", "config.")
        yes, no = dict(values), dict(values)
        self._block(node.body, yes)
        self._block(node.orelse, no)
        for name in {*yes, *no}:
            a, b = yes.get(name), no.get(name)
            if a != b:
                values[name] = ("if", condition, a, b)
            else:
                values[name] = a

    def _scatter(self, node: ast.Call, values: dict[str, Any]) -> None:
        target = node.func.value
        index = self.value(node.args[1], values)
        if index[0] != "index":
            raise CannotTell("scatters something else than chosen groups", node)
        values[target.id] = ("mask", index)

    def attribute(self, node: ast.Attribute, values: dict[str, Any]) -> Any:
        if text(node.value) == "self":
            return ("own", text(node))
        inner = self.value(node.value, values)
        if node.attr == "values" and inner[0] == "best":
            return inner
        raise CannotTell(f"cannot follow `{text(node)}`", node)

    def unary(self, node: ast.UnaryOp, operand: Any) -> Any:
        return operand if isinstance(node.op, ast.Invert) else super().unary(node, operand)

    def subscript(self, node: ast.Subscript, values: dict[str, Any]) -> Any:
        inner = self.value(node.value, values)
        several = isinstance(inner, tuple) and inner and isinstance(inner[0], tuple)
        if several and isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, int):
            return inner[node.slice.value]
        raise CannotTell(f"cannot follow `{text(node)}`", node)

    def binary(self, node: ast.BinOp, left: Any, right: Any) -> Any:
        small = isinstance(right, float | int) and abs(right) <= SMALL
        match type(node.op), left, right:
            case ast.Add, _, ("own" | "given", name):
                return ("biased", left, name)
            case ast.Add, ("sum", _), _ if small:
                return left
            case ast.Mult, _, ("own", name):
                return ("scaled", left, name)
            case ast.Div, _, ("sum", _):
                return ("div", left, right)
        raise CannotTell(f"cannot follow `{text(node)}`", node)

    def call(self, node: ast.Call, values: dict[str, Any]) -> Any:
        name = call_name(node)
        short = name.rsplit(".", 1)[-1]
        function = re.fullmatch(r"(torch|F|nn)(\.\w+)+", name) is not None
        if not isinstance(node.func, ast.Attribute) or (function and not node.args):
            raise CannotTell(f"cannot follow `{text(node)}`", node)
        arguments = list(node.args) if function else [node.func.value, *node.args]
        keywords = {k.arg: k.value for k in node.keywords}

        def given(position: int, key: str) -> ast.expr | None:
            return keywords.get(key) or (arguments[position] if position < len(arguments) else None)

        inner = self.value(arguments[0], values)
        if short in _CASTS or short in ("zeros_like", "bool"):
            return inner
        if short in ("softmax", "sigmoid"):
            return (short, inner)
        if short == "topk":
            return self._topk(inner, given(1, "k"), node)
        if short == "gather":
            index = keywords.get("index") or arguments[2]
            return ("gather", inner, self.value(index, values))
        if short == "sum" and inner[0] == "best":
            return ("best", inner[1], "two")
        if short == "sum" and inner[0] != "best":
            return ("sum", inner)
        if short == "clamp" and inner[0] == "sum" and "min" in keywords:
            return inner
        if short in ("view", "reshape", "expand", "unsqueeze"):
            return self._shape(short, inner, arguments, node)
        if short == "max" and inner[0] == "grouped":
            return ("best", inner, "one")
        if short == "masked_fill":
            return self._masked(inner, self.value(arguments[1], values), node)
        raise CannotTell(f"cannot follow `{text(node)}`", node)

    def _topk(self, inner: Any, count: ast.expr | None, node: ast.Call) -> Any:
        if inner[0] == "grouped":
            if text(count) != "2":
                raise CannotTell("scores groups by more than two experts", node)
            return (("best", inner, "values"), ("none",))
        shown = _shown(self.view, count)
        if inner[0] == "best":
            return (("values", inner), ("index", inner, shown))
        self.top_k = shown
        return (("values", inner), ("index", inner))

    def _shape(self, short: str, inner: Any, arguments: list[ast.expr], node: ast.Call) -> Any:
        if inner[0] == "mask" or (short == "unsqueeze" and inner[0] == "own"):
            return inner
        if short in ("view", "reshape") and len(arguments) == 4:
            return ("grouped", inner, _shown(self.view, arguments[2]))
        if short in ("view", "reshape") and text(arguments[1]) == "-1":
            return inner
        raise CannotTell(f"cannot follow `{text(node)}`", node)

    def _masked(self, inner: Any, mask: Any, node: ast.Call) -> Any:
        match mask:
            case ("mask", ("index", ("best", ("grouped", scores, groups), how), count)):
                biased = scores[0] == "biased"
                fill = text(node.args[-1]).replace('"', "'")
                if biased and fill != "float('-inf')":
                    raise CannotTell("what is masked may still be chosen", node)
                if scores == inner and how == ("two" if biased else "one"):
                    return ("masked", inner, groups, count)
        raise CannotTell(f"masks in its own way: `{text(node)}`", node)


def _routing(view: ClassView) -> tuple[Routing | None, str]:
    """(the rule in vLLM's terms, number of experts per token)."""
    rule = _Rule(view)
    try:
        returned = rule.follow(view.forward)
        chosen = [t for t in returned if t[0] == "index"]
        weights = [t for t in returned if t[0] not in ("index", "logits")]
        if len(chosen) != 1 or len(weights) != 1:
            return None, rule.top_k or _top_k(view)
        found = _match(weights[0], chosen[0])
    except (CannotTell, TypeError, KeyError, IndexError):
        return None, rule.top_k or _top_k(view)
    if found is not None and found.scale:
        resolved = _shown(view, ast.parse(found.scale, mode="eval").body)
        found = replace(found, scale=resolved)
    return found, rule.top_k


def _match(weights: Any, chosen: Any) -> Routing | None:
    scale, renormalize = "", "False"
    if weights[0] == "scaled":
        _, weights, scale = weights
    match weights:
        case ("if", condition, ("div", plain, ("sum", same)), other) if plain == same == other:
            weights, renormalize = plain, condition
        case ("div", plain, ("sum", same)) if plain == same:
            weights, renormalize = plain, "True"
    scores = chosen[1]
    groups = count = bias = ""
    if scores[0] == "masked":
        _, scores, groups, count = scores
    basis = scores
    if scores[0] == "biased":
        _, basis, bias = scores
    if weights == ("softmax", ("values", ("logits",))) and scores == ("logits",):
        return Routing("softmax", "True", scale=scale) if renormalize == "False" else None
    if basis not in (("softmax", ("logits",)), ("sigmoid", ("logits",))):
        return None
    unmasked = ("gather", basis, chosen)
    taken = ("values", chosen[1])
    if weights == unmasked or (weights == taken and not bias):
        return Routing(basis[0], renormalize, bias, groups, count, scale)
    return None


def _top_k(view: ClassView) -> str:
    """The number of experts per token, from the attribute that says so or a keyword top_k."""
    found = view.get("top_k")
    if found is not None:
        return _shown(view, found.value)
    for node in ast.walk(view.forward):
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg in ("top_k", "k"):
                    return _shown(view, keyword.value)
    return ""
