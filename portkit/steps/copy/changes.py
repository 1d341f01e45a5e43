"""Where a copied file is not what the draft would copy: read, not run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from portkit.port import Port
from portkit.steps.copy.draft import draft


@dataclass(frozen=True)
class Change:
    """The first function, method or assignment that is another than in the original."""

    what: str
    """Its name, "HeliumRMSNorm.forward"."""
    line: int
    """Where it begins to differ, in the port's file."""


def first_change(port: Port) -> Change | None:
    """Return what differs first from a fresh copy of the original; None if nothing does.

    Comments, layout and order do not count, nor does what only one of the two files has.
    """
    path = port.modeling.relative_to(port.root).as_posix()
    text = dict(draft(port).files).get(path, "")
    try:
        fresh, own = dict(_parts(ast.parse(text))), _parts(ast.parse(port.source))
    except SyntaxError:
        return None
    for name, node in own:
        other = fresh.get(name)
        if other is not None and ast.dump(other) != ast.dump(node):
            return Change(name, _line(node, other))
    return None


def _parts(tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                for name in _names(part):
                    yield f"{node.name}.{name}", part
        else:
            for name in _names(node):
                yield name, node


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _line(node: ast.stmt, other: ast.stmt) -> int:
    """Return the line of the first statement inside that differs."""
    for mine, theirs in zip(getattr(node, "body", ()), getattr(other, "body", ()), strict=False):
        if ast.dump(mine) != ast.dump(theirs):
            return _line(mine, theirs)
    return node.lineno
