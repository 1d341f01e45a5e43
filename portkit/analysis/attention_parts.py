"""What an attention class does with the attention's own output: norms, gates, the last linear."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import TYPE_CHECKING

from portkit.analysis.classes import ClassView, call_name, text, view_module

if TYPE_CHECKING:
    from portkit.analysis.facts import AttentionFacts


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


def origin(view: ClassView, tensor: ast.expr) -> ast.Assign | None:
    """The statement of forward that makes, of forward's arguments, what `tensor` became."""
    made = [n for n in ast.walk(view.forward) if isinstance(n, ast.Assign)] if view.forward else []
    name, found = _subject(tensor), None
    for node in sorted(made, key=lambda n: n.lineno, reverse=True):
        if name and any(name == n.id for t in node.targets for n in _names(t)):
            name, found = _subject(node.value), node
    return found


def _subject(value: ast.expr) -> str:
    """The first name in source order that is no function: x of f(x, y) and of x.view(n)."""
    functions = {id(n.func) for n in ast.walk(value) if isinstance(n, ast.Call)}
    named = [n for n in _names(value) if id(n) not in functions and n.id not in ("self", "torch")]
    return min(named, key=lambda n: (n.lineno, n.col_offset)).id if named else ""


def _names(node: ast.AST) -> list[ast.Name]:
    return [n for n in ast.walk(node) if isinstance(n, ast.Name)]


def norms_of_each_head(source: str, facts: AttentionFacts) -> dict[str, str]:
    """Attribute -> class of submodules of the attention that are a list of norms, one per head."""
    classes = view_module(source).classes
    found = {i.attr: call_name(i.value) for i in classes[facts.cls].assigned}
    return {a: c for a, c in found.items() if c in classes and _is_norm_of_each_head(classes[c])}


def _is_norm_of_each_head(view: ClassView) -> bool:
    """Does the class hold one norm per head and apply each to its head, on axis 1?

    Axis 1 is that of the heads in [batch, heads, seq, dim] and in [num_tokens, heads, dim] alike.
    """
    lists = [i for i in view.assigned if call_name(i.value).rsplit(".", 1)[-1] == "ModuleList"]
    forward = view.forward
    if len(lists) != 1 or forward is None:
        return False
    made = {call_name(n) for n in ast.walk(lists[0].value)}
    calls = {call_name(n): n for n in ast.walk(forward) if isinstance(n, ast.Call)}
    split, cat = calls.get("torch.split"), calls.get("torch.cat")
    if (
        not any(n.endswith("Norm") for n in made)
        or split is None
        or cat is None
        or "zip" not in calls
    ):
        return False
    return _axis(split) == _axis(cat) == "1" and text(split.args[1]) == "1"


def _axis(call: ast.Call) -> str:
    return next((text(k.value) for k in call.keywords if k.arg == "dim"), "")


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
