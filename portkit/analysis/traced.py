"""Where Python decides in a port's forward what should depend on tensors: read, not run."""

from __future__ import annotations

import ast
from collections.abc import Iterator

_COUNTS = frozenset({"shape", "size", "numel", "item", "tolist", "any", "all"})


def decided_by_python(source: str) -> list[int]:
    """Return the lines of forwards where a number of tokens or a kept attribute decides.

    Branches on them come first: tracing keeps the way that one went (docs/design/torch_compile.md
    of vLLM's source). Then attributes of `self` that a forward assigns, which the next call finds.
    A source that does not parse has none.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return []
    branches: list[int] = []
    kept: list[int] = []
    for steps in _steps(tree):
        remembered = {name: line for m in steps for name, line in _remembered(m)}
        kept += remembered.values()
        for node in (n for m in steps for n in ast.walk(m)):
            if isinstance(node, ast.If | ast.While | ast.IfExp) and _counts(node.test, remembered):
                branches.append(node.lineno)
    return [*sorted(branches), *sorted(kept)]


def kept_between_calls(source: str) -> list[tuple[str, int]]:
    """Return the attributes of `self` that a forward assigns, each with its line.

    A source that does not parse has none.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return []
    return [found for steps in _steps(tree) for m in steps for found in _remembered(m)]


def _steps(tree: ast.Module) -> Iterator[list[ast.FunctionDef]]:
    """The methods of each class that run with each call."""
    for cls in (n for n in tree.body if isinstance(n, ast.ClassDef)):
        yield [
            m
            for m in cls.body
            if isinstance(m, ast.FunctionDef) and m.name not in ("__init__", "load_weights")
        ]


def _remembered(method: ast.FunctionDef) -> Iterator[tuple[str, int]]:
    """Each attribute of self that the method assigns, with the line."""
    for node in ast.walk(method):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and ast.unparse(node.value) == "self"
        ):
            yield node.attr, node.lineno


def _counts(test: ast.expr, remembered: dict[str, int]) -> bool:
    """Whether a condition reads sizes or values of tensors, or what a call before left on self."""
    for node in ast.walk(test):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "len":
            return True
        if isinstance(node, ast.Attribute) and (node.attr in _COUNTS or node.attr in remembered):
            return True
    return False
