"""What an attention class does with the attention's own output: norms, gates, the last linear."""

from __future__ import annotations

import ast
from dataclasses import dataclass

from portkit.analysis.classes import ClassView, call_name


@dataclass(frozen=True)
class OutputPath:
    """Attributes of the class that the attention's output passes through, in source order."""

    linears: tuple[str, ...]
    norms: tuple[str, ...]


def output_path(
    view: ClassView, attends: ast.Call | None, linears: set[str], norms: set[str]
) -> OutputPath:
    """Follow the result of the call that attends through the statements after it."""
    forward = view.forward
    if attends is None or forward is None:
        return OutputPath((), ())
    reached: set[str] = set()
    found: list[str] = []

    def touched(node: ast.AST) -> bool:
        return any(
            child is attends or (isinstance(child, ast.Name) and child.id in reached)
            for child in ast.walk(node)
        )

    for node in _in_order(forward):
        if isinstance(node, ast.Call):
            attr = call_name(node).removeprefix("self.")
            if attr in linears | norms and any(touched(a) for a in node.args):
                found.append(attr)
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
            reached = reached | names if touched(node.value) else reached - names
    kept = tuple(dict.fromkeys(found))
    return OutputPath(tuple(a for a in kept if a in linears), tuple(a for a in kept if a in norms))


def _in_order(function: ast.FunctionDef) -> list[ast.AST]:
    """Calls before the assignment that keeps their result, statements in source order."""
    found: list[ast.AST] = []

    def walk(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            walk(child)
        if isinstance(node, ast.Call | ast.Assign | ast.AnnAssign):
            found.append(node)

    for statement in function.body:
        walk(statement)
    return found
