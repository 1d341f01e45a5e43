"""Step `prove` has nothing to draft: it proves the port as it is."""

from __future__ import annotations

from portkit.draft.outcome import DraftOutcome
from portkit.port import Port


def draft(port: Port) -> DraftOutcome:
    """Return `skipped`: what a proof shows cannot be drafted."""
    return DraftOutcome(
        "prove", "skipped", reason="This step changes nothing: it proves the port as it is."
    )
