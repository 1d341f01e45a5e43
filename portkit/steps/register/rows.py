"""Put a row in its alphabetical place in vLLM's registries, as text, touching no other line."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

from portkit.errors import PortkitError


@dataclass(frozen=True)
class _Row:
    key: str
    first: int
    """Line (0-based) where the row, with the comments that belong to it, begins."""
    last: int


def add_dict_row(source: str, table: str, section: str, key: str, row: str) -> str:
    """Return `source` with `row` (one or more lines, indented) in the dict `table`.

    `section` is the comment that opens the part of the table, e.g. "# [Decoder-only]".
    Raises PortkitError if there is no such table, or it has the key already.
    """
    lines = source.splitlines(keepends=True)
    inside = _section_rows(source, table, section)
    if any(r.key == key for r in inside):
        raise PortkitError(
            f"{key} has a row in {table} already.",
            table,
            "Drop that row first, or leave it as it is.",
        )
    place = _alphabetical([r.key for r in inside], key)
    at = inside[place].first if place < len(inside) else inside[-1].last + 1
    return "".join([*lines[:at], row, *lines[at:]])


def drop_dict_row(source: str, table: str, key: str) -> str:
    """Return `source` without the row of `key` in `table`, if it has one."""
    lines = source.splitlines(keepends=True)
    for row in _dict_rows(source, table):
        if row.key == key:
            return "".join([*lines[: row.first], *lines[row.last + 1 :]])
    return source


def add_table_row(page: str, heading: str, key: str, row: str) -> str:
    """Return the Markdown `page` with `row` in the first table after `heading`, sorted by key."""
    lines = page.splitlines(keepends=True)
    first, keys = _table_keys(lines, heading)
    if key in keys:
        return page
    at = first + _alphabetical(keys, key)
    return "".join([*lines[:at], row, *lines[at:]])


def neighbours(keys: list[str], key: str) -> tuple[str, str, str, bool] | None:
    """Return (key before, key, key after, whether that is its place); None if it is absent."""
    if key not in keys:
        return None
    at = keys.index(key)
    others = keys[:at] + keys[at + 1 :]
    well = _slips(others, key, at) == _slips(others, key, _alphabetical(others, key))
    return (others[at - 1] if at else "", key, others[at] if at < len(others) else "", well)


def dict_keys(source: str, table: str, section: str) -> list[str]:
    """Return the keys of one section of the dict `table`, in the order of the file."""
    return [row.key for row in _section_rows(source, table, section)]


def table_keys(page: str, heading: str) -> list[str]:
    """Return the first key of each row of the first table after `heading`."""
    return _table_keys(page.splitlines(), heading)[1]


def _table_keys(lines: list[str], heading: str) -> tuple[int, list[str]]:
    start = next((i for i, line in enumerate(lines) if line.strip() == heading), len(lines))
    bar = next((i for i in range(start, len(lines)) if re.match(r"\| -", lines[i])), None)
    if bar is None:
        raise PortkitError(
            f"The page has no table under {heading!r}.",
            heading,
            "Is this the source of vLLM 0.32.0?",
        )
    end = bar + 1
    while end < len(lines) and lines[end].startswith("|"):
        end += 1
    names = (re.search(r"`([^`]+)`", line) for line in lines[bar + 1 : end])
    return bar + 1, [name[1] if name else "" for name in names]


def _section_rows(source: str, table: str, section: str) -> list[_Row]:
    lines = source.splitlines()
    rows = _dict_rows(source, table)
    headings = [i for i, line in enumerate(lines) if re.match(r"\s*# \[", line)]
    start = next((i for i in headings if lines[i].strip().startswith(section)), None)
    if start is None:
        raise PortkitError(
            f"{table} has no section {section!r}.", table, "Is this the source of vLLM 0.32.0?"
        )
    end = next((i for i in headings if i > start), len(lines))
    return [row for row in rows if start < row.first < end]


def _dict_rows(source: str, table: str) -> list[_Row]:
    lines = source.splitlines()
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names = [t.id for t in targets if isinstance(t, ast.Name)]
        if table in names and isinstance(node.value, ast.Dict):
            return [
                _Row(key.value, _with_comments(lines, key.lineno - 1), value.end_lineno - 1)
                for key, value in zip(node.value.keys, node.value.values, strict=True)
                if isinstance(key, ast.Constant)
            ]
    raise PortkitError(f"There is no table {table}.", table, "Is this the source of vLLM 0.32.0?")


def _with_comments(lines: list[str], first: int) -> int:
    """Move up over the comments of a row (a "# FIXME ..."), but not over a section heading."""
    while re.match(r"\s*# (?!\[)", lines[first - 1]):
        first -= 1
    return first


def _alphabetical(keys: list[str], key: str) -> int:
    """Return the place that leaves the fewest keys out of order: the real lists have slips."""
    return min(range(len(keys) + 1), key=lambda place: _slips(keys, key, place))


def _slips(keys: list[str], key: str, place: int) -> int:
    folded, new = [k.casefold() for k in keys], key.casefold()
    return sum(k > new for k in folded[:place]) + sum(k < new for k in folded[place:])
