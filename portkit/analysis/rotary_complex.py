"""Rotation by complex numbers, for rotary.py: pairs of dimensions times cos + i sin."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

from portkit.analysis.classes import call_name, text

Term = frozenset[tuple[int, tuple[str, ...]]]


@dataclass(frozen=True)
class Complex:
    """The last dimension of a complex tensor: one (real, imaginary) pair of terms per element."""

    pairs: tuple[tuple[Term, Term], ...]
    as_real: bool = False
    """Is it a real tensor whose last axis of two holds the parts (view_as_real, or before
    view_as_complex)?"""


def complex_call(run: Any, node: ast.Call, values: dict[str, Any], vector: type) -> Any | None:
    """Value of a call that makes, views or flattens complex numbers; None if it does not.

    `run` is the interpreter and `vector` its class of real tensors.
    """
    name = call_name(node)
    if name == "torch.polar":
        angles = run.value(node.args[1], values)
        if isinstance(angles, vector):
            return Complex(tuple((_of("cos", t), _of("sin", t)) for t in angles.terms))
    if name in ("torch.view_as_complex", "torch.view_as_real"):
        subject = run.value(node.args[0], values)
        if isinstance(subject, Complex):
            return Complex(subject.pairs, name.endswith("real"))
    if not isinstance(node.func, ast.Attribute):
        return None
    method, arguments = node.func.attr, [text(a) for a in node.args]
    if text(node.func.value) == "torch":
        return None
    if method in ("reshape", "view") and arguments[-2:] == ["-1", "2"]:
        subject = run.value(node.func.value, values)
        if isinstance(subject, vector) and len(subject) % 2 == 0:
            even, odd = subject.terms[::2], subject.terms[1::2]
            return Complex(tuple(zip(even, odd, strict=True)), as_real=True)
    if method in ("flatten", "to", "unsqueeze"):
        subject = run.value(node.func.value, values)
        if isinstance(subject, Complex) and method == "flatten" and subject.as_real:
            return vector(tuple(term for pair in subject.pairs for term in pair))
        if isinstance(subject, Complex) and method != "flatten":
            return subject
    return None


def times(left: Complex, right: Complex) -> Complex:
    """(a + ib)(c + id), element by element."""
    return Complex(
        tuple(
            (_product(a, c) | _product(b, d, -1), _product(a, d) | _product(b, c))
            for (a, b), (c, d) in zip(left.pairs, right.pairs, strict=True)
        )
    )


def _of(function: str, term: Term) -> Term:
    return frozenset((s, tuple(f"{function} {a}" for a in atoms)) for s, atoms in term)


def _product(left: Term, right: Term, sign: int = 1) -> Term:
    return frozenset((sign * s * t, tuple(sorted(x + y))) for s, x in left for t, y in right)
