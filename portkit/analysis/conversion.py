"""How a checkpoint on disk names what the model's code names otherwise.

Transformers renames and merges tensors while it loads (and back while it saves): one tensor per
expert on disk, one stacked parameter in the module. vLLM reads the disk, so a port must know. The
table is code of the installed Transformers; it is run here with recorders in place of its classes,
which needs neither torch nor an import of Transformers.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from portkit.architectures import causal_architectures, transformers_folder

_TABLE = "conversion_mapping.py"
_BUILD = "_build_checkpoint_conversion_mapping"


@dataclass(frozen=True)
class Renaming:
    """A piece of a checkpoint's name (a regular expression) and what the model calls it."""

    source: str
    target: str

    @property
    def plain(self) -> tuple[str, str] | None:
        """(source, target) as plain text; None if the source is a real pattern."""
        source = re.sub(r"\\([.])", r"\1", self.source)
        target = re.sub(r"\\([.])", r"\1", self.target)
        if re.search(r"[\\^$*+?()\[\]{}|]", source) or "\\" in target:
            return None
        return source, target


@dataclass(frozen=True)
class Merge:
    """Tensors of one expert each (`*` in the sources) that the model keeps in one parameter."""

    sources: tuple[str, ...]
    target: str
    operations: tuple[str, ...]

    @property
    def stacks_experts(self) -> bool:
        """Are the sources stacked (and set one behind the other), and nothing else?"""
        return self.operations in (("MergeModulelist",), ("MergeModulelist", "Concatenate"))

    @property
    def parts(self) -> tuple[str, ...]:
        """The sources' last names, in the order they are concatenated, e.g. ("w1", "w3")."""
        return tuple(
            s.replace("\\", "").removesuffix(".weight").rsplit(".", 1)[-1] for s in self.sources
        )


Conversion = Renaming | Merge


class _Recorded:
    """Stands for any class of Transformers' table and keeps what it was given."""

    def __init__(self, *positional: Any, **named: Any) -> None:
        names = ("source_patterns", "target_patterns")
        self.source_patterns: Any = ""
        self.target_patterns: Any = ""
        self.operations: list[_Recorded] = []
        vars(self).update(dict(zip(names, positional, strict=False)) | named)


@cache
def _table() -> dict[str, list[_Recorded]]:
    """Model type (or class) → its conversions; empty where Transformers has no such table."""
    path = transformers_folder() / _TABLE
    if not path.exists():
        return {}
    space: dict[str, Any] = {"__name__": "conversion_mapping"}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kept: list[ast.stmt] = []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level:
            space |= {a.asname or a.name: type(a.name, (_Recorded,), {}) for a in node.names}
        elif not isinstance(node, ast.If):
            kept.append(node)
    tree.body = kept
    try:
        exec(compile(tree, str(path), "exec"), space)
        return space[_BUILD]()
    except Exception:  # another Transformers may write its table otherwise: then nothing is known
        return {}


def conversions_of(name: str) -> tuple[Conversion, ...]:
    """Conversions of an architecture or model type, in Transformers' order; () if it has none."""
    table = _table()
    found = table.get(name)
    if found is None:
        found = table.get(causal_architectures().get(name, name), [])
    return tuple(c for recorded in found if (c := _conversion(recorded)) is not None)


def in_model(name: str, conversions: tuple[Conversion, ...]) -> str:
    """Return what the model calls a tensor of a checkpoint, stacking left aside."""
    for conversion in conversions:
        if isinstance(conversion, Renaming):
            name = re.sub(conversion.source, conversion.target.replace("\\.", "."), name)
    return name


def _conversion(recorded: _Recorded) -> Conversion | None:
    sources, targets = recorded.source_patterns, recorded.target_patterns
    sources = (sources,) if isinstance(sources, str) else tuple(sources)
    target = targets if isinstance(targets, str) else (targets[0] if len(targets) == 1 else "")
    if not target or not all(sources):
        return None
    if recorded.operations:
        return Merge(
            sources,
            target.replace("\\", ""),
            tuple(type(o).__name__ for o in recorded.operations),
        )
    return Renaming(sources[0], target)
