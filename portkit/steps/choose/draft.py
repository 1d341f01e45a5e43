"""Draft of step 0: the decision for an out-of-tree port, written to port.toml."""

from __future__ import annotations

from portkit.create import decision
from portkit.draft.outcome import DraftOutcome
from portkit.port import META, Port

REASON = "works with the vLLM that people have installed; the patch for vLLM can follow later"


def draft(port: Port) -> DraftOutcome:
    """Decide for a plugin, unless the port has a decision already."""
    decided = port.meta.get("decisions", {})
    if decided.get("destination"):
        return DraftOutcome(
            "choose", "skipped", reason=f"port.toml says {decided['destination']} already."
        )
    text = port.meta_with("decisions", **decision("out_of_tree", REASON))
    return DraftOutcome(
        "choose",
        "success",
        ((META, text),),
        ("Decided in port.toml: out of tree, as a plugin.",),
        ("Whether it goes into vLLM's tree is yours to decide; both steps work either way.",),
    )
