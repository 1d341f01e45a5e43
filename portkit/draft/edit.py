"""Small tools over LibCST: parse a snippet, print a node, match a call, walk and replace.

Transforms keep the author's statements and put new ones, written as text, between them.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import cast

import libcst as cst

Statement = cst.BaseStatement

_EMPTY = cst.Module([])


def code(node: cst.CSTNode | None) -> str:
    """Source text of a node, comments included."""
    return "" if node is None else _EMPTY.code_for_node(node)


def flat(node: cst.CSTNode | None) -> str:
    """Source text on one line, without the spaces that only formatting put there."""
    return " ".join(code(node).split()).replace("( ", "(").replace(" )", ")").replace(",)", ")")


def expression(text: str) -> cst.BaseExpression:
    return cst.parse_expression(text)


def statements(text: str) -> list[Statement]:
    """Parse statements; comments and blank lines before them are kept."""
    module = cst.parse_module(textwrap.dedent(text).strip("\n") + "\n")
    body = list(module.body)
    if body and module.header:
        body[0] = body[0].with_changes(leading_lines=[*module.header, *body[0].leading_lines])
    return cast(list[Statement], body)


def statement(text: str) -> Statement:
    (only,) = statements(text)
    return only


def function(text: str) -> cst.FunctionDef:
    return cast(cst.FunctionDef, statement(text))


def class_body(text: str) -> list[Statement]:
    """Parse members of a class, as written at the left margin."""
    return statements(text)


def blank_before(node: Statement) -> Statement:
    """The same statement after one blank line."""
    lines = [line for line in node.leading_lines if line.comment is not None]
    return node.with_changes(leading_lines=[cst.EmptyLine(indent=False), *lines])


def comment_before(node: Statement, *lines: str) -> Statement:
    """The same statement under comment lines."""
    comments = [cst.EmptyLine(comment=cst.Comment(f"# {line}")) for line in lines]
    return node.with_changes(leading_lines=[*node.leading_lines, *comments])


# ---- looking ------------------------------------------------------------------------------------


def members(node: cst.ClassDef) -> list[Statement]:
    return list(cast(Sequence[Statement], node.body.body))


def method(node: cst.ClassDef, name: str) -> cst.FunctionDef | None:
    return next(
        (m for m in members(node) if isinstance(m, cst.FunctionDef) and m.name.value == name), None
    )


def body_of(node: cst.FunctionDef | cst.If | cst.For | cst.Else) -> list[Statement]:
    if isinstance(node.body, cst.SimpleStatementSuite):
        return [cst.SimpleStatementLine(body=node.body.body)]
    return list(cast(Sequence[Statement], node.body.body))


def with_body(node, body: Iterable[Statement]):
    """The same block with another body; never empty, and without blank lines at its start."""
    body = list(body) or [statement("pass")]
    lines = [line for line in body[0].leading_lines if line.comment is not None]
    body[0] = body[0].with_changes(leading_lines=lines)
    return node.with_changes(body=cst.IndentedBlock(body=body))


def parameters(node: cst.FunctionDef) -> list[str]:
    """Names of all parameters except self."""
    every = [*node.params.posonly_params, *node.params.params, *node.params.kwonly_params]
    return [p.name.value for p in every if p.name.value != "self"]


def single(node: cst.CSTNode) -> cst.BaseSmallStatement | None:
    """The one small statement of a line."""
    if isinstance(node, cst.SimpleStatementLine) and len(node.body) == 1:
        return node.body[0]
    return None


def assigned(node: cst.CSTNode) -> tuple[cst.BaseExpression, cst.BaseExpression] | None:
    """(target, value) of a plain or annotated assignment line."""
    small = single(node)
    if isinstance(small, cst.Assign) and len(small.targets) == 1:
        return small.targets[0].target, small.value
    if isinstance(small, cst.AnnAssign) and small.value is not None:
        return small.target, small.value
    return None


def assigned_attribute(node: cst.CSTNode) -> tuple[str, cst.BaseExpression] | None:
    """(attr, value) of `self.attr = value`."""
    pair = assigned(node)
    if pair and isinstance(pair[0], cst.Attribute) and code(pair[0].value) == "self":
        return pair[0].attr.value, pair[1]
    return None


def is_call(node: cst.CSTNode | None, *names: str) -> bool:
    """Is the node a call of one of these dotted names?"""
    return isinstance(node, cst.Call) and (not names or code(node.func) in names)


def is_docstring(node: cst.CSTNode) -> bool:
    small = single(node)
    return isinstance(small, cst.Expr) and isinstance(
        small.value, cst.SimpleString | cst.ConcatenatedString
    )


def find(node: cst.CSTNode, wanted: Callable[[cst.CSTNode], bool]) -> list[cst.CSTNode]:
    """All nodes below (and including) `node` that satisfy `wanted`, in source order."""
    found: list[cst.CSTNode] = []

    def walk(here: cst.CSTNode) -> None:
        if wanted(here):
            found.append(here)
        for child in _children(here):
            walk(child)

    walk(node)
    return found


_SPACES = ("whitespace", "leading_", "trailing_", "lines_after", "header", "footer", "newline")
_PUNCTUATION = ("lpar", "rpar", "comma", "semicolon", "equal", "dot", "lbracket", "rbracket")
_ORDER = {cst.IfExp: ("body", "test", "orelse"), cst.FunctionDef: ("decorators", "params", "body")}
_FIELDS: dict[type, tuple[str, ...]] = {}


def _children(node: cst.CSTNode) -> list[cst.CSTNode]:
    """Children that are code, in source order; libcst's own `children` builds them by a visit."""
    kind = type(node)
    names = _FIELDS.get(kind)
    if names is None:
        every = [f.name for f in fields(kind)]
        first = [n for n in _ORDER.get(kind, ()) if n in every]
        rest = [n for n in every if n not in first]
        spaces = [n for n in rest if n.startswith(_SPACES) or n in _PUNCTUATION]
        names = _FIELDS[kind] = tuple([*first, *(n for n in rest if n not in spaces)])
    found: list[cst.CSTNode] = []
    for name in names:
        value = getattr(node, name)
        if isinstance(value, cst.CSTNode):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [v for v in value if isinstance(v, cst.CSTNode)]
    return found


