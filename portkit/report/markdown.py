"""Draw blocks as GitHub's Markdown, for a pull request."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape

from portkit.checks.verdict import Table
from portkit.report.blocks import SYMBOLS, Block, Code, Diff, Fold, Heading, Line, Link, Log, Pairs
from portkit.report.text import cell


def to_markdown(blocks: Iterable[Block]) -> str:
    """Return the blocks as Markdown that renders on GitHub without HTML but for folds."""
    drawn, last = "", None
    for block in blocks:
        # Items of one list stay together; everything else stands apart.
        apart = "" if drawn == "" or (isinstance(block, Line) and isinstance(last, Line)) else "\n"
        drawn += apart + _draw(block).rstrip("\n") + "\n"
        last = block
    return drawn


def _draw(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_flat(text)}"
        case Line():
            mark = f"{SYMBOLS[block.mark]} " if block.mark else ""
            label = f"**{_flat(block.label)}:** " if block.label else ""
            aside = f" _({_flat(block.aside)})_" if block.aside else ""
            return f"{'  ' * block.indent}- {mark}{label}{_flat(block.text)}{aside}"
        case Pairs(rows):
            return _table(("", ""), rows)
        case Table():
            title = f"**{_flat(block.title)}**\n\n" if block.title else ""
            note = f"\n{_flat(block.note)}\n" if block.note else ""
            return f"{title}{_table(block.columns, block.rows)}{note}"
        case Code(text):
            return _fence(text, "python")
        case Diff(text):
            return _fence(text, "diff")
        case Log(text):
            return _fence(text)
        case Link():
            return f"- {_flat(block.text)}: `{block.path}`"
        case Fold():
            inside = to_markdown(block.blocks)
            mark = f"{SYMBOLS[block.mark]} " if block.mark else ""
            summary = f"<summary>{mark}{escape(block.summary)}</summary>"
            return f"<details>{summary}\n\n{inside}\n</details>"
    raise TypeError(f"no Markdown form for {type(block).__name__}")


def _table(columns: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    def line(values: Iterable[object]) -> str:
        return "| " + " | ".join(_flat(cell(v)).replace("|", "\\|") for v in values) + " |"

    columns = tuple(columns)
    return (
        "\n".join([line(columns), "|" + " --- |" * len(columns), *(line(row) for row in rows)])
        + "\n"
    )


def _fence(text: str, language: str = "") -> str:
    """A fence longer than any in the text."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _flat(text: str) -> str:
    """One line; outside of `code` nothing is markup (model.layers.*, <unk>)."""
    parts = re.split(r"(`[^`\n]+`)", " ".join(str(text).split()))
    return "".join(p if i % 2 else re.sub(r"([<*])", r"\\\1", p) for i, p in enumerate(parts))
