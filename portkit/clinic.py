"""What the notebook of diagnosis calls: `begin_diagnosis()` returns an examination of a port.

As with the steps' sessions every cell can be run twice and nothing raises but the beginning; with
PORTKIT_AUTOPILOT=1 the port is caught up by drafts first, and a fault that is found stops.
"""

from __future__ import annotations

from pathlib import Path

from portkit import autopilot
from portkit.checkpoint import read_config
from portkit.checks.verdict import Table
from portkit.diagnosis.flips import Flip, flips_of
from portkit.diagnosis.run import diagnose
from portkit.diagnosis.trials import copy_of
from portkit.draft.pipeline import apply_draft
from portkit.errors import PortkitError
from portkit.notebook import autopilot_on, port_or_new, told
from portkit.port import Port
from portkit.report import live, render
from portkit.report.blocks import Diff, Fold, Heading, Line, Pairs, Report
from portkit.report.diagnosis import diagnosis_report

DIAGNOSED = "weights"
"""With this step a port is whole: everything that a diagnosis looks at is there."""


def begin_diagnosis(port: str | Path | Port | None = None) -> Examination:
    """Open the port to be diagnosed, as `begin` does; PortkitError if none can be meant."""
    opened = port if isinstance(port, Port) else port_or_new(port)
    examination = Examination(opened)
    if autopilot_on():
        for step in (*autopilot.to_catch_up(opened, DIAGNOSED), DIAGNOSED):
            if step not in autopilot.reached(opened):
                outcome = apply_draft(opened, step)
                if outcome.status == "failed":
                    raise PortkitError(f"No draft of {step}: {outcome.reason}", str(opened.root))
    live.show(examination.where())
    return examination


class Examination:
    """One port, to be looked at; nothing here changes it."""

    def __init__(self, port: Port) -> None:
        self.port = port

    @told
    def where(self) -> Report:
        """Show which port it is, and where its code comes from."""
        table = self.port.meta.get("adopted", {})
        rows = [
            ("port", f"{self.port.root}  ({self.port.architecture})"),
            ("code", str(table.get("file") or "made step by step")),
            ("steps passed", ", ".join(self.port.steps_passed()) or "none"),
        ]
        return Report((Pairs(tuple(rows)),), values=(self.port,))

    @told
    def diagnose(self, *, quick: bool = False, trials: bool = True) -> Report:
        """Run all that applies; say what is right, what is wrong first, and what heals it."""
        with live.Ongoing(f"diagnosing {self.port.name}") as ongoing:
            found = diagnose(self.port, quick=quick, trials=trials, progress=ongoing.say)
        report = diagnosis_report(found)
        if autopilot_on() and found.first is not None:
            live.show(report)
            raise PortkitError(found.first.what, found.first.where, found.first.next)
        return report

    @told
    def flips(self) -> Report:
        """Show the edits that a diagnosis knows for this port's code; none of them is made."""
        rows = [(f.id, f.topic, f.line, f.title) for f in self._flips()]
        table = Table("Flips for this port", ("id", "about", "line", "the edit"), tuple(rows))
        return Report((table, Line(f"{render.count(len(rows), 'edit')}.", "note")))

    @told
    def break_copy(self, flip: str = "") -> Report:
        """Make one flip in a copy of the port, as a bug, and diagnose the copy.

        `flip` is an id of `flips()`; without one, the first that is about q, k and v.
        """
        chosen = self._chosen(flip)
        bug = render.unified_diff(self.port.source, chosen.source, self.port.modeling.name, 1)
        with copy_of(self.port) as copy, live.Ongoing("diagnosing the broken copy") as ongoing:
            copy.modeling.write_text(chosen.source, encoding="utf-8")
            found = diagnose(copy, quick=True, progress=ongoing.say)
        if autopilot_on() and found.ok:
            raise PortkitError(
                f"The flip {chosen.id} breaks nothing that a check sees.", self.port.modeling.name
            )
        title = Heading(f"The bug: {chosen.title}")
        return Report((title, Fold("its diff", (Diff(bug),)))) + diagnosis_report(found)

    def _flips(self) -> tuple[Flip, ...]:
        if not self.port.source.strip():
            from portkit.look import no_code

            raise no_code(self.port)
        return flips_of(
            self.port.source, read_config(self.port.checkpoint), self.port.modeling.name
        )

    def _chosen(self, id: str) -> Flip:
        flips = self._flips()
        fitting = [f for f in flips if (f.id == id if id else f.topic == "qkv")]
        if not fitting:
            known = (
                ", ".join(dict.fromkeys(f.id for f in flips)) or "none: there is no vLLM code yet"
            )
            raise PortkitError(
                f"No flip {id!r} applies to this port.",
                self.port.modeling.name,
                f"Those are {known}.",
            )
        return fitting[0]

    def __repr__(self) -> str:
        return f"Examination(port={str(self.port.root)!r})"
