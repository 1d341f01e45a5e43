"""The few shapes that a report is made of; `text` and `html` know how to draw each.

A report is a value: it is built once and drawn wherever it is looked at (Jupyter, a terminal, a
log). In text, `backticks` mark code; nothing else is markup, so that whatever a model's source or
an error message contains is shown as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from portkit.checks.verdict import Table

Mark = Literal["", "passed", "failed", "skipped", "todo", "note", "warning"]

SYMBOLS: dict[str, str] = {
    "": "",
    "passed": "✓",
    "failed": "✗",
    "skipped": "○",
    "todo": "□",
    "note": "·",
    "warning": "!",
}
"""Said together with the word: colour is never the only signal."""


@dataclass(frozen=True)
class Heading:
    """A line that titles what follows."""

    text: str
    level: int = 2
    """1 titles a whole page."""


@dataclass(frozen=True)
class Line:
    """A sentence, with a mark in front if it says how something ended."""

    text: str
    mark: Mark = ""
    label: str = ""
    """Short lead-in before the text, e.g. "next"."""
    aside: str = ""
    """Small print after the text, e.g. "cpu, 1.2 s"."""
    indent: int = 0


@dataclass(frozen=True)
class Pairs:
    """Facts as name and value."""

    rows: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Code:
    """Source text with its line numbers; lines in `marked` are the ones concerned."""

    text: str
    first_line: int = 1
    marked: tuple[tuple[int, str], ...] = ()
    """(line, remark) for each line to point at."""
    title: str = ""


@dataclass(frozen=True)
class Diff:
    """A unified diff."""

    text: str
    title: str = ""


@dataclass(frozen=True)
class Log:
    """Output of a process, as it was."""

    text: str


@dataclass(frozen=True)
class Link:
    """A file to open: a link in HTML, its path in text."""

    text: str
    path: str
    """Absolute path of the file."""
    line: int = 0


@dataclass(frozen=True)
class Fold:
    """Blocks behind a summary: closed in HTML until asked for, indented in text."""

    summary: str
    blocks: tuple[Block, ...]
    mark: Mark = ""
    open: bool = False
    in_text: bool = True
    """Whether it is in the text form at all."""


Block = Heading | Line | Pairs | Code | Diff | Log | Link | Fold | Table


@dataclass(frozen=True, repr=False)
class Report:
    """Blocks in order, and the values they were made from."""

    blocks: tuple[Block, ...]
    ok: bool = True
    values: tuple[Any, ...] = field(default=(), compare=False)
    """What was rendered: verdicts, findings, outcomes."""

    def __rich__(self):
        from portkit.report.text import to_rich

        return to_rich(self.blocks)

    def __str__(self) -> str:
        from portkit.report.text import to_text

        return to_text(self.blocks)

    __repr__ = __str__

    def html(self) -> str:
        """Return the report as an HTML fragment without scripts or external styles."""
        from portkit.report.html import to_html

        return to_html(self.blocks)

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        return {"text/plain": str(self), "text/html": self.html()}

    def __add__(self, other: Report) -> Report:
        return Report(self.blocks + other.blocks, self.ok and other.ok, self.values + other.values)
