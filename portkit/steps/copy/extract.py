"""Take out of a modeling file what one class reaches, so that it stands alone.

Works on the text with LibCST and its scope analysis; nothing is imported. Formatting and comments
of what is kept stay as they are. Not covered: names reached by `globals()` or `getattr`.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import libcst as cst
from libcst.metadata import GlobalScope, MetadataWrapper, ScopeProvider

from portkit.architectures import closest
from portkit.errors import PortkitError
from portkit.steps.copy.bring import bring_in
from portkit.steps.copy.places import InTransformers

DOCS_ONLY = {
    "auto_docstring",
    "auto_class_docstring",
    "add_start_docstrings",
    "add_start_docstrings_to_model_forward",
    "add_end_docstrings",
    "add_code_sample_docstrings",
    "replace_return_docstrings",
}
"""Decorators of Transformers that only write documentation."""

Resolve = Callable[[int, str, frozenset[str]], tuple[int, str]]
"""(dots, module, imported names) of a `from` import → dots and module to write in the copy."""


@dataclass(frozen=True)
class Extracted:
    """A modeling file reduced to what one class needs."""

    code: str
    kept: tuple[str, ...]
    """Classes and functions that stay, in order."""
    left_out: tuple[str, ...]
    """Classes and functions that nothing kept reaches."""
    undecorated: int
    """How many docs-only decorators went."""


def parse(source: str, path: str) -> cst.Module:
    """Parse a modeling file; PortkitError with the line if it is no Python."""
    try:
        return cst.parse_module(source)
    except cst.ParserSyntaxError as error:
        number, why = error.raw_line, error.message
        try:
            ast.parse(source)
        except SyntaxError as python:  # Python's own parser points at the line more exactly
            number, why = python.lineno or number, python.msg
        lines = source.splitlines()
        line = lines[number - 1].strip() if 0 < number <= len(lines) else ""
        raise PortkitError(
            f"{path} is no valid Python: {why} in line {number}: {line!r}.",
            f"{path}:{number}",
            "Correct that line, or download the file again.",
        ) from error


def class_names(module: cst.Module) -> list[str]:
    """Return the names of the classes at the top level of a module."""
    return [s.name.value for s in module.body if isinstance(s, cst.ClassDef)]


def extract(source: str, root: str, path: str, resolve: Resolve) -> Extracted:
    """Return the part of `source` that the class `root` reaches, its imports made absolute.

    `path` names the file in errors. Raises PortkitError if it does not parse or lacks the class.
    """
    module = parse(source, path)
    names = class_names(module)
    if root not in names:
        near = closest(root, names) or ", ".join(names[:8])
        raise PortkitError(
            f"{path} defines no class {root}.",
            path,
            f"It has: {near}. Name one of its classes: `--model CLASS`."
            if near
            else "It defines no class at all. Give the file that defines the model.",
        )
    cleaner = _Cleaner(resolve)
    module = module.visit(cleaner)
    wrapper = MetadataWrapper(module, unsafe_skip_copy=True)
    module = wrapper.module
    graph = _Graph(module, wrapper)
    kept = graph.reachable(root)
    body = [graph.trimmed(index, kept) for index in sorted(kept)]
    body = _sorted_imports([statement for statement in body if statement is not None])
    defined = {
        s.name.value: index in kept
        for index, s in enumerate(module.body)
        if isinstance(s, cst.ClassDef | cst.FunctionDef)
    }
    new, _ = bring_in(module.with_changes(header=(), footer=(), body=body), _whole)
    return Extracted(
        new.code.strip("\n") + "\n",
        tuple(name for name, stays in defined.items() if stays),
        tuple(name for name, stays in defined.items() if not stays),
        cleaner.removed,
    )


def _whole(source: str, root: str, module: str) -> str:
    """What a class of another file of Transformers reaches there."""
    return extract(source, root, f"{module.replace('.', '/')}.py", InTransformers(module)).code


class _Cleaner(cst.CSTTransformer):
    """Make imports absolute; drop docs-only decorators and the text that only they read."""

    def __init__(self, resolve: Resolve) -> None:
        self.resolve = resolve
        self.removed = 0

    def leave_ImportFrom(self, original_node, updated_node):
        given = cst.Module([]).code_for_node(updated_node.module) if updated_node.module else ""
        names = updated_node.names if not isinstance(updated_node.names, cst.ImportStar) else ()
        imported = frozenset(_root_name(alias.name) for alias in names)
        level, name = self.resolve(len(updated_node.relative), given, imported)
        if (level, name) == (len(updated_node.relative), given):
            return updated_node
        return updated_node.with_changes(
            relative=[cst.Dot()] * level,
            module=cst.parse_expression(name) if name else None,
            whitespace_after_from=cst.SimpleWhitespace(" "),
        )

    def leave_FunctionDef(self, original_node, updated_node):
        return self._undecorated(updated_node, docstring=True)

    def leave_ClassDef(self, original_node, updated_node):
        return self._undecorated(updated_node, docstring=False)

    def _undecorated(self, node, docstring: bool):
        """Drop docs-only decorators; a function's docstring under one is a template for it."""
        kept = [d for d in node.decorators if _root_name(d.decorator) not in DOCS_ONLY]
        gone = len(node.decorators) - len(kept)
        if not gone:
            return node
        self.removed += gone
        if docstring and node.get_docstring() is not None:
            rest = list(node.body.body[1:]) or [cst.parse_statement("pass")]
            node = node.with_changes(body=node.body.with_changes(body=rest))
        return node.with_changes(decorators=kept)