def names_read(node: cst.CSTNode) -> set[str]:
    """Names that an expression or statement reads (attribute names and keywords excluded)."""
    found: set[str] = set()

    def walk(here: cst.CSTNode) -> None:
        if isinstance(here, cst.Name):
            found.add(here.value)
        elif isinstance(here, (cst.Attribute, cst.Arg)):
            walk(here.value)
        elif isinstance(here, cst.Param):
            for part in (here.annotation, here.default):
                if part is not None:
                    walk(part)
        elif isinstance(here, cst.AssignTarget):
            if not isinstance(here.target, cst.Name | cst.Tuple):
                walk(here.target)
        elif isinstance(here, cst.AnnAssign):
            walk(here.annotation)
            if here.value is not None:
                walk(here.value)
            if not isinstance(here.target, cst.Name):
                walk(here.target)
        else:
            for child in _children(here):
                walk(child)

    walk(node)
    return found


def self_attributes_read(node: cst.CSTNode) -> set[str]:
    """Attributes of self that are read below `node` (targets of assignments excluded)."""
    targets = {id(t.target) for t in find(node, lambda n: isinstance(n, cst.AssignTarget))}
    targets |= {
        id(e.value)
        for t in find(node, lambda n: isinstance(n, cst.AssignTarget))
        if isinstance(t.target, cst.Tuple)
        for e in t.target.elements
    }
    targets |= {id(t.target) for t in find(node, lambda n: isinstance(n, cst.AnnAssign))}
    return {
        n.attr.value
        for n in find(
            node,
            lambda n: (
                isinstance(n, cst.Attribute) and code(n.value) == "self" and id(n) not in targets
            ),
        )
    }


# ---- replacing ----------------------------------------------------------------------------------


class _Replace(cst.CSTTransformer):
    def __init__(self, change: Callable[[cst.CSTNode], cst.CSTNode | None]) -> None:
        self.change = change

    def on_leave(self, original_node, updated_node):
        updated = super().on_leave(original_node, updated_node)
        if isinstance(updated, cst.CSTNode):
            changed = self.change(updated)
            return updated if changed is None else changed
        return updated


def replace(node, change: Callable[[cst.CSTNode], cst.CSTNode | None]):
    """Rebuild a tree bottom-up; `change` returns a new node, or None to leave it."""
    return node.visit(_Replace(change))


def replace_text(node, old: str, new: str):
    """Replace every expression that reads exactly `old`."""
    return replace(
        node,
        lambda n: expression(new) if isinstance(n, cst.BaseExpression) and code(n) == old else None,
    )


def rename_reads(node, names: dict[str, str]):
    """Rename plain names, leaving keyword names and attributes alone."""

    class Rename(cst.CSTTransformer):
        def visit_Attribute_attr(self, node: cst.Attribute) -> None:
            pass

        def visit_Arg(self, node: cst.Arg) -> bool:
            return True

        def leave_Arg(self, original_node: cst.Arg, updated_node: cst.Arg) -> cst.Arg:
            return updated_node.with_changes(keyword=original_node.keyword)

        def leave_Attribute(
            self, original_node: cst.Attribute, updated_node: cst.Attribute
        ) -> cst.Attribute:
            return updated_node.with_changes(attr=original_node.attr)

        def leave_Name(self, original_node: cst.Name, updated_node: cst.Name) -> cst.Name:
            return updated_node.with_changes(
                value=names.get(updated_node.value, updated_node.value)
            )

    return node.visit(Rename())


def call_argument(call: cst.Call, position: int, name: str) -> cst.BaseExpression | None:
    """Argument of a call by position or keyword."""
    for argument in call.args:
        if argument.keyword is not None and argument.keyword.value == name:
            return argument.value
    plain = [a for a in call.args if a.keyword is None and not a.star]
    return plain[position].value if position < len(plain) else None


def make_call(function_text: str, *arguments: str) -> cst.Call:
    """A call from text arguments ("x" or "name=x"); a trailing comma if it gets long."""
    joined = ", ".join(arguments)
    if len(function_text) + len(joined) > 60:
        joined = "\n    " + ",\n    ".join(arguments) + ",\n"
    return cast(cst.Call, expression(f"{function_text}({joined})"))
