"""A read-only view of the classes of a modeling file: what `__init__` assigns, what `forward` does.

Reading needs line numbers and cheap walking, not formatting, so it uses the standard library's
`ast`; the drafts, which must keep formatting, use LibCST. Nothing is imported or executed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True)
class Assigned:
    """One `self.<attr> = value` in `__init__`."""

    attr: str
    value: ast.expr
    line: int
    condition: str = ""
    """Source of the `if` around it; empty when it always runs."""


@dataclass(frozen=True)
class ClassView:
    """One class of the file."""

    node: ast.ClassDef
    assigned: tuple[Assigned, ...]
    local: dict[str, ast.expr] = field(hash=False, default_factory=dict)
    """Local names of `__init__` that are assigned once, e.g. embed_dim = config.hidden_size."""

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def line(self) -> int:
        return self.node.lineno

    @property
    def bases(self) -> tuple[str, ...]:
        return tuple(ast.unparse(base) for base in self.node.bases)

    @cached_property
    def methods(self) -> dict[str, ast.FunctionDef]:
        return {item.name: item for item in self.node.body if isinstance(item, ast.FunctionDef)}

    @property
    def forward(self) -> ast.FunctionDef | None:
        return self.methods.get("forward")

    @property
    def init(self) -> ast.FunctionDef | None:
        return self.methods.get("__init__")

    def get(self, attr: str) -> Assigned | None:
        """The last plain assignment of an attribute in `__init__`."""
        return next((a for a in reversed(self.assigned) if a.attr == attr), None)

    def resolve(self, expression: ast.expr, depth: int = 6) -> ast.expr:
        """Replace self.x and local names by what `__init__` assigned to them; the config stays."""
        if depth == 0:
            return expression
        view = self

        class Substitute(ast.NodeTransformer):
            def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
                if text(node.value) == "self" and node.attr != "config":
                    found = view.get(node.attr)
                    if found is not None and not found.condition:
                        return view.resolve(found.value, depth - 1)
                self.generic_visit(node)
                return node

            def visit_Name(self, node: ast.Name) -> ast.expr:
                value = None if node.id == "config" else view.local.get(node.id)
                return node if value is None else view.resolve(value, depth - 1)

        import copy

        return Substitute().visit(copy.deepcopy(expression))


@dataclass(frozen=True)
class ModuleView:
    """The file: its classes, functions and imported names."""

    tree: ast.Module
    classes: dict[str, ClassView] = field(hash=False)
    functions: dict[str, ast.FunctionDef] = field(hash=False)
    imported: dict[str, str] = field(hash=False)
    """Local name -> dotted origin, e.g. "get_rope" -> "vllm....rotary_embedding.get_rope"."""

    def origin(self, name: str) -> str:
        return self.imported.get(name, "")


def text(node: ast.AST | None) -> str:
    """Source text of an expression, normalised."""
    return "" if node is None else ast.unparse(node)


def view_module(source: str) -> ModuleView:
    """Parse a modeling file. SyntaxError is the caller's to report."""
    tree = ast.parse(source)
    classes: dict[str, ClassView] = {}
    functions: dict[str, ast.FunctionDef] = {}
    imported: dict[str, str] = {}
    for item in tree.body:
        if isinstance(item, ast.ClassDef):
            classes[item.name] = view_class(item)
        elif isinstance(item, ast.FunctionDef):
            functions[item.name] = item
    for item in ast.walk(tree):
        if isinstance(item, ast.ImportFrom):
            module = "." * item.level + (item.module or "")
            imported.update({a.asname or a.name: f"{module}.{a.name}" for a in item.names})
        elif isinstance(item, ast.Import):
            imported.update({a.asname or a.name.split(".")[0]: a.name for a in item.names})
    return ModuleView(tree, classes, functions, imported)


def view_class(node: ast.ClassDef) -> ClassView:
    """One class, wherever in the file it stands."""
    init = next(
        (i for i in node.body if isinstance(i, ast.FunctionDef) and i.name == "__init__"), None
    )
    assigned: list[Assigned] = []
    local: dict[str, ast.expr] = {}
    seen: set[str] = set()
    if init is not None:
        parameters = {a.arg for a in [*init.args.args, *init.args.kwonlyargs]}
        for statement, condition in _statements(init.body, ""):
            for target, value in _pairs(statement):
                if isinstance(target, ast.Attribute) and text(target.value) == "self":
                    made, only_if = _optional_module(value)
                    both = " and ".join(c for c in (condition, only_if) if c)
                    assigned.append(Assigned(target.attr, made, statement.lineno, both))
                elif isinstance(target, ast.Name):
                    if target.id in seen or target.id in parameters or condition:
                        local.pop(target.id, None)
                    else:
                        local[target.id] = value
                    seen.add(target.id)
    return ClassView(node, tuple(assigned), local)


def _statements(body: list[ast.stmt], condition: str) -> Iterator[tuple[ast.stmt, str]]:
    for statement in body:
        yield statement, condition
        if isinstance(statement, ast.If):
            yield from _statements(statement.body, text(statement.test))
            yield from _statements(statement.orelse, f"not ({text(statement.test)})")


def _pairs(statement: ast.stmt) -> Iterator[tuple[ast.expr, ast.expr]]:
    """(target, value) of an assignment; the elements of a tuple target share the value."""
    if isinstance(statement, ast.Assign):
        for target in statement.targets:
            if isinstance(target, ast.Tuple):
                yield from ((element, statement.value) for element in target.elts)
            else:
                yield target, statement.value
    elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
        yield statement.target, statement.value


def _optional_module(value: ast.expr) -> tuple[ast.expr, str]:
    """(Module(...), condition) of `Module(...) if condition else None`; else the value as it is."""
    if isinstance(value, ast.IfExp):
        for made, other, test in (
            (value.body, value.orelse, text(value.test)),
            (value.orelse, value.body, f"not ({text(value.test)})"),
        ):
            is_module = call_name(made).rsplit(".", 1)[-1][:1].isupper()
            if is_module and isinstance(other, ast.Constant) and other.value is None:
                return made, test
    return value, ""


def call_name(node: ast.AST | None) -> str:
    """Dotted name of what a call calls, e.g. "nn.Linear"; "" if it is no call."""
    return text(node.func) if isinstance(node, ast.Call) else ""


def argument(call: ast.Call, position: int, name: str) -> ast.expr | None:
    """Argument of a call by position or keyword."""
    for keyword in call.keywords:
        if keyword.arg == name:
            return keyword.value
    if position < len(call.args) and not any(
        isinstance(a, ast.Starred) for a in call.args[: position + 1]
    ):
        return call.args[position]
    return None
