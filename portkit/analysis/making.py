"""Which classes of a file an expression may construct, through tables, aliases and loops.

Hybrids choose a class for each layer: `TABLE[kind](config, i)`, `cls = A if wide else B`, a list
that a loop appends to, a method that builds the list.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from portkit.analysis.classes import ClassView, ModuleView, call_name, text


def made_by(module: ModuleView, view: ClassView, value: ast.expr) -> list[ClassView]:
    """Classes of the file that `value`, assigned in the class's `__init__`, may construct."""
    scope = view.init
    if isinstance(value, ast.Call) and call_name(value).startswith("self."):
        scope = view.methods.get(call_name(value).removeprefix("self.")) or scope
        roots: list[ast.AST] = [scope] if scope is not view.init else [value]
    else:
        roots = [value, *_appended(scope, value)]
        roots += [f for name in _names(roots) if (f := _local_function(scope, name)) is not None]
    found: dict[str, ClassView] = {}
    for root in roots:
        for call in (n for n in ast.walk(root) if isinstance(n, ast.Call)):
            for name in _called(module, root if scope is None else scope, call.func):
                if name in module.classes:
                    found.setdefault(name, module.classes[name])
    return list(found.values())


def _names(nodes: list[ast.AST]) -> set[str]:
    return {n.id for node in nodes for n in ast.walk(node) if isinstance(n, ast.Name)}


def _local_function(scope: ast.AST | None, name: str) -> ast.FunctionDef | None:
    """A function defined inside `__init__`, as given to make_layers."""
    if scope is None:
        return None
    return next(
        (n for n in ast.walk(scope) if isinstance(n, ast.FunctionDef) and n.name == name), None
    )


def _appended(scope: ast.AST | None, value: ast.expr) -> Iterator[ast.expr]:
    """What is appended to the lists that `value` names."""
    names = _names([value])
    for node in ast.walk(scope) if scope is not None else ():
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "append"
            and text(node.func.value) in names
        ):
            yield from node.args


def _called(module: ModuleView, scope: ast.AST, function: ast.expr) -> list[str]:
    """Names of the classes that a call's function may be."""
    if isinstance(function, ast.Subscript) and isinstance(function.value, ast.Name):
        return [text(v) for v in table_of(module, function.value.id).values()]
    if isinstance(function, ast.IfExp):
        return [*_called(module, scope, function.body), *_called(module, scope, function.orelse)]
    if isinstance(function, ast.Name) and function.id not in module.classes:
        return [
            name
            for node in ast.walk(scope)
            if isinstance(node, ast.Assign)
            and any(isinstance(t, ast.Name) and t.id == function.id for t in node.targets)
            and not isinstance(node.value, ast.Call)
            and (not isinstance(node.value, ast.Name) or node.value.id in module.classes)
            for name in _called(module, scope, node.value)
        ]
    return [text(function)]


def table_of(module: ModuleView, name: str) -> dict[str, ast.expr]:
    """{key: class} of a module-level dictionary of classes."""
    for item in module.tree.body:
        if (
            isinstance(item, ast.Assign)
            and isinstance(item.value, ast.Dict)
            and any(isinstance(t, ast.Name) and t.id == name for t in item.targets)
        ):
            return {
                text(k): v for k, v in zip(item.value.keys, item.value.values, strict=True) if k
            }
    return {}
