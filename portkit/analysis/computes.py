"""What forwards compute around their parts: the residual stream's shape, operations on logits."""

from __future__ import annotations

import ast

from portkit.analysis.classes import ClassView, call_name, text
from portkit.analysis.facts import NormUse


def residual_shape(forward: str, norms: tuple[NormUse, ...], attention: str, mlps: list[str]):
    """Shape of the residual stream, from the order in which the layer calls its parts."""
    order = []
    try:
        tree = ast.parse(forward)
    except SyntaxError:
        return "other"
    names = {n.attr: "norm" for n in norms} | {attention: "attention"} | {m: "mlp" for m in mlps}
    calls = [
        n for n in ast.walk(tree) if isinstance(n, ast.Call) and call_name(n).startswith("self.")
    ]
    for call in sorted(calls, key=lambda n: (n.lineno, -n.col_offset)):
        kind = names.get(call_name(call).removeprefix("self."))
        if kind:
            order.append(kind)
    return {
        ("norm", "attention", "norm", "mlp"): "pre",
        # with or without a residual to add first
        ("norm", "norm", "attention", "norm", "mlp"): "pre",
        ("norm", "attention", "norm", "norm", "mlp", "norm"): "sandwich",
        ("attention", "norm", "mlp", "norm"): "post",
        ("norm", "attention", "mlp"): "parallel",
        ("norm", "norm", "attention", "mlp"): "parallel",
    }.get(tuple(order), "other")


def logit_operations(view: ClassView) -> tuple[str, str]:
    """(scale, soft cap) that the class applies to logits, by dividing, multiplying and tanh."""
    scale = cap = ""
    for method in (view.methods.get("compute_logits"), view.forward):
        if method is None or scale or cap:
            continue
        statements = [
            s
            for s in ast.walk(method)
            if isinstance(s, ast.Assign) and text(s.targets[0]) == "logits"
        ]
        values = [s.value for s in sorted(statements, key=lambda s: s.lineno)]
        tanh = any(call_name(v).rsplit(".", 1)[-1] == "tanh" for v in values)
        for value in values:
            if isinstance(value, ast.BinOp) and text(value.left) == "logits":
                factor = text(view.resolve(value.right)).replace("self.config.", "config.")
                if tanh:
                    cap = factor
                elif isinstance(value.op, ast.Div):
                    scale = f"1 / {factor}"
                elif isinstance(value.op, ast.Mult):
                    scale = factor
    return scale, cap
