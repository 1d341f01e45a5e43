"""Flips: one-place edits that undo what real ports get wrong, each with what it means if it heals.

A flip reads what the source does (which of vLLM's layers it calls, with what) and what fields the
checkpoint's config has; it knows no model. A list of flips is an experiment: tried one by one on a
copy of the port, live, the one that makes the port agree names the cause.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from portkit.diagnosis.tree import Tree
from portkit.lint.source import parse

Edit = tuple[int, str, str, str]
"""(line, what is edited, what is wrong if it heals, the new source)."""
Maker = Callable[[Tree], Iterator[Edit]]


@dataclass(frozen=True)
class Flip:
    """One edit to try."""

    id: str
    topic: str
    """What it is about: "rotary", "attention", "qkv", ... as `TOPICS` of order.py has them."""
    title: str
    cause: str
    line: int
    source: str


_MAKERS: list[tuple[str, str, Maker]] = []


def flip(id: str, topic: str) -> Callable[[Maker], Maker]:
    """Register a generator of edits as a flip."""

    def register(maker: Maker) -> Maker:
        _MAKERS.append((id, topic, maker))
        return maker

    return register


def flips_of(source: str, config: Mapping[str, Any], path: str = "") -> tuple[Flip, ...]:
    """Return every flip that applies to a source; PortkitError if it does not parse."""
    from portkit.diagnosis import flips_attention, flips_layers  # noqa: F401  (they register)

    parse(source, path)
    tree = Tree(source, config)
    found: dict[str, Flip] = {}
    for id, topic, maker in _MAKERS:
        for line, title, cause, new in maker(tree):
            if new != source:
                found.setdefault(new, Flip(id, topic, title, cause, line, new))
    return tuple(found.values())


def compiles(source: str) -> bool:
    """Whether an edited source still is Python: one that is not would only waste a trial."""
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True
