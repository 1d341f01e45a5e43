"""The shape of a rule: one file, one class, its documentation and its cases beside it.

A rule is a LibCST batchable visitor, so that all rules share one walk over the tree. What a rule
needs to know about the rest of the file it asks of `self.source`; about the port, of `self.port`.
Rules hold no state between files: the engine makes a fresh instance for every text.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import libcst as cst

from portkit.lint.finding import FixSafety, Invalid, PortContext, Severity, Valid
from portkit.lint.source import Source

Target = Literal["modeling", "init", "pyproject"]
Import = tuple[str, str]
"""(module, name): `from module import name`."""

HEADINGS = (
    "What it does",
    "Why vLLM wants it",
    "Example",
    "Use instead",
    "Fix safety",
    "References",
)


@dataclass(frozen=True)
class Report:
    """One finding before it gets its place in the port, with its fix if it has one."""

    message: str
    line: int
    column: int
    symbol: str
    module: cst.Module | None = None
    """The tree that `node` belongs to."""
    node: cst.CSTNode | None = None
    replacement: cst.CSTNode | cst.RemovalSentinel | None = None
    transform: Callable[[cst.Module], cst.Module] | None = None
    new_text: str | None = None
    imports: tuple[Import, ...] = ()
    """Imports that the fix needs."""
    unused: tuple[str, ...] = ()
    """Imported names that the fix may leave without a use."""

    @property
    def fixable(self) -> bool:
        return not (self.replacement is None and self.transform is None and self.new_text is None)


class Rule(cst.BatchableCSTVisitor):
    """Base of all rules. Subclasses define `visit_*`, VALID, INVALID and the docstring."""

    id: ClassVar[str] = ""
    """Kebab-case of the class name unless given: a name that reads as advice."""
    step: ClassVar[str] = ""
    """The room the rule's file stands in."""
    target: ClassVar[Target] = "modeling"
    """Which of the port's files the rule reads."""
    fix_safety: ClassVar[FixSafety] = "none"
    """"safe": the program keeps its meaning. "unsafe": right in the usual case; read the diff."""
    severity: ClassVar[Severity] = "task"
    VALID: ClassVar[list[Valid]] = []
    INVALID: ClassVar[list[Invalid]] = []

    _visitors: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not cls.__dict__.get("id"):
            cls.id = re.sub(
                r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", cls.__name__
            ).lower()
        room = re.search(r"portkit\.steps\.(\w+)\.rules\.", cls.__module__)
        if room:
            cls.step = room[1]
        cls._visitors = tuple(
            name
            for base in cls.__mro__
            if issubclass(base, Rule)
            for name in vars(base)
            if name.startswith(("visit_", "leave_"))
        )

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.source = source
        self.port: PortContext = source.port
        self.reports: list[Report] = []
        self.crash: Exception | None = None

    # ---- what rules call ---------------------------------------------------------------------

    def report(
        self,
        node: cst.CSTNode,
        message: str,
        *,
        replacement: cst.CSTNode | cst.RemovalSentinel | None = None,
        replaces: cst.CSTNode | None = None,
        transform: Callable[[cst.Module], cst.Module] | None = None,
        imports: tuple[Import, ...] = (),
        unused: tuple[str, ...] = (),
    ) -> None:
        """Report a node; the fix replaces it (or `replaces`), or transforms the whole module."""
        place = self.source.positions[
            node.name if hasattr(node, "body") and hasattr(node, "name") else node
        ]
        self.reports.append(
            Report(
                message,
                place.start.line,
                place.start.column,
                self.source.symbol(node),
                module=self.source.module,
                node=replaces or node,
                replacement=replacement,
                transform=transform,
                imports=imports,
                unused=unused,
            )
        )

    # ---- what the engine calls ---------------------------------------------------------------

    def get_visitors(self) -> dict[str, Callable[[cst.CSTNode], None]]:
        """Return this rule's visitor methods, each guarded: a bug here must not end the lint."""
        return {name: self._guarded(getattr(self, name)) for name in self._visitors}

    def _guarded(self, method: Callable[[cst.CSTNode], None]) -> Callable[[cst.CSTNode], None]:
        def guarded(node: cst.CSTNode) -> None:
            if self.crash is None:
                try:
                    method(node)
                except Exception as error:
                    self.crash = error

        return guarded

    @classmethod
    def headings(cls) -> dict[str, str]:
        """Return the docstring's parts: "" is the summary line, then heading → text."""
        parts: dict[str, str] = {}
        heading, lines = "", []
        for line in [*inspect.cleandoc(cls.__doc__ or "").splitlines(), "## "]:
            if line.startswith("## "):
                parts[heading] = "\n".join(lines).strip()
                heading, lines = line.removeprefix("## ").strip(), []
            else:
                lines.append(line)
        return parts


class TextRule(Rule):
    """A rule on a file that is not Python (pyproject.toml): it reads the text by itself."""

    def check(self, text: str) -> None:
        """Report what is wrong through `report_line`."""
        raise NotImplementedError

    def report_line(self, line: int, message: str, new_text: str | None = None) -> None:
        """Report a line (1-based); the fix replaces the whole text."""
        self.reports.append(Report(message, line, 0, "", new_text=new_text))
