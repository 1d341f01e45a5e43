"""Which fields of its configuration a modeling file reads, and where. Nothing runs."""

from __future__ import annotations

import ast
from dataclasses import dataclass


@dataclass(frozen=True)
class Read:
    """The first place where a field is read."""

    line: int
    cls: str
    """The class around it; "" outside of classes."""


def config_reads(source: str) -> dict[str, Read]:
    """Return field -> where `config.field` or `getattr(config, "field", ...)` first stands.

    What is called config, or ends so (`self.config`, `text_config`), counts, and so does a name
    that one of these was assigned to. Raises SyntaxError if the source does not parse.
    """
    visitor = _Reads()
    visitor.visit(ast.parse(source))
    return visitor.found


class _Reads(ast.NodeVisitor):
    def __init__(self) -> None:
        self.found: dict[str, Read] = {}
        self.classes: list[str] = []
        self.names: set[str] = set()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.classes.append(node.name)
        self.generic_visit(node)
        self.classes.pop()

    def visit_Assign(self, node: ast.Assign) -> None:
        if self._is_config(node.value):
            self.names |= {t.id for t in node.targets if isinstance(t, ast.Name)}
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load) and self._is_config(node.value):
            self._add(node.attr, node.lineno)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            given = node.args[1] if len(node.args) > 1 else None
            if isinstance(given, ast.Constant) and self._is_config(node.args[0]):
                self._add(str(given.value), node.lineno)
        self.generic_visit(node)

    def _is_config(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Name):
            return node.id.endswith("config") or node.id in self.names
        return isinstance(node, ast.Attribute) and node.attr.endswith("config")

    def _add(self, name: str, line: int) -> None:
        if not name.endswith("config"):
            self.found.setdefault(name, Read(line, self.classes[-1] if self.classes else ""))
