"""The one exception that a user of portkit is meant to read."""

from __future__ import annotations


class PortkitError(Exception):
    """A problem the user can act on: what is wrong, where, and what to do next."""

    def __init__(self, what: str, where: str = "", next: str = "") -> None:
        self.what = what
        self.where = where
        self.next = next
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"where: {self.where}")
        if self.next:
            lines.append(f"next:  {self.next}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, str]:
        """Return the three parts, for `--json` and for crossing a process boundary."""
        return {"what": self.what, "where": self.where, "next": self.next}

    def _render_traceback_(self) -> list[str]:
        """Return what IPython shows in a cell: the message alone, for the stack is portkit's."""
        return [f"✗ failed  {self.what}", *str(self).splitlines()[len(self.what.splitlines()) :]]
