"""Which pairs of a head's dimensions are rotated together, found by running the code on names.

vLLM's `get_rope(is_neox_style=...)` must pair dimensions as the model does: halves (i, i + n/2) or
neighbours (2i, 2i + 1). The wrong one starts fluently (position 0 is right) and drifts. So the
rotary class, `rotate_half` and `apply_rotary_pos_emb` are run on a head of eight named dimensions
with frequencies f0, f1, ..., and the result is compared with both styles.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any, Literal

from portkit.analysis.classes import ClassView, ModuleView, call_name, text
from portkit.analysis.rotary_complex import Complex, complex_call, times
from portkit.analysis.symbolic import CannotTell, Interpreter

Layout = Literal["half", "neighbours", "unknown"]
HEAD = 8


@dataclass(frozen=True)
class Vector:
    """The last dimension of a tensor, one sum of (sign, atoms) per element."""

    terms: tuple[frozenset[tuple[int, tuple[str, ...]]], ...]
    pending: int = 0
    """Size of the last axis when it was stacked, until `.flatten(-2)` joins it."""

    def __len__(self) -> int:
        return len(self.terms)


def named(prefix: str, count: int) -> Vector:
    return Vector(tuple(frozenset({(1, (f"{prefix}{i}",))}) for i in range(count)))


@dataclass(frozen=True)
class _Shape:
    """`x.shape` of a vector: only the last entry is known."""

    last: int


class _Indices(Interpreter):
    """Values are vectors of terms, numbers, tuples of them; casts and outer axes mean nothing."""

    def __init__(self, module: ModuleView, view: ClassView | None = None) -> None:
        self.module = module
        self.view = view

    def free(self, node: ast.Name) -> Any:
        return ("name", node.id)

    def attribute(self, node: ast.Attribute, values: dict[str, Any]) -> Any:
        if text(node.value) == "self":
            if f"self.{node.attr}" in values:
                return values[f"self.{node.attr}"]
            if node.attr == "attention_scaling":
                return 1
            return ("name", text(node))
        if text(node).startswith("torch."):
            return ("name", text(node))
        subject = self.value(node.value, values)
        if node.attr == "shape" and isinstance(subject, Vector):
            return _Shape(len(subject))
        if isinstance(subject, Vector) and node.attr in ("dtype", "device"):
            return ("name", node.attr)
        return super().attribute(node, values)

    def unary(self, node: ast.UnaryOp, operand: Any) -> Any:
        if isinstance(node.op, ast.USub):
            if isinstance(operand, Vector):
                return Vector(
                    tuple(frozenset((-s, a) for s, a in t) for t in operand.terms), operand.pending
                )
            if isinstance(operand, int | float):
                return -operand
        return super().unary(node, operand)

    def binary(self, node: ast.BinOp, left: Any, right: Any) -> Any:
        if isinstance(left, int | float) and isinstance(right, int | float):
            operations = {
                ast.FloorDiv: lambda: left // right,
                ast.Mult: lambda: left * right,
                ast.Add: lambda: left + right,
                ast.Sub: lambda: left - right,
            }
            if type(node.op) in operations:
                return operations[type(node.op)]()
        if isinstance(node.op, ast.Mult) and isinstance(right, int) and right == 1:
            return left
        both = isinstance(left, Complex) and isinstance(right, Complex)
        if isinstance(node.op, ast.Mult) and both and len(left.pairs) == len(right.pairs):
            return times(left, right)
        if isinstance(left, Vector) and isinstance(right, Vector) and len(left) == len(right):
            if isinstance(node.op, ast.Add | ast.Sub):
                sign = 1 if isinstance(node.op, ast.Add) else -1
                return Vector(
                    tuple(
                        a | frozenset((sign * s, atoms) for s, atoms in b)
                        for a, b in zip(left.terms, right.terms, strict=False)
                    )
                )
            if isinstance(node.op, ast.Mult):
                return Vector(
                    tuple(
                        frozenset((s * t, tuple(sorted(x + y))) for s, x in a for t, y in b)
                        for a, b in zip(left.terms, right.terms, strict=False)
                    )
                )
        return super().binary(node, left, right)

    def subscript(self, node: ast.Subscript, values: dict[str, Any]) -> Any:
        subject = self.value(node.value, values)
        if isinstance(subject, _Shape):
            if text(node.slice) == "-1":
                return subject.last
            return ("name", text(node))
        if isinstance(subject, Vector):
            index = node.slice
            parts = index.elts if isinstance(index, ast.Tuple) else [index]
            last = parts[-1]
            if isinstance(last, ast.Constant) and last.value in (None, Ellipsis):
                return subject
            if isinstance(last, ast.Slice):
                bounds = [
                    None if b is None else self.value(b, values)
                    for b in (last.lower, last.upper, last.step)
                ]
                if len(parts) == 1 and bounds == [None, None, None]:
                    return subject
                if all(b is None or isinstance(b, int) for b in bounds) and len(parts) > 1:
                    return Vector(subject.terms[slice(*bounds)])
        return super().subscript(node, values)

    def call(self, node: ast.Call, values: dict[str, Any]) -> Any:
        name = call_name(node)
        if name in self.module.functions:
            function = self.module.functions[name]
            names = [a.arg for a in function.args.args]
            bound = dict(zip(names, (self.value(a, values) for a in node.args), strict=False))
            bound |= {k.arg: self.value(k.value, values) for k in node.keywords if k.arg}
            for parameter, default in zip(
                reversed(names), reversed(function.args.defaults), strict=False
            ):
                bound.setdefault(parameter, self.value(default, {}))
            return self.run(function, bound)
        turned = complex_call(self, node, values, Vector)
        if turned is not None:
            return turned
        keywords = {k.arg: self.value(k.value, values) for k in node.keywords if k.arg}
        if name in ("torch.cat", "torch.concat", "torch.concatenate"):
            parts = self.value(node.args[0], values)
            return Vector(tuple(term for part in parts for term in part.terms))
        if name == "torch.stack":
            parts = self.value(node.args[0], values)
            return Vector(
                tuple(t for group in zip(*(p.terms for p in parts), strict=False) for t in group),
                len(parts),
            )
        if name == "torch.repeat_interleave":
            return self._repeat(self.value(node.args[0], values), self.value(node.args[1], values))
        if name == "torch.chunk":
            return self._chunk(node, self.value(node.args[0], values))
        if not isinstance(node.func, ast.Attribute):
            return super().call(node, values)
        subject = self.value(node.func.value, values)
        method = node.func.attr
        if isinstance(subject, Vector):
            if method in (
                "to",
                "float",
                "type_as",
                "unsqueeze",
                "contiguous",
                "expand",
                "clone",
                "type",
            ):
                return subject
            if method in ("cos", "sin"):
                return Vector(
                    tuple(
                        frozenset((s, tuple(f"{method} {a}" for a in atoms)) for s, atoms in t)
                        for t in subject.terms
                    )
                )
            if method == "repeat_interleave":
                return self._repeat(subject, self.value(node.args[0], values))
            if method == "chunk":
                return self._chunk(node, subject)
            if method == "flatten" and subject.pending:
                return Vector(subject.terms)
            if method == "transpose" and subject.pending == 0:
                raise CannotTell(f"cannot follow `{text(node)}`", node)
        del keywords
        return super().call(node, values)

    def _repeat(self, vector: Vector, count: int) -> Vector:
        return Vector(tuple(term for term in vector.terms for _ in range(count)))

    def _chunk(self, node: ast.Call, vector: Vector) -> tuple[Vector, ...]:
        count = (
            2
            if len(node.args) < 1
            else next((a.value for a in node.args if isinstance(a, ast.Constant)), 2)
        )
        size = len(vector) // count
        return tuple(Vector(vector.terms[i * size : (i + 1) * size]) for i in range(count))


_SCALE = ("name", "a scale")
"""A factor on all cosines and sines that a condition chooses; see rotary_class.py, `note`."""


class _Frequencies(_Indices):
    """Runs the rotary class's forward: `freqs` is what comes of inv_freq times positions."""

    def __init__(self, module: ModuleView, view: ClassView, rotary_dim: int) -> None:
        super().__init__(module, view)
        self.frequencies = named("f", rotary_dim // 2)

    def _block(self, body: list[ast.stmt], values: dict[str, Any]) -> tuple[Any] | None:
        plain: list[ast.stmt] = []
        for node in body:
            targets = [t for n in ast.walk(node) if isinstance(n, ast.Assign) for t in n.targets]
            if isinstance(node, ast.If) and all(isinstance(t, ast.Name) for t in targets):
                plain += [ast.Assign([t], ast.Name("a_scale"), lineno=t.lineno) for t in targets]
            else:
                plain.append(node)
        values["a_scale"] = _SCALE  # in place: a `with` block binds names for what comes after it
        return super()._block(plain, values)

    def binary(self, node: ast.BinOp, left: Any, right: Any) -> Any:
        if isinstance(node.op, ast.Mult) and _SCALE in (left, right):
            return left if right == _SCALE else right
        return super().binary(node, left, right)

    def value(self, node: ast.expr, values: dict[str, Any]) -> Any:
        if isinstance(node, ast.IfExp):
            return _SCALE
        # Whatever multiplies inv_freq by positions gives one value per frequency, in order.
        if isinstance(node, ast.BinOp | ast.Call) and "inv_freq" in text(node):
            mentions_positions = any(
                isinstance(n, ast.Name) and ("position" in n.id or values.get(n.id) == "positions")
                for n in ast.walk(node)
            )
            inner = node
            while isinstance(inner, ast.Call) and isinstance(inner.func, ast.Attribute):
                if inner.func.attr in ("cos", "sin"):
                    break
                inner = inner.func.value
            if (
                isinstance(inner, ast.BinOp)
                and isinstance(inner.op, ast.Mult | ast.MatMult)
                and mentions_positions
            ):
                return self.frequencies
            if not mentions_positions:
                return self.frequencies
        if (
            isinstance(node, ast.Subscript | ast.Call)
            and "position" in text(node)
            and "inv_freq" not in text(node)
        ):
            return "positions"
        return super().value(node, values)

    def call(self, node: ast.Call, values: dict[str, Any]) -> Any:
        if call_name(node) == "getattr" and text(node.args[0]) == "self":
            if "inv_freq" in text(node.args[1]):
                return self.frequencies
            if "scaling" in text(node.args[1]):
                return 1
        return super().call(node, values)

    def free(self, node: ast.Name) -> Any:
        return "positions" if "position" in node.id else super().free(node)

    def attribute(self, node: ast.Attribute, values: dict[str, Any]) -> Any:
        return (
            self.frequencies if text(node) == "self.inv_freq" else super().attribute(node, values)
        )


def _expected(style: str, rotary_dim: int, prefix: str) -> tuple[Any, ...]:
    out: list[frozenset[tuple[int, tuple[str, ...]]]] = []
    half = rotary_dim // 2
    for i in range(HEAD):
        if i >= rotary_dim:
            out.append(frozenset({(1, (f"{prefix}{i}",))}))
            continue
        if style == "half":
            frequency, partner, sign = i % half, (i + half) % rotary_dim, -1 if i < half else 1
        else:
            frequency, partner, sign = i // 2, i ^ 1, -1 if i % 2 == 0 else 1
        out.append(
            frozenset(
                {
                    (1, tuple(sorted((f"{prefix}{i}", f"cos f{frequency}")))),
                    (sign, tuple(sorted((f"{prefix}{partner}", f"sin f{frequency}")))),
                }
            )
        )
    return tuple(out)


def _rotates(rotated: tuple[Vector, Vector], style: str, rotary_dim: int) -> bool:
    """Is this the style's rotation, perhaps with q's and k's dimensions reordered in one way?

    A common order changes no product of a query and a key, which is all that attention takes.
    """
    query, key = (_expected(style, rotary_dim, p) for p in "qk")
    if rotated[0].terms == query and rotated[1].terms == key:
        return True
    if rotary_dim != HEAD or set(rotated[0].terms) != set(query):
        return False
    order = [query.index(term) for term in rotated[0].terms]
    return rotated[1].terms == tuple(key[i] for i in order)


def layout_of(
    module: ModuleView, rotary: ClassView, function: ast.FunctionDef
) -> tuple[Layout, bool, str, int]:
    """(layout, the function passes a rest of the head through, why unknown, line).

    Runs `function(q, k, cos, sin)` on a head of eight dimensions, all of them rotated and then
    only six: a partial rotation must leave the last two alone.
    """
    found: list[Layout] = []
    partial = False
    for rotary_dim in (HEAD, HEAD - 2):
        try:
            angles = _run_class(module, rotary, rotary_dim)
            names = [a.arg for a in function.args.args]
            values: dict[str, Any] = dict(
                zip(names, (named("q", HEAD), named("k", HEAD), *angles), strict=False)
            )
            values.setdefault("unsqueeze_dim", 1)
            for extra in names[2 + len(angles) :]:
                values.setdefault(extra, ("name", extra))
            rotated = _Indices(module).run(function, values)
            if (
                not isinstance(rotated, tuple)
                or len(rotated) != 2
                or not isinstance(rotated[0], Vector)
            ):
                return "unknown", False, f"{function.name} does not return (q, k)", function.lineno
        except CannotTell as unknown:
            if rotary_dim == HEAD:
                return "unknown", False, unknown.what, unknown.line or function.lineno
            break
        for style in ("half", "neighbours"):
            if _rotates(rotated, style, rotary_dim):
                found.append(style)
                partial = rotary_dim != HEAD
                break
        else:
            if rotary_dim == HEAD:
                return (
                    "unknown",
                    False,
                    f"{function.name} pairs dimensions in neither of vLLM's two ways",
                    function.lineno,
                )
    if len(set(found)) != 1:
        return (
            "unknown",
            False,
            f"{function.name} pairs dimensions in neither of vLLM's two ways",
            function.lineno,
        )
    return found[0], partial, "", function.lineno


def _run_class(module: ModuleView, rotary: ClassView, rotary_dim: int) -> tuple[Any, ...]:
    """(cos, sin), or the one tensor of complex numbers that holds both."""
    forward = rotary.forward
    if forward is None:
        raise CannotTell(f"{rotary.name} has no forward", rotary.node)
    names = [a.arg for a in forward.args.args[1:]]
    values: dict[str, Any] = {
        name: "positions" if "position" in name else ("name", name) for name in names
    }
    values["x" if "x" in values else names[0]] = named("x", HEAD)
    result = _Frequencies(module, rotary, rotary_dim).run(forward, values)
    if isinstance(result, Complex):
        return (result,)
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], Vector):
        raise CannotTell(f"{rotary.name}.forward does not return (cos, sin)", forward)
    return result
