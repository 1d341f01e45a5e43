"""The text that the tutorial checkpoints are trained on: short pieces, each with a title.

Written for this repository and in the public domain (LICENSE.md beside this file). Reads files and
nothing else; imports no torch.
"""

from __future__ import annotations

from pathlib import Path

SEPARATOR = "***"
"""The line between two pieces of a file."""


FILES = ("fables.txt", "engine_room.txt", "questions.txt")


def pieces(names: tuple[str, ...] = FILES) -> tuple[str, ...]:
    """Return every piece of the named files of this folder, in order."""
    found: list[str] = []
    for name in names:
        text = (Path(__file__).parent / name).read_text(encoding="utf-8")
        found += [piece.strip() for piece in text.split(f"\n{SEPARATOR}\n")]
    return tuple(piece for piece in found if piece)
