"""How far a port is: steps passed, tasks left, last verdicts. Reads only; runs no check."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from portkit.checks import results
from portkit.checks.runner import checks_of
from portkit.curriculum import Step, steps
from portkit.errors import PortkitError
from portkit.port import Port


@dataclass(frozen=True)
class LastVerdict:
    """The saved verdict of one check."""

    check: str
    title: str
    status: str
    """"passed", "failed", "skipped", or "never" if it never ran."""
    what: str = ""
    fresh: bool = False
    """Whether code, checkpoint and versions are still those that it judged."""
    at: str = ""
    """When it ran, ISO 8601 in UTC."""


@dataclass(frozen=True)
class StepStatus:
    """How far one step is."""

    step: Step
    passed: bool
    """Whether the port has a commit that says so; a bookmark, checks are the proof."""
    tasks: int | None
    """Findings of the step's rules; None for steps that are not due yet."""
    verdicts: tuple[LastVerdict, ...]
    problem: str = ""
    """Why the tasks could not be counted, e.g. a syntax error."""


@dataclass(frozen=True)
class PortStatus:
    """How far a port is."""

    name: str
    root: str
    architecture: str
    steps: tuple[StepStatus, ...]

    @property
    def next(self) -> Step | None:
        """The first step that has not passed; None if all have."""
        return next((s.step for s in self.steps if not s.passed), None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        rows = [
            {
                "step": s.step.id,
                "number": s.step.number,
                "title": s.step.title,
                "passed": s.passed,
                "tasks": s.tasks,
                "problem": s.problem,
                "checks": [asdict(v) for v in s.verdicts],
            }
            for s in self.steps
        ]
        return {
            "name": self.name,
            "root": self.root,
            "architecture": self.architecture,
            "next": self.next.id if self.next else None,
            "steps": rows,
        }


def status_of(port: Port) -> PortStatus:
    """Return how far a port is."""
    passed = port.steps_passed()
    due = True
    rows = []
    for step in steps():
        tasks, problem = _tasks(port, step) if due else (None, "")
        rows.append(StepStatus(step, step.id in passed, tasks, last_verdicts(port, step), problem))
        due = due and step.id in passed
    return PortStatus(port.name, str(port.root), port.architecture, tuple(rows))


def next_step(port: Port) -> Step:
    """Return the first step that has not passed, or the last one if all have."""
    passed = port.steps_passed()
    return next((s for s in steps() if s.id not in passed), steps()[-1])


def _tasks(port: Port, step: Step) -> tuple[int | None, str]:
    from portkit.lint.engine import findings

    try:
        return len(findings(port, step.id)), ""
    except PortkitError as error:
        return None, error.what


def last_verdicts(port: Port, step: Step) -> tuple[LastVerdict, ...]:
    """Return the saved verdict of each check of a step, in their order."""
    rows = []
    for check in checks_of(step):
        saved = results.load(port, check.id)
        if saved is None:
            rows.append(LastVerdict(check.id, check.title, "never"))
        else:
            verdict = saved.verdict
            rows.append(
                LastVerdict(
                    check.id, check.title, verdict.status, verdict.what, saved.fresh, saved.at
                )
            )
    return tuple(rows)
