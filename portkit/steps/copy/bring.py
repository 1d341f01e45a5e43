"""Bring in classes that a modeling file of Transformers imports from another model's file.

The copy stands alone: what it computes can be read, and changed for vLLM, in one file.
"""

from __future__ import annotations

from collections.abc import Callable

import libcst as cst

from portkit.architectures import transformers_folder

Extractor = Callable[[str, str, str], str]
"""(source, class, module) → code of what the class reaches, its imports absolute."""


def bring_in(module: cst.Module, extractor: Extractor) -> tuple[cst.Module, tuple[str, ...]]:
    """Return the file with those classes in it, and their names.

    An import stays where it brings something else than a class, or names that the file uses
    for something else.
    """
    brought: list[str] = []
    own = next(s for s in module.body if isinstance(s, cst.ClassDef | cst.FunctionDef))
    for statement in list(module.body):
        source = _other_model(statement)
        if not source:
            continue
        names = [a.name.value for a in statement.body[0].names if a.asname is None]
        file = transformers_folder().parent.joinpath(*source.split(".")).with_suffix(".py")
        if len(names) != len(statement.body[0].names) or not file.is_file():
            continue
        text = file.read_text(encoding="utf-8")
        if not all(f"\nclass {name}(" in text for name in names):
            continue
        new = module.with_changes(body=[s for s in module.body if s is not statement])
        for name in names:
            new = _with(new, cst.parse_module(extractor(text, name, source)), source, own)
            if new is None:
                break
        if new is not None:
            module = new
            brought += names
    return module, tuple(brought)


def _other_model(statement: cst.CSTNode) -> str:
    """The module of `from transformers.models.x.modeling_x import ...`, or ""."""
    if not isinstance(statement, cst.SimpleStatementLine):
        return ""
    small = statement.body[0]
    if not isinstance(small, cst.ImportFrom) or isinstance(small.names, cst.ImportStar):
        return ""
    name = cst.Module([]).code_for_node(small.module) if small.module and not small.relative else ""
    parts = name.split(".")
    models = parts[:2] == ["transformers", "models"] and len(parts) == 4
    return name if models and parts[3].startswith("modeling_") and parts[2] != "auto" else ""


def _with(
    module: cst.Module, other: cst.Module, source: str, own: cst.CSTNode
) -> cst.Module | None:
    """The file with the other's statements before its `own` first; None if names clash."""
    shown = {name: what for s in module.body for name, what in _bound(s).items()}
    imports: list[cst.BaseStatement] = []
    definitions: list[cst.BaseStatement] = []
    for statement in other.body:
        new = {n: what for n, what in _bound(statement).items() if n not in shown}
        if any(shown.get(name, what) != what for name, what in _bound(statement).items()):
            return None
        if new:
            (imports if _is_import(statement) else definitions).append(statement)
    if definitions:
        note = cst.EmptyLine(comment=cst.Comment(f"# From {source}"))
        blank = [cst.EmptyLine(indent=False)] * 2
        definitions[0] = definitions[0].with_changes(leading_lines=[*blank, note])
    body = list(module.body)
    at = body.index(own)
    last = max((i for i, s in enumerate(body[:at]) if _is_import(s)), default=-1) + 1
    plain = [s.with_changes(leading_lines=()) for s in imports]
    body[at:at] = definitions
    body[last:last] = plain
    return module.with_changes(body=body)


def _is_import(statement: cst.CSTNode) -> bool:
    return isinstance(statement, cst.SimpleStatementLine) and isinstance(
        statement.body[0], cst.Import | cst.ImportFrom
    )


def _bound(statement: cst.CSTNode) -> dict[str, str]:
    """Names that a statement at the top level binds, and to what: an import, or a definition."""
    code = cst.Module([]).code_for_node
    if isinstance(statement, cst.ClassDef | cst.FunctionDef):
        return {statement.name.value: code(statement.with_changes(leading_lines=())).strip()}
    if not isinstance(statement, cst.SimpleStatementLine):
        return {}
    small = statement.body[0]
    if _is_import(statement) and not isinstance(small.names, cst.ImportStar):
        place = code(small.module) if isinstance(small, cst.ImportFrom) and small.module else ""
        return {
            code(a.asname.name if a.asname else a.name).split(".")[0]: f"{place}:{code(a.name)}"
            for a in small.names
        }
    if isinstance(small, cst.Assign):
        return {code(t.target): code(statement).strip() for t in small.targets}
    return {}
