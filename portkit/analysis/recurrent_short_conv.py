"""Short convolution: out(C * conv(B * x)) with B, C, x from one projection."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

from portkit.analysis.classes import ClassView, argument, call_name, text
from portkit.analysis.read_blocks import linears_of
from portkit.analysis.recurrent import RecurrentFacts, Sizes, convolution_of

if TYPE_CHECKING:
    from portkit.analysis.read import Reader


def gates_of(view: ClassView) -> tuple[str, str, str] | None:
    """Names of (B, C, x) where forward splits a projection into three."""
    for node in ast.walk(view.forward):
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Tuple)
            and len(node.targets[0].elts) == 3
            and isinstance(node.value, ast.Call)
            and isinstance(node.value.func, ast.Attribute)
            and node.value.func.attr == "chunk"
            and text(argument(node.value, 0, "chunks")) == "3"
        ):
            first, second, third = (text(e) for e in node.targets[0].elts)
            return first, second, third
    return None


def read_short_conv(reader: Reader, view: ClassView) -> RecurrentFacts:
    """ShortConv's arguments; it takes kernel size and biases from the config by two field names."""
    sizes = Sizes(view)
    attr, conv = convolution_of(view)
    linears = linears_of(view)
    gates = gates_of(view)
    dim = sizes.resolved(argument(conv, 0, "in_channels"))
    kernel = sizes.resolved(argument(conv, 2, "kernel_size"))
    biases = {sizes.resolved(argument(conv, 7, "bias")) or "True"}
    biases |= {sizes.resolved(ast.parse(x.bias, mode="eval").body) for x in linears.values()}
    products = {
        frozenset((text(n.left), text(n.right)))
        for n in ast.walk(view.forward)
        if isinstance(n, ast.BinOp) and isinstance(n.op, ast.Mult)
    }
    why = ""
    if set(linears) != {"in_proj", "out_proj"} or attr != "conv":
        why = "its parts are not in_proj, conv and out_proj"
    elif frozenset((gates[0], gates[2])) not in products:
        why = f"it does not multiply {gates[0]} and {gates[2]} before the convolution"
    elif not any(gates[1] in pair for pair in products):
        why = f"it does not gate the convolution by {gates[1]}"
    elif (kernel, biases) != ("config.conv_L_cache", {"config.conv_bias"}):
        why = "ShortConv reads config.conv_L_cache and config.conv_bias, which this class does not"
    elif any("activation" in text(c) and "None" not in text(c) for c in sizes.calls if _conv(c)):
        why = "ShortConv has no activation after the convolution"
    if why:
        why = f"{view.name} is no short convolution of vLLM's kind: {why}"
    arguments = (("config", "config"), ("dim", dim), ("layer_idx", "extract_layer_index(prefix)"))
    return RecurrentFacts(
        view.name, view.line, "short_conv", "" if why else "ShortConv", arguments, why=why,
        start="ShortConv (layers/mamba/short_conv.py)",
    )  # fmt: skip


def _conv(call: ast.Call) -> bool:
    return "conv1d" in call_name(call)
