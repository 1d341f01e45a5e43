"""The steps of the workbook, read from curriculum.toml; nothing else knows their order."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from portkit.errors import PortkitError


@dataclass(frozen=True)
class Step:
    """One step of the guide: its id names its notebook, room, rules, checks, hints and tests."""

    id: str
    number: int
    title: str
    guide: str
    """Section of vLLM's guide that the step follows."""
    minutes: int
    """Reading and editing time for a person."""
    requires: tuple[str, ...]
    """Ids of the steps that must have passed."""

    @property
    def notebook(self) -> str:
        return f"{self.number:02d}_{self.id}.ipynb"

    @property
    def room(self) -> Path:
        return Path(__file__).parent / "steps" / self.id


@cache
def steps() -> tuple[Step, ...]:
    """Return all steps in order."""
    data = tomllib.loads((Path(__file__).parent / "curriculum.toml").read_text())
    return tuple(
        Step(
            id=row["id"],
            number=number,
            title=row["title"],
            guide=row["guide"],
            minutes=row["minutes"],
            requires=tuple(row["requires"]),
        )
        for number, row in enumerate(data["step"])
    )


@dataclass(frozen=True)
class Beside:
    """A notebook that is no step of the guide."""

    id: str
    notebook: str
    title: str
    minutes: int


@cache
def beside() -> tuple[Beside, ...]:
    """Return the notebooks that are no steps, in order."""
    data = tomllib.loads((Path(__file__).parent / "curriculum.toml").read_text())
    return tuple(Beside(**row) for row in data["beside"])


def step(name: str | int) -> Step:
    """Return the step with this id, number or notebook name; raise PortkitError if none has it."""
    for candidate in steps():
        if str(name) in (candidate.id, str(candidate.number), candidate.notebook):
            return candidate
    known = ", ".join(f"{s.number} {s.id}" for s in steps())
    raise PortkitError(
        f"There is no step {name!r}.", "portkit/curriculum.toml", f"Choose one of: {known}."
    )
