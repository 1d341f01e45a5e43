"""The file being drafted, what was done to it so far, and what a person must decide."""

from __future__ import annotations

from dataclasses import dataclass, field

import libcst as cst

from portkit.analysis.facts import ModelFacts
from portkit.draft import edit
from portkit.draft.blocker import Blocker


@dataclass
class Work:
    """Mutable on purpose: one draft of one step, passed from transform to transform."""

    module: cst.Module
    facts: ModelFacts
    did: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def cls(self, name: str) -> cst.ClassDef:
        for item in self.module.body:
            if isinstance(item, cst.ClassDef) and item.name.value == name:
                return item
        raise Blocker(f"there is no class {name} in the file.")

    def functions(self) -> dict[str, cst.FunctionDef]:
        """Functions at the file's top level."""
        return {i.name.value: i for i in self.module.body if isinstance(i, cst.FunctionDef)}

    def has(self, name: str) -> bool:
        """Is there a class of this name in the file?"""
        return any(isinstance(i, cst.ClassDef) and i.name.value == name for i in self.module.body)

    def put(self, new: cst.ClassDef | cst.FunctionDef) -> None:
        """Put a class or a function back under its name."""
        self.module = self.module.with_changes(
            body=[
                new if isinstance(i, type(new)) and i.name.value == new.name.value else i
                for i in self.module.body
            ]
        )

    def line_of(self, text: str) -> int:
        """First line of the file that contains this text; 0 if none."""
        for number, line in enumerate(self.module.code.splitlines(), 1):
            if text in line:
                return number
        return 0


def set_members(cls: cst.ClassDef, members: list[edit.Statement]) -> cst.ClassDef:
    return cls.with_changes(body=cst.IndentedBlock(body=members or [edit.statement("pass")]))


def put_class(module: cst.Module, new: cst.ClassDef) -> cst.Module:
    """The file with a class in the place of the one of its name."""
    name = new.name.value
    return module.with_changes(
        body=[
            new if isinstance(i, cst.ClassDef) and i.name.value == name else i for i in module.body
        ]
    )


def set_method(cls: cst.ClassDef, new: cst.FunctionDef) -> cst.ClassDef:
    """Replace a method, or add it at the end of the class."""
    old = edit.method(cls, new.name.value)
    if old is None:
        return set_members(cls, [*edit.members(cls), edit.blank_before(new)])
    new = new.with_changes(leading_lines=old.leading_lines)
    return set_members(cls, [new if m is old else m for m in edit.members(cls)])


def plain_module(cls: cst.ClassDef) -> cst.ClassDef:
    """Make it a bare nn.Module: no base class, decorator or class attribute of Transformers."""
    members = [m for m in edit.members(cls) if not _transformers_attribute(m)]
    while (
        members
        and not isinstance(members[0], cst.FunctionDef)
        and not edit.is_docstring(members[0])
    ):
        break
    cls = set_members(cls, members)
    if members and isinstance(members[0], cst.FunctionDef):
        members[0] = members[0].with_changes(leading_lines=[])
        cls = set_members(cls, members)
    return cls.with_changes(bases=[cst.Arg(edit.expression("nn.Module"))], decorators=[])


def _transformers_attribute(node: edit.Statement) -> bool:
    pair = edit.assigned(node)
    if pair and isinstance(pair[0], cst.Name):
        name = pair[0].value
        return name.startswith("_") or name in (
            "base_model_prefix",
            "supports_gradient_checkpointing",
            "config_class",
        )
    small = edit.single(node)
    return isinstance(small, cst.AnnAssign) and edit.code(small.target) == "config"


def rewrite_init(
    cls: cst.ClassDef,
    signature: str,
    body: list[edit.Statement],
    after_super: list[edit.Statement] = (),
) -> cst.ClassDef:
    """Give `__init__` a new signature; `after_super` goes behind super().__init__()."""
    kept: list[edit.Statement] = []
    inserted = False
    for node in body:
        if edit.is_docstring(node):
            continue
        small = edit.single(node)
        if isinstance(small, cst.Expr) and edit.code(small.value).startswith("super().__init__("):
            kept.append(
                edit.statement("super().__init__()").with_changes(leading_lines=node.leading_lines)
            )
            kept += after_super
            inserted = True
        elif isinstance(small, cst.Expr) and edit.code(small.value) == "self.post_init()":
            continue
        else:
            kept.append(node)
    if not inserted:
        raise Blocker(f"{cls.name.value}.__init__ does not call super().__init__().")
    new = edit.function(f"def __init__({signature}):\n    pass")
    return set_method(cls, edit.with_body(new, kept))
