"""Draw blocks as GitHub's Markdown, for a pull request."""

from __future__ import annotations

from collections.abc import Iterable

from portkit.checks.verdict import Table
from portkit.report.blocks import SYMBOLS, Block, Code, Diff, Fold, Heading, Line, Link, Log, Pairs
from portkit.report.text import cell


def to_markdown(blocks: Iterable[Block]) -> str:
    """Return the blocks as Markdown that renders on GitHub without HTML but for folds."""
    return "\n".join(_draw(block).rstrip("\n") + "\n" for block in blocks)


def _draw(block: Block) -> str:
    match block:
        case Heading(text):
            return f"## {text}\n"
        case Line():
            mark = f"{SYMBOLS[block.mark]} " if block.mark else ""
            label = f"**{block.label}:** " if block.label else ""
            aside = f" _({block.aside})_" if block.aside else ""
            return f"{'  ' * block.indent}- {mark}{label}{_flat(block.text)}{aside}"
        case Pairs(rows):
            return _table(("", ""), rows)
        case Table():
            title = f"**{block.title}**\n\n" if block.title else ""
            note = f"\n{block.note}\n" if block.note else ""
            return f"{title}{_table(block.columns, block.rows)}{note}"
        case Code(text):
            return f"```python\n{text}\n```"
        case Diff(text):
            return f"```diff\n{text}\n```"
        case Log(text):
            return f"```\n{text}\n```"
        case Link():
            return f"- {block.text}: `{block.path}`"
        case Fold():
            inside = to_markdown(block.blocks)
            return f"<details><summary>{block.summary}</summary>\n\n{inside}\n</details>\n"
    raise TypeError(f"no Markdown form for {type(block).__name__}")


def _table(columns: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    def line(values: Iterable[object]) -> str:
        return "| " + " | ".join(_flat(cell(v)).replace("|", "\\|") for v in values) + " |"

    columns = tuple(columns)
    return (
        "\n".join([line(columns), "|" + " --- |" * len(columns), *(line(row) for row in rows)])
        + "\n"
    )


def _flat(text: str) -> str:
    return " ".join(str(text).split())
