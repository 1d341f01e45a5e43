"""Seeded bugs: a text edit of a correct port, and what its checks then say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from portkit.checks.base import Check, CheckContext
from portkit.checks.runner import checks_of
from portkit.checks.verdict import Verdict
from portkit.live.client import live_for
from portkit.port import Port

PORTS = Path(__file__).parent / "ports"


@dataclass(frozen=True)
class Edit:
    """Texts to replace; each must be there."""

    pairs: tuple[tuple[str, str], ...]

    def apply(self, text: str) -> str:
        for old, new in self.pairs:
            assert old in text, f"the seed does not apply: {old!r} is not in the port"
            text = text.replace(old, new, 1)
        return text


def edit(*texts: str) -> Edit:
    """Make an edit of old, new, old, new, ..."""
    return Edit(tuple(zip(texts[::2], texts[1::2], strict=True)))


@dataclass
class Bench:
    """A port whose modeling file is written anew for every test; one worker for all."""

    port: Port
    step: str

    def write(self, change: Edit | None = None) -> None:
        text = (PORTS / self.port.name / f"{self.step}.py").read_text()
        self.port.modeling.write_text(change.apply(text) if change else text)

    def run(self, check: str) -> Verdict:
        cls: type[Check] = next(c for c in checks_of(self.step) if c.id == check)
        return cls().run(CheckContext(self.port, live_for(self.port)))


def words(verdict: Verdict) -> str:
    """Everything that a verdict says, for a look at its words."""
    return " | ".join((verdict.what, verdict.where, verdict.next, *verdict.causes))
