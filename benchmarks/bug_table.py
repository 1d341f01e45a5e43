"""The table of seeded bugs: correct ports, and edits that break them the way real ports break.

One TOML file per port in `benchmarks/bugs/`. An edit is a text that stands in the port exactly once
and what stands there instead; an edit that does not apply is an error, so that the table cannot
rot. Ids that begin with B are those of the catalogue of porting bugs that the table was made from.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from portkit.curriculum import steps

FOLDER = Path(__file__).parent / "bugs"
MODELING = "modeling"
"""The name, in the table, of the port's modeling file; others are paths inside the port."""


class DoesNotApply(Exception):
    """An edit whose text is not in the port, or is there more than once."""


@dataclass(frozen=True)
class Bug:
    """One edit, where it belongs, and what a good answer would say."""

    id: str
    """Unique in the table, e.g. "gemma2/B09"."""
    title: str
    step: str
    """The step whose work is wrong, so whose checks have to find it."""
    edits: tuple[tuple[str, str], ...]
    """Old text and new; an empty new text for a file of its own removes the file."""
    cause: str
    """A regular expression for the true cause, as a person would name it."""
    module: str
    """A regular expression for the module that is wrong, as a path or a line would show it."""
    file: str = MODELING
    state: str = "weights"
    """The step up to which the correct port is drafted before it is broken."""

    @property
    def first_step(self) -> str:
        """The first step whose checks read what the edit changed."""
        if self.state == "copy":
            return "copy"
        if self.file == MODELING:
            return "forward"
        return self.step

    def apply(self, text: str) -> str:
        """Return the broken text; DoesNotApply if an edit does not fit exactly once."""
        for old, new in self.edits:
            found = text.count(old)
            if found != 1:
                raise DoesNotApply(f"{self.id}: {found} places in the port read {old!r}")
            text = text.replace(old, new)
        return text


@dataclass(frozen=True)
class Ported:
    """A correct port and its bugs."""

    name: str
    architecture: str
    features: tuple[str, ...]
    """What this port stands for, e.g. "soft-caps"."""
    config: Mapping[str, Any]
    """Fields of its random checkpoint's config that are not as `random_checkpoint` would set them;
    unused if a checkpoint is bundled."""
    bugs: tuple[Bug, ...]


@cache
def table() -> tuple[Ported, ...]:
    """Return all ports of the table, by file name."""
    return tuple(read(path) for path in sorted(FOLDER.glob("*.toml")))


def read(path: Path) -> Ported:
    """Return one port; ValueError for an entry that is not whole."""
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    name = path.stem
    bugs = tuple(_bug(name, entry) for entry in data["bug"])
    ids = [bug.id for bug in bugs]
    if len(set(ids)) != len(ids):
        raise ValueError(f"{path.name}: an id stands there twice")
    return Ported(name, data["architecture"], tuple(data["features"]), data.get("config", {}), bugs)


def _bug(port: str, entry: dict[str, Any]) -> Bug:
    known = {step.id for step in steps()}
    if entry["step"] not in known or entry.get("state", "weights") not in known:
        raise ValueError(f"{port}/{entry['id']}: no such step")
    edits = tuple((old, new) for old, new in entry["edits"])
    rest = {k: v for k, v in entry.items() if k not in ("id", "edits")}
    return Bug(id=f"{port}/{entry['id']}", edits=edits, **rest)


def changed_lines(before: str, after: str) -> set[int]:
    """Return the lines of `after` that an edit touched; for a deletion, the lines beside it."""
    matcher = difflib.SequenceMatcher(None, before.splitlines(), after.splitlines(), autojunk=False)
    found: set[int] = set()
    for kind, _, _, start, end in matcher.get_opcodes():
        if kind == "delete":
            found |= {start, start + 1}
        elif kind != "equal":
            found |= set(range(start + 1, end + 1))
    return found
