"""What makes an apply of several files happen wholly or not at all, even when it is killed.

Before the first file is replaced, a note of the old and new contents is left under `.portkit/`; the
commit of the apply is what makes it final. Whoever next takes the port's lock finds the note
and ends what was begun: committed if every file was written, otherwise put back. A file that the
reader has edited meanwhile is left as it is.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from portkit.atomic import write_atomically

NAME = "apply.json"


def digest(data: bytes | None) -> str:
    """Return the sha256 of a file's content, or "" for no file."""
    return "" if data is None else sha256(data).hexdigest()


def content(path: Path) -> bytes | None:
    """Return the bytes of a file, or None if there is none."""
    return path.read_bytes() if path.is_file() else None


def put(path: Path, data: bytes | None) -> None:
    """Make a file hold these bytes, or not exist."""
    if data is None:
        path.unlink(missing_ok=True)
    elif content(path) != data:
        write_atomically(path, data)


@dataclass(frozen=True)
class Journal:
    """An apply in progress."""

    message: str
    """Message of the commit that ends it."""
    base: str
    """The commit it starts from; another HEAD means that it was committed."""
    before: dict[str, bytes | None]
    """Old content by path relative to the port; None where there was no file."""
    after: dict[str, str]
    """sha256 of the new content by path ("" where the file goes)."""

    @classmethod
    def read(cls, folder: Path) -> Journal | None:
        """Return the journal that a killed apply left in this folder, if any."""
        path = folder / NAME
        if not path.exists():
            return None
        data = json.loads(path.read_text(encoding="utf-8"))
        before = {k: None if v is None else base64.b64decode(v) for k, v in data["before"].items()}
        return cls(data["message"], data["base"], before, data["after"])

    def write(self, folder: Path) -> None:
        before = {
            k: None if v is None else base64.b64encode(v).decode() for k, v in self.before.items()
        }
        data = {"message": self.message, "base": self.base, "before": before, "after": self.after}
        write_atomically(folder / NAME, json.dumps(data))

    @staticmethod
    def remove(folder: Path) -> None:
        (folder / NAME).unlink(missing_ok=True)

    def finished(self, root: Path) -> bool:
        """Say whether every file holds its new content."""
        return all(digest(content(root / name)) == new for name, new in self.after.items())

    def roll_back(self, root: Path) -> None:
        """Put back the old content wherever the new one was written; leave other texts alone."""
        for name, old in self.before.items():
            if digest(content(root / name)) == self.after[name]:
                put(root / name, old)
