"""Draw blocks with rich: in a terminal with colour, in a log as plain text."""

from __future__ import annotations

import io
from collections.abc import Iterable

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from portkit.checks.verdict import Table
from portkit.report.blocks import SYMBOLS, Block, Code, Diff, Fold, Heading, Line, Link, Log, Pairs

STYLES = {
    "passed": "green",
    "failed": "bold red",
    "skipped": "yellow",
    "warning": "yellow",
    "todo": "cyan",
    "note": "",
    "": "",
}
TEXT_WIDTH = 100
"""Columns of text/plain output; wide enough for a table row, narrow enough for a notebook."""


def to_rich(blocks: Iterable[Block]) -> Group:
    """Return a rich renderable of the blocks."""
    return Group(*(_draw(block) for block in blocks))


def to_text(blocks: Iterable[Block], width: int = TEXT_WIDTH) -> str:
    """Return the blocks as plain text without escape codes."""
    stream = io.StringIO()
    console = Console(
        file=stream,
        width=width,
        no_color=True,
        force_terminal=False,
        force_jupyter=False,  # else rich displays it by itself, as a second output of the cell
        legacy_windows=False,
    )
    console.print(to_rich(blocks))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def _draw(block: Block) -> RenderableType:
    match block:
        case Heading(text):
            return Text(f"\n{text}", style="bold")
        case Line():
            return Padding(_line(block), (0, 0, 0, 2 * block.indent), expand=False)
        case Pairs(rows):
            return _grid(rows)
        case Code():
            return _code(block)
        case Diff(text, title):
            return _diff(text, title)
        case Log(text):
            return Padding(
                Text(text, style="dim", no_wrap=True, overflow="fold"), (0, 0, 0, 4), expand=False
            )
        case Link(text, path, line):
            return Text(f"{text}: {path}{f':{line}' if line else ''}", overflow="fold")
        case Fold():
            return _fold(block)
        case Table():
            return _table(block)
    raise TypeError(f"no text form for {type(block).__name__}")


def _marked(mark: str, text: str) -> str:
    return (
        f"{SYMBOLS[mark]} {mark}  {text}"
        if mark in ("passed", "failed", "skipped")
        else f"{SYMBOLS[mark]} {text}".strip()
    )


def _line(line: Line) -> RenderableType:
    text = Text(overflow="fold")
    if line.mark:
        text.append(
            _marked(line.mark, "") + ("" if line.mark in ("passed", "failed", "skipped") else " "),
            style=STYLES[line.mark],
        )
    if line.label:
        text.append(f"{line.label}: ", style="bold")
    text.append(line.text)
    if line.aside:
        text.append(f"  ({line.aside})", style="dim")
    return text


def _grid(rows: tuple[tuple[str, str], ...]) -> RenderableType:
    grid = RichTable.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(Text(str(name)), Text(str(value)))
    return grid


def _table(table: Table) -> RenderableType:
    drawn = RichTable()
    for position, column in enumerate(table.columns):
        right = bool(table.rows) and all(
            isinstance(row[position], (int, float)) for row in table.rows if position < len(row)
        )
        drawn.add_column(Text(str(column)), justify="right" if right else "left", overflow="fold")
    for row in table.rows:
        drawn.add_row(*(Text(cell(value)) for value in row))
    above = [Text(table.title, style="bold")] if table.title else []
    below = [Text(table.note, style="dim")] if table.note else []
    return Group(*above, drawn, *below)


def cell(value: object) -> str:
    """Return a table cell's text: floats short but never rounded to a lie."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def _code(code: Code) -> RenderableType:
    remarks = dict(code.marked)
    lines: list[RenderableType] = [Text(code.title, style="bold")] if code.title else []
    for number, line in enumerate(code.text.splitlines(), code.first_line):
        here = number in remarks
        text = Text(no_wrap=True, overflow="ellipsis")
        text.append(f"{'→' if here else ' '} {number:4d}  ", style="bold yellow" if here else "dim")
        text.append(line)
        lines.append(text)
        if remarks.get(number):
            left = 8 + len(line) - len(line.lstrip())
            remark = Text(f"^ {remarks[number]}", style="yellow", overflow="fold")
            lines.append(Padding(remark, (0, 0, 0, left), expand=False))
    return Group(*lines)


def _diff(diff: str, title: str) -> RenderableType:
    styles = {"+": "green", "-": "red", "@": "cyan"}
    text = Text(no_wrap=True, overflow="ellipsis")
    if title:
        text.append(f"{title}\n", style="bold")
    for line in diff.splitlines():
        text.append(line + "\n", style=styles.get(line[:1], ""))
    text.rstrip()
    return text


def _fold(fold: Fold) -> RenderableType:
    if not fold.in_text:
        return Group()
    head = Text(_marked(fold.mark, fold.summary), style=STYLES[fold.mark])
    return Group(head, Padding(to_rich(fold.blocks), (0, 0, 0, 2), expand=False))
