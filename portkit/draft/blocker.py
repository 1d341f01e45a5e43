"""Why a draft stops: something it will not guess."""

from __future__ import annotations


class Blocker(Exception):
    """A draft cannot go on: what is in the way, at which line of the file, and what to do."""

    def __init__(self, what: str, line: int = 0, next: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.line = line
        self.next = next

    def __str__(self) -> str:
        place = f"line {self.line}: " if self.line else ""
        return place + self.what + (f" {self.next}" if self.next else "")
