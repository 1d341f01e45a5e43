"""Rotary embeddings of older files: a table of sines and cosines that attention itself looks up.

The table is a buffer of the attention class, made by a function of the file; each of query and key
is rotated by a call of its own, `apply(tensor, sin, cos)`. Both functions are run on names, so the
frequencies and the pairs of dimensions are computed, not guessed.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

from portkit.analysis.classes import ClassView, ModuleView, call_name, text
from portkit.analysis.rotary import HEAD, Layout, Vector, _expected, _Indices, named
from portkit.analysis.symbolic import CannotTell


@dataclass(frozen=True)
class RotaryTable:
    """What get_rope needs to make the same table."""

    attr: str
    """The buffer on the attention class."""
    function: str
    """Rotates one tensor."""
    layout: Layout
    base: str
    dim: str
    """Source of the number of rotated dimensions, by the config."""
    line: int


class _Table(_Indices):
    """Runs the function that makes the table: frequencies in order, then their sines, cosines."""

    def __init__(self, module: ModuleView) -> None:
        super().__init__(module)
        self.base = ""

    def value(self, node: ast.expr, values: dict[str, Any]) -> Any:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            power = node.right
            while isinstance(power, ast.BinOp) and not isinstance(power.op, ast.Pow):
                power = power.left
            if isinstance(power, ast.BinOp) and text(node.left) in ("1.0", "1"):
                exponent = text(power.right).replace(" ", "")
                if "torch.arange(0,dim,2" in exponent and exponent.endswith("/dim"):
                    self.base = text(power.left)
                    return named("f", HEAD // 2)
        return super().value(node, values)

    def call(self, node: ast.Call, values: dict[str, Any]) -> Any:
        name = call_name(node)
        if name in ("torch.einsum", "torch.outer"):
            parts = [self.value(a, values) for a in node.args if not isinstance(a, ast.Constant)]
            found = [p for p in parts if isinstance(p, Vector)]
            if len(found) == 1 and isinstance(parts[-1], Vector):
                return found[0]
            raise CannotTell(f"cannot follow `{text(node)}`", node)
        if name in ("torch.sin", "torch.cos"):
            inner = self.value(node.args[0], values)
            if isinstance(inner, Vector):
                word = name.removeprefix("torch.")
                return Vector(
                    tuple(
                        frozenset((s, tuple(f"{word} {a}" for a in atoms)) for s, atoms in term)
                        for term in inner.terms
                    )
                )
        if name.startswith("torch.arange"):  # .float() and the like included
            return ("name", text(node))
        return super().call(node, values)


def rotary_table_of(module: ModuleView, attention: ClassView) -> RotaryTable | None:
    """The table of an attention class; None if it has none that can be followed."""
    for item in attention.assigned:
        for call in (n for n in ast.walk(item.value) if isinstance(n, ast.Call)):
            maker = module.functions.get(call_name(call))
            if maker is None or len(maker.args.args) != 2 or len(call.args) != 2:
                continue
            table = _Table(module)
            try:
                values = {maker.args.args[1].arg: ("name", "dim")}
                sincos = table.run(maker, values | {maker.args.args[0].arg: ("name", "num")})
            except CannotTell:
                continue
            half = HEAD // 2
            expected = [
                frozenset({(1, (f"{word} f{i}",))}) for word in ("sin", "cos") for i in range(half)
            ]
            if not isinstance(sincos, Vector) or list(sincos.terms) != expected:
                continue
            sin, cos = Vector(sincos.terms[:half]), Vector(sincos.terms[half:])
            found = _applied(module, attention, sin, cos)
            if found is not None:
                dim = text(attention.resolve(call.args[1])).replace("self.config.", "config.")
                return RotaryTable(item.attr, *found, table.base, dim.split(" or ")[0], item.line)
    return None


def _applied(
    module: ModuleView, attention: ClassView, sin: Vector, cos: Vector
) -> tuple[str, Layout] | None:
    """(function, layout) of the function that attention calls with one tensor, sin and cos."""
    called = {call_name(n) for n in ast.walk(attention.forward)} if attention.forward else set()
    for name, function in module.functions.items():
        names = [a.arg for a in function.args.args]
        if name not in called or len(names) != 3 or set(names[1:]) != {"sin", "cos"}:
            continue
        given = {"sin": sin, "cos": cos, names[0]: named("q", HEAD)}
        try:
            rotated = _Indices(module).run(function, given)
        except CannotTell:
            continue
        for style in ("half", "neighbours"):
            if isinstance(rotated, Vector) and rotated.terms == _expected(style, HEAD, "q"):
                return name, style
    return None