def _root_name(node: cst.BaseExpression) -> str:
    while isinstance(node, cst.Call):
        node = node.func
    while isinstance(node, cst.Attribute):
        node = node.attr
    return node.value if isinstance(node, cst.Name) else ""


class _Graph:
    """Which top-level statement defines and which uses each global name."""

    def __init__(self, module: cst.Module, wrapper: MetadataWrapper) -> None:
        self.body = module.body
        self.defines: list[set[str]] = [set() for _ in self.body]
        self.uses: list[set[str]] = [set() for _ in self.body]
        home: dict[int, int] = {}
        for index, statement in enumerate(self.body):
            for node in _walk(statement):
                home[id(node)] = index
        scopes = wrapper.resolve(ScopeProvider)
        (scope,) = {s for s in scopes.values() if isinstance(s, GlobalScope)} or {None}
        self.used_by: dict[tuple[int, str], set[int]] = {}
        for assignment in scope.assignments if scope else ():
            node = getattr(assignment, "node", None)
            if id(node) not in home:
                continue
            self.defines[home[id(node)]].add(assignment.name)
            for access in assignment.references:
                user = home.get(id(access.node))
                if user is not None:
                    self.uses[user].add(assignment.name)

    def reachable(self, root: str) -> set[int]:
        """Return the indexes of the statements that the class `root` needs, and theirs."""
        kept = {i for i, names in enumerate(self.defines) if root in names}
        kept |= {i for i, s in enumerate(self.body) if _always(s, first=i == 0)}
        while True:
            wanted = set().union(*(self.uses[i] for i in kept))
            more = {i for i, names in enumerate(self.defines) if names & wanted} - kept
            own = set().union(*(self.defines[i] for i in kept))
            # `REGISTRY.append(Kept)`, `Kept.attribute = ...`: about kept definitions only.
            local = {
                n for i, s in enumerate(self.body) if not _is_import(s) for n in self.defines[i]
            }
            more |= {
                i
                for i, statement in enumerate(self.body)
                if i not in kept
                and not self.defines[i]
                and isinstance(statement, cst.SimpleStatementLine)
                and (about := self.uses[i] & local)
                and about <= own
            }
            if not more:
                return kept
            kept |= more

    def trimmed(self, index: int, kept: set[int]) -> cst.BaseStatement | None:
        """Return a kept statement without the imported names that nothing kept uses."""
        statement = self.body[index]
        if not _is_import(statement) or _always(statement, first=False):
            return statement
        wanted = set().union(*(self.uses[i] for i in kept))
        small = []
        for part in statement.body:
            aliases = [a for a in part.names if _bound_name(a) in wanted]
            if aliases:
                aliases[-1] = aliases[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
                fewer = len(aliases) < len(part.names)
                part = part.with_changes(names=aliases)
                if fewer and isinstance(part, cst.ImportFrom):
                    part = _on_one_line(part)
                small.append(part)
        return statement.with_changes(body=small) if small else None


def _on_one_line(node: cst.ImportFrom) -> cst.ImportFrom:
    """Lay a shortened import on one line, where that fits."""
    names = [cst.ImportAlias(a.name, a.asname) for a in node.names]
    plain = node.with_changes(names=names, lpar=None, rpar=None)
    return plain if len(cst.Module([]).code_for_node(plain)) <= 100 else node


def _bound_name(alias: cst.ImportAlias) -> str:
    node = alias.asname.name if alias.asname else alias.name
    while isinstance(node, cst.Attribute):
        node = node.value
    return node.value


def _walk(node: cst.CSTNode) -> Iterable[cst.CSTNode]:
    yield node
    for child in node.children:
        yield from _walk(child)


def _is_import(statement: cst.BaseStatement) -> bool:
    return isinstance(statement, cst.SimpleStatementLine) and all(
        isinstance(part, cst.Import | cst.ImportFrom) for part in statement.body
    )


def _always(statement: cst.BaseStatement, *, first: bool) -> bool:
    """Say whether a statement stays whatever is reached: module docstring, __future__ imports."""
    if not isinstance(statement, cst.SimpleStatementLine):
        return False
    part = statement.body[0]
    if isinstance(part, cst.ImportFrom):
        return isinstance(part.module, cst.Name) and part.module.value == "__future__"
    return first and isinstance(part, cst.Expr) and isinstance(part.value, cst.SimpleString)


def _sorted_imports(body: Sequence[cst.BaseStatement]) -> list[cst.BaseStatement]:
    """Sort each run of `from transformers… import` lines by module, as an import sorter would."""

    def key(statement: cst.BaseStatement) -> str:
        if _is_import(statement) and isinstance(statement.body[0], cst.ImportFrom):
            node = statement.body[0]
            name = cst.Module([]).code_for_node(node.module) if node.module else ""
            if not node.relative and name.split(".")[0] == "transformers":
                return name
        return ""

    done: list[cst.BaseStatement] = []
    run: list[cst.BaseStatement] = []
    for statement in [*body, None]:
        if statement is not None and key(statement):
            run.append(statement)
            continue
        if run:
            leading = run[0].leading_lines
            run = sorted([run[0].with_changes(leading_lines=()), *run[1:]], key=key)
            run[0] = run[0].with_changes(leading_lines=(*leading, *run[0].leading_lines))
            done += run
            run = []
        if statement is not None:
            done.append(statement)
    return done
