"""Draw blocks as HTML: inline styles only, no scripts, legible on light and dark.

Text keeps the page's own colour; marks and diff lines use mid-tones that stand on both themes, and
each is said in words and with a symbol too. Everything from outside is escaped.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from html import escape
from pathlib import Path

from portkit.checks.verdict import Table
from portkit.report.blocks import SYMBOLS, Block, Code, Diff, Fold, Heading, Line, Link, Log, Pairs
from portkit.report.text import cell

COLOURS = {
    "passed": "#2da44e",
    "failed": "#e5534b",
    "skipped": "#b0872c",
    "warning": "#b0872c",
    "todo": "#3b8eea",
    "note": "inherit",
    "": "inherit",
}
EDGE = "1px solid rgba(128,128,128,.35)"
MONO = "font-family:var(--jp-code-font-family,ui-monospace,Menlo,Consolas,monospace);font-size:.9em"
PRE = (
    f"margin:.3em 0;padding:.4em .6em;border:{EDGE};border-radius:4px;overflow-x:auto;"
    f"line-height:1.35;white-space:pre;{MONO}"
)


def to_html(blocks: Iterable[Block]) -> str:
    """Return the blocks as one HTML fragment."""
    return f'<div style="max-width:70em">{_all(blocks)}</div>'


def page(blocks: Iterable[Block], title: str) -> str:
    """Return a whole HTML page that follows the reader's light or dark setting."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width">'
        '<meta name="color-scheme" content="light dark">'
        '</head><body style="font-family:system-ui,sans-serif;margin:2em auto;'
        'max-width:72em;padding:0 1em">'
        f"{to_html(blocks)}</body></html>\n"
    )


def _all(blocks: Iterable[Block]) -> str:
    return "".join(_draw(block) for block in blocks)


def inline(text: str) -> str:
    """Escape text; what stands in backticks becomes code, line ends are kept."""
    parts = re.split(r"`([^`\n]+)`", text)
    done = [
        f'<code style="{MONO}">{escape(p)}</code>' if i % 2 else escape(p)
        for i, p in enumerate(parts)
    ]
    return "".join(done).replace("\n", "<br>")


def _draw(block: Block) -> str:
    match block:
        case Heading(text, level):
            size = "1.5em" if level == 1 else "1.05em"
            style = f"font-weight:600;font-size:{size};margin:.7em 0 .3em"
            return f'<div style="{style}">{inline(text)}</div>'
        case Line():
            return _line(block)
        case Pairs(rows):
            return _pairs(rows)
        case Code():
            return _code(block)
        case Diff(text, title):
            return _diff(text, title)
        case Log(text):
            return f'<pre style="{PRE};max-height:24em;overflow-y:auto">{escape(text)}</pre>'
        case Link():
            return _link(block)
        case Fold():
            return _fold(block)
        case Table():
            return _table(block)
    raise TypeError(f"no HTML form for {type(block).__name__}")


def _mark(mark: str) -> str:
    if not mark:
        return ""
    word = f" {mark}" if mark in ("passed", "failed", "skipped") else ""
    style = f"color:{COLOURS[mark]};font-weight:600;white-space:nowrap"
    return f'<span style="{style}">{SYMBOLS[mark]}{word}</span>&nbsp; '


def _line(line: Line) -> str:
    label = f"<strong>{escape(line.label)}:</strong> " if line.label else ""
    aside = f' <span style="opacity:.7">({inline(line.aside)})</span>' if line.aside else ""
    style = f"margin:.15em 0 .15em {1.4 * line.indent:g}em"
    return f'<div style="{style}">{_mark(line.mark)}{label}{inline(line.text)}{aside}</div>'


def _pairs(rows: tuple[tuple[str, str], ...]) -> str:
    body = "".join(
        '<tr><th style="text-align:left;vertical-align:top;padding:.1em 1em .1em 0">'
        f"{inline(str(name))}</th>"
        f'<td style="text-align:left;padding:.1em 0">{inline(str(value))}</td></tr>'
        for name, value in rows
    )
    return f'<table style="border-collapse:collapse;margin:.3em 0"><tbody>{body}</tbody></table>'


def _table(table: Table) -> str:
    box = f"padding:.2em .7em;border-bottom:{EDGE};vertical-align:top"
    head = "".join(
        f'<th scope="col" style="text-align:left;{box}">{inline(str(c))}</th>'
        for c in table.columns
    )
    rows = []
    for row in table.rows:
        cells = []
        for value in row:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            align = "right" if number else "left"
            cells.append(f'<td style="text-align:{align};{box}">{inline(cell(value))}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    caption = (
        '<caption style="text-align:left;font-weight:600;padding:.2em 0">'
        f"{inline(table.title)}</caption>"
        if table.title
        else ""
    )
    note = (
        f'<div style="opacity:.75;font-size:.9em">{inline(table.note)}</div>' if table.note else ""
    )
    return (
        '<div style="overflow-x:auto;margin:.4em 0">'
        f'<table style="border-collapse:collapse">{caption}'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>{note}</div>"
    )


def _title(title: str) -> str:
    return (
        f'<div style="font-weight:600;margin:.5em 0 0;{MONO}">{escape(title)}</div>'
        if title
        else ""
    )


def _code(code: Code) -> str:
    remarks = dict(code.marked)
    lines = []
    for number, line in enumerate(code.text.splitlines(), code.first_line):
        here = number in remarks
        gutter = f'<span style="opacity:.6">{"→" if here else " "} {number:4d}  </span>'
        wash = "background:rgba(210,153,34,.22);" if here else ""
        lines.append(f'<span style="display:block;{wash}">{gutter}{escape(line) or " "}</span>')
        if remarks.get(number):
            left = 8 + len(line) - len(line.lstrip())
            style = f"display:block;white-space:normal;padding-left:{left}ch"
            remark = f'<span style="color:{COLOURS["warning"]}">^</span> {inline(remarks[number])}'
            lines.append(f'<span style="{style}">{remark}</span>')
    return f'{_title(code.title)}<pre style="{PRE}">{"".join(lines)}</pre>'


def _diff(diff: str, title: str) -> str:
    wash = {"+": "rgba(46,160,67,.20)", "-": "rgba(229,83,75,.20)"}
    lines = []
    for line in diff.splitlines():
        sign = "" if line.startswith(("+++", "---")) else line[:1]
        style = (
            f"background:{wash[sign]};" if sign in wash else "opacity:.7;" if sign == "@" else ""
        )
        lines.append(f'<span style="display:block;{style}">{escape(line) or " "}</span>')
    return f'{_title(title)}<pre style="{PRE}">{"".join(lines)}</pre>'


def _link(link: Link) -> str:
    """A relative link: JupyterLab opens it in a tab beside the notebook, from any base URL."""
    relative = Path(os.path.relpath(link.path, os.getcwd())).as_posix()
    line = f", line {link.line}" if link.line else ""
    return (
        f'<div style="margin:.3em 0"><a href="{escape(relative, quote=True)}" target="_blank">'
        f"{inline(link.text)}</a>{line}</div>"
    )


def _fold(fold: Fold) -> str:
    summary = f'<summary style="cursor:pointer">{_mark(fold.mark)}{inline(fold.summary)}</summary>'
    body = f'<div style="margin-left:1.2em">{_all(fold.blocks)}</div>'
    return (
        f'<details{" open" if fold.open else ""} style="margin:.25em 0">{summary}{body}</details>'
    )
