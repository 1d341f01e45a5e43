"""Where things stand in a Python source: classes and functions with their lines; read, not run."""

from __future__ import annotations

import ast
from dataclasses import dataclass

from portkit.errors import PortkitError


@dataclass(frozen=True)
class Span:
    """A class or function."""

    name: str
    """Qualified name, e.g. "HeliumAttention.forward"."""
    first: int
    """First line (1-based), decorators included."""
    last: int


def defined(source: str) -> list[Span]:
    """Return the classes and functions of a source in order; PortkitError if it does not parse."""
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise PortkitError(
            f"The modeling file does not parse: {error.msg}.",
            f"line {error.lineno}: {(error.text or '').strip()}",
            "Mend that line; `git diff` in the port shows what changed since the last commit.",
        ) from error
    spans: list[Span] = []
    _collect(tree, "", spans)
    return spans


def _collect(node: ast.AST, outer: str, spans: list[Span]) -> None:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            name = f"{outer}{child.name}"
            first = min([child.lineno, *(d.lineno for d in child.decorator_list)])
            spans.append(Span(name, first, child.end_lineno or child.lineno))
            _collect(child, f"{name}.", spans)


def matching(spans: list[Span], text: str) -> list[Span]:
    """Return the spans whose qualified name ends with `text`, at the start of a word.

    "forward" finds every forward; "Attention.forward" finds HeliumAttention.forward. A span inside
    another one that was found is left out.
    """
    found = [
        s
        for s in spans
        if s.name == text
        or s.name.endswith(f".{text}")
        or (text[:1].isupper() and s.name.endswith(text))
    ]
    return [
        s
        for s in found
        if not any(o is not s and o.first <= s.first and s.last <= o.last for o in found)
    ]
