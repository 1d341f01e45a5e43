"""The port's source as a tree that flips edit: find calls, change arguments, get new text back."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import libcst as cst
from libcst.metadata import MetadataWrapper, ParentNodeProvider, PositionProvider

Node = cst.CSTNode


class Tree:
    """One parsed modeling file and the checkpoint's config, which says what a flip may offer."""

    def __init__(self, source: str, config: Mapping[str, Any]) -> None:
        wrapper = MetadataWrapper(cst.parse_module(source), unsafe_skip_copy=True)
        self.module = wrapper.module
        self.source = source
        self.config = config
        self._starts = [0, *itertools.accumulate(len(x) for x in source.splitlines(True))]
        self._lines = wrapper.resolve(PositionProvider)
        self._parents = wrapper.resolve(ParentNodeProvider)
        self._nodes = [n for n in _walk(self.module)]

    def line(self, node: Node) -> int:
        return int(self._lines[node].start.line)

    def code(self, node: Node) -> str:
        return self.module.code_for_node(node)

    def nodes(self, kind: type) -> Iterator[Any]:
        """Yield the nodes of a kind, in the order of the text."""
        return (n for n in self._nodes if isinstance(n, kind))

    def calls(self, *names: str) -> list[cst.Call]:
        """Return the calls of functions or classes called so (the last part of a dotted name)."""
        return [n for n in self.nodes(cst.Call) if called(n) in names]

    def parent(self, node: Node) -> Node | None:
        return self._parents.get(node)

    def function(self, node: Node) -> cst.FunctionDef | None:
        """Return the innermost function around a node."""
        current = self.parent(node)
        while current is not None and not isinstance(current, cst.FunctionDef):
            current = self.parent(current)
        return current

    def config_at(self, node: Node) -> str:
        """Return how the config is written where a node stands, or "" if it is not known."""
        function = self.function(node)
        if function is None:
            return ""
        text = self.code(function)
        if re.search(r"(\bconfig\b\s*[:,)=])|(\bconfig\.)", text) and not re.search(
            r"\bself\.config\.", text
        ):
            return "config"
        if re.search(r"\bself\.config\b", text):
            return "self.config"
        if re.search(r"\bvllm_config\b", text):
            return "vllm_config.model_config.hf_config"
        return ""

    def field(self, node: Node, *names: str) -> str:
        """Return the expression of the first of these config fields that the checkpoint sets."""
        at = self.config_at(node)
        for name in names:
            if at and self.config.get(name) is not None:
                return f"{at}.{name}"
        return ""

    def with_changes(self, changes: Mapping[Node, Node], imports: str = "") -> str:
        """Return the text with nodes replaced; `imports` is put before the first class."""
        edits = [(*self._span(old), self._indented(old, new)) for old, new in changes.items()]
        if imports:
            first = next((n for n in self._nodes if isinstance(n, cst.ClassDef)), None)
            decorators = [self.line(d) for d in first.decorators] if first else []
            line = min([self.line(first), *decorators]) if first else 1
            edits.append((self._starts[line - 1], self._starts[line - 1], f"{imports}\n\n"))
        text = self.source
        for start, end, new in sorted(edits, reverse=True):
            text = text[:start] + new + text[end:]
        return text

    def _indented(self, old: Node, new: Node) -> str:
        """Return a node's text, its later lines as deep as the statement that it goes into."""
        statement: Node | None = old
        while statement is not None and not isinstance(
            statement, cst.SimpleStatementLine | cst.BaseCompoundStatement
        ):
            statement = self.parent(statement)
        column = self._lines[statement].start.column if statement is not None else 0
        return self.code(new).strip().replace("\n", "\n" + " " * column)

    def _span(self, node: Node) -> tuple[int, int]:
        """Return where a node's text begins and ends."""
        where = self._lines[node]
        return (
            self._starts[where.start.line - 1] + where.start.column,
            self._starts[where.end.line - 1] + where.end.column,
        )


def called(call: cst.Call) -> str:
    """Return the last part of the name that is called."""
    func = call.func
    if isinstance(func, cst.Attribute):
        return func.attr.value
    return func.value if isinstance(func, cst.Name) else ""


def argument(call: cst.Call, keyword: str, position: int | None = None) -> cst.Arg | None:
    """Return an argument by keyword, or by position among the positional ones."""
    for index, arg in enumerate(call.args):
        if arg.keyword is not None and arg.keyword.value == keyword:
            return arg
        if arg.keyword is None and not arg.star and index == position:
            return arg
    return None


def with_argument(call: cst.Call, keyword: str, code: str, position: int | None = None) -> cst.Call:
    """Return the call with an argument set to an expression, at the end if it was not there."""
    value = cst.parse_expression(code)
    old = argument(call, keyword, position)
    if old is not None:
        return call.with_changes(
            args=[a.with_changes(value=value) if a is old else a for a in call.args]
        )
    space = cst.SimpleWhitespace
    new = cst.Arg(
        value=value,
        keyword=cst.Name(keyword),
        equal=cst.AssignEqual(space(""), space("")),
    )
    *before, last = call.args or (None,)
    if last is None:
        return call.with_changes(args=[new])
    comma = last.comma
    whitespace = before[-1].comma if before else cst.Comma(whitespace_after=space(" "))
    if isinstance(comma, cst.Comma):
        new = new.with_changes(comma=comma)
    last = last.with_changes(
        comma=whitespace if isinstance(whitespace, cst.Comma) else cst.MaybeSentinel.DEFAULT
    )
    return call.with_changes(args=[*before, last, new])


def without_argument(call: cst.Call, keyword: str) -> cst.Call | None:
    """Return the call without a keyword argument, or None if it has none."""
    kept = [a for a in call.args if a.keyword is None or a.keyword.value != keyword]
    return None if len(kept) == len(call.args) else call.with_changes(args=kept)


def renamed(call: cst.Call, name: str) -> cst.Call:
    return call.with_changes(func=cst.Name(name))


def _walk(node: Node) -> Iterator[Node]:
    yield node
    for child in node.children:
        yield from _walk(child)
