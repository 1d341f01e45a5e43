"""What a diagnosis answers with. Frozen values; nothing is computed or drawn here."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from portkit.checks.verdict import Verdict
from portkit.lint.finding import Finding

Outcome = Literal["heals", "helps", "changes nothing", "does not heal", "breaks"]
Certainty = Literal["certain", "measured", "likely", "open"]

HOW_SURE: dict[str, str] = {
    "certain": "certain: this one edit, tried live on a copy, makes the port agree",
    "measured": "measured: the numbers themselves show it (tried on what the two models computed)",
    "likely": "likely: the causes below are ranked by what usually does this; none was proven",
    "open": "open: it is wrong for sure, but nothing that was tried explains it",
}


@dataclass(frozen=True)
class Trial:
    """One edit, tried live on a copy of the port."""

    flip: str
    """Id of the flip, e.g. "rotary-layout"."""
    title: str
    """What was edited, in words."""
    cause: str
    """What is wrong, if this heals."""
    where: str
    """file:line of the edit in the port."""
    diff: str
    outcome: Outcome
    distance: float
    """Largest difference of a log-probability with the edit; infinite if it did not run."""
    seconds: float


@dataclass(frozen=True)
class Diagnosis:
    """How a port stands."""

    name: str
    architecture: str
    file: str
    adopted_from: str
    """The file that it was adopted from; empty for a port made by the steps."""
    verdicts: tuple[Verdict, ...]
    """Of every check that applies, in the order in which a fault of one explains the next."""
    first: Verdict | None
    """The first check that failed: what comes after it may only follow from it."""
    certainty: Certainty
    causes: tuple[str, ...]
    """Of the first failure, most likely first; those that were tried and heal before all."""
    baseline: float
    """Largest difference of a log-probability before any edit; 0 if it was not measured."""
    trials: tuple[Trial, ...]
    not_tried: str
    """Why no trial ran; empty if some did or none was needed."""
    remarks: tuple[Finding, ...]
    """What the rules find: advice on the source, whether or not a check fails."""
    seconds: float

    @property
    def ok(self) -> bool:
        return self.first is None

    @property
    def right(self) -> tuple[Verdict, ...]:
        return tuple(v for v in self.verdicts if v.status == "passed")

    @property
    def unjudged(self) -> tuple[Verdict, ...]:
        return tuple(v for v in self.verdicts if v.status == "skipped")

    @property
    def healing(self) -> Trial | None:
        """The edit that heals the port, if one was found."""
        return next((t for t in self.trials if t.outcome == "heals"), None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        healing = self.healing
        return {
            **asdict(self),
            "ok": self.ok,
            "how_sure": HOW_SURE[self.certainty] if self.first else "",
            "healing": asdict(healing) if healing else None,
        }
