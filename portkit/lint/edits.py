"""Small edits that fixes are made of: replace nodes by identity, add and drop imports."""

from __future__ import annotations

from collections.abc import Iterable

import libcst as cst
import libcst.matchers as m

from portkit.lint.rule import Import, Report


class ReplaceNodes(cst.CSTTransformer):
    """Replace each reported node; a node inside a replaced one waits for the next round."""

    def __init__(self, reports: Iterable[Report]) -> None:
        super().__init__()
        self.wanted = {id(r.node): r for r in reports if r.replacement is not None}
        self.done: list[Report] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        return id(node) not in self.wanted and super().on_visit(node)

    def on_leave(self, original_node, updated_node):
        report = self.wanted.get(id(original_node))
        if report is None:
            return super().on_leave(original_node, updated_node)
        self.done.append(report)
        return report.replacement


def add_imports(module: cst.Module, imports: Iterable[Import]) -> cst.Module:
    """Add each `from module import name` that is missing, after the last top-level import."""
    for name_of_module, name in imports:
        statement = f"from {name_of_module} import {name}"
        if any(_imports(line, name_of_module, name) for line in module.body):
            continue
        line = cst.parse_statement(statement + "\n")
        places = [i for i, s in enumerate(module.body) if _is_import(s)]
        body = list(module.body)
        body.insert(places[-1] + 1 if places else _after_docstring(body), line)
        module = module.with_changes(body=body)
    return module


def drop_unused(module: cst.Module, names: Iterable[str]) -> cst.Module:
    """Drop the top-level imports of these names that nothing in the file uses any more."""
    for name in names:
        uses = [n for n in m.findall(module, m.Name(name)) if n]
        imported = sum(
            1
            for line in module.body
            if _is_import(line)
            for n in m.findall(line, m.Name(name))
            if n
        )
        if len(uses) == imported:
            module = module.visit(_DropImport(name))
    return module


class _DropImport(cst.CSTTransformer):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def visit_ClassDef(self, node: cst.ClassDef) -> bool:
        return False

    def visit_FunctionDef(self, node: cst.FunctionDef) -> bool:
        return False

    def leave_ImportFrom(self, original_node, updated_node):
        if isinstance(updated_node.names, cst.ImportStar):
            return updated_node
        kept = [
            a for a in updated_node.names if a.asname is not None or a.evaluated_name != self.name
        ]
        if len(kept) == len(updated_node.names):
            return updated_node
        if not kept:
            return cst.RemoveFromParent()
        if updated_node.rpar is None or len(kept) == 1:
            kept[-1] = kept[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
        return updated_node.with_changes(names=kept)


def _is_import(line: cst.BaseStatement) -> bool:
    return isinstance(line, cst.SimpleStatementLine) and any(
        isinstance(small, (cst.Import, cst.ImportFrom)) for small in line.body
    )


def _imports(line: cst.BaseStatement, module: str, name: str) -> bool:
    if not isinstance(line, cst.SimpleStatementLine):
        return False
    return any(
        isinstance(small, cst.ImportFrom)
        and not isinstance(small.names, cst.ImportStar)
        and any(alias.evaluated_name == name for alias in small.names)
        and small.module is not None
        and _dotted(small.module) == module
        for small in line.body
    )


def _dotted(node: cst.CSTNode) -> str:
    if isinstance(node, cst.Attribute):
        return f"{_dotted(node.value)}.{node.attr.value}"
    return getattr(node, "value", "")


def _after_docstring(body: list[cst.BaseStatement]) -> int:
    first = body[0] if body else None
    return int(
        isinstance(first, cst.SimpleStatementLine)
        and m.matches(first.body[0], m.Expr(m.SimpleString()))
    )


def with_keyword(call: cst.Call, name: str, value: str) -> cst.Call:
    """Return the call with `name=value` set: replaced where it stands, else added at the end."""
    expression = cst.parse_expression(value)
    for index, item in enumerate(call.args):
        if item.keyword is not None and item.keyword.value == name:
            args = list(call.args)
            args[index] = item.with_changes(value=expression)
            return call.with_changes(args=args)
    tight = cst.AssignEqual(cst.SimpleWhitespace(""), cst.SimpleWhitespace(""))
    new = cst.Arg(expression, keyword=cst.Name(name), equal=tight)
    args = list(call.args)
    if args and isinstance(call.whitespace_before_args, cst.ParenthesizedWhitespace):
        # One argument a line: the new one goes on its own line, with a trailing comma.
        last = args[-1]
        after = last.comma if isinstance(last.comma, cst.Comma) else None
        closing = after.whitespace_after if after else last.whitespace_after_arg
        between = cst.Comma(whitespace_after=call.whitespace_before_args)
        args[-1] = last.with_changes(comma=between, whitespace_after_arg=cst.SimpleWhitespace(""))
        args.append(new.with_changes(comma=cst.Comma(whitespace_after=closing)))
    else:
        if args:
            args[-1] = args[-1].with_changes(
                comma=cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
            )
        args.append(new)
    return call.with_changes(args=args)


def with_method(node: cst.ClassDef, code: str) -> cst.ClassDef:
    """Return the class with a method added at its end, one blank line before it."""
    method = cst.parse_statement(code).with_changes(leading_lines=[cst.EmptyLine(indent=False)])
    return node.with_changes(body=node.body.with_changes(body=[*node.body.body, method]))
