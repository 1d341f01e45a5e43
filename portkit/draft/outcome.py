"""What a draft says about itself: what it did, what it left, what a person must decide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DraftOutcome:
    """The result of drafting one step of a port. Nothing is written until it is applied."""

    step: str
    status: Literal["success", "skipped", "failed"]
    files: tuple[tuple[str, str], ...] = ()
    """(path relative to the port, new text) for each file that changes."""
    did: tuple[str, ...] = ()
    """One line per change, in the words of the guide."""
    warnings: tuple[str, ...] = ()
    """What a person must decide; each has a `# PORT:` note in the source."""
    reason: str = ""
    """Why it was skipped or failed."""
