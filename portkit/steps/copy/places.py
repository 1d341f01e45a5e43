"""Where a modeling file's relative imports point to, once the file lies in a port.

A file of Transformers: into Transformers, absolutely. A file of the reader's: to the files beside
it, which are copied along; what is not beside it was written for Transformers' own tree.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path

from portkit.architectures import tables, transformers_folder
from portkit.errors import PortkitError


@dataclass(frozen=True)
class InTransformers:
    """Imports of a file of the installed Transformers."""

    module: str
    """E.g. "transformers.models.helium.modeling_helium"."""

    def __call__(
        self, level: int, name: str, imported: frozenset[str] = frozenset()
    ) -> tuple[int, str]:
        if not level:
            return 0, name
        parts = [*self.module.split(".")[:-level], *([name] if name else [])]
        return 0, _public(".".join(parts), imported)


@dataclass(frozen=True)
class BesideFile:
    """Imports of the reader's own file, for a copy that takes the files beside it along."""

    file: Path
    name: str = "the source file"
    """How errors call it."""
    siblings: set[str] = field(default_factory=set)
    """Files beside it that it imports, found so far: "configuration_mine.py"."""

    def __call__(
        self, level: int, name: str, imported: frozenset[str] = frozenset()
    ) -> tuple[int, str]:
        head = name.split(".")[0]
        beside = bool(head) and (self.file.parent / f"{head}.py").is_file()
        if level <= 1 and beside and head + ".py" != self.file.name:
            self.siblings.add(f"{head}.py")
            return 1, name
        if not level or not name:
            return level, name
        # Written for Transformers' tree: `...utils` is transformers.utils, `..llama` its models'.
        tail = name.split(".")
        for base in (("transformers",), ("transformers", "models")):
            if level > 1 and _exists(*base[1:], *tail):
                return 0, _public(".".join((*base, *tail)), imported)
        for path in sorted((transformers_folder() / "models").glob(f"*/{tail[-1]}.py")):
            return 0, _public(f"transformers.models.{path.parent.name}.{tail[-1]}", imported)
        raise PortkitError(
            f"{self.name} imports {'.' * level}{name}: neither beside it nor in Transformers.",
            str(self.file),
            f"Put {head}.py into the folder of {self.file.name}, then try again.",
        )


def _exists(*parts: str) -> bool:
    path = transformers_folder().joinpath(*parts)
    return path.is_dir() or path.with_suffix(".py").is_file()


def _public(module: str, imported: frozenset[str]) -> str:
    """Shorten the import of config classes that Transformers exports at its top."""
    if not (module.startswith("transformers.models.") and ".configuration_" in module):
        return module
    exported = {name for row in tables().get("CONFIG_MAPPING_NAMES", {}).values() for name in row}
    return "transformers" if imported and imported <= exported else module


def siblings_of(file: Path) -> tuple[Path, ...]:
    """Return the files beside `file` that it imports, directly or through each other."""
    found: dict[str, Path] = {}
    waiting = [file]
    while waiting:
        place = BesideFile(waiting.pop())
        try:
            tree = ast.parse(place.file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError) as error:
            raise PortkitError(
                f"{place.file.name} is no valid Python: {error}.", str(place.file), "Correct it."
            ) from error
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                place(node.level, node.module or "")
                if node.level == 1 and not node.module:
                    for alias in node.names:
                        place(1, alias.name)
        for name in sorted(place.siblings):
            if name not in found and name != file.name:
                found[name] = file.parent / name
                waiting.append(found[name])
    return tuple(found.values())
