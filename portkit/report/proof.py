"""The report of a port: what was proven, how, and what was not; for a pull request or a release.

The summary comes first (what failed, was never run, or is of an earlier state), then the facts, the
numbers that readers ask for, every check, the limits; the evidence of each check lies in a fold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from portkit.checks.verdict import Table, Verdict
from portkit.report.blocks import SYMBOLS, Block, Fold, Heading, Line, Pairs, Report


@dataclass(frozen=True)
class StepProof:
    """What was found in one step."""

    number: int
    title: str
    verdicts: tuple[Verdict, ...]
    """The latest of each check that was run."""
    stale: tuple[str, ...] = ()
    """Ids of checks whose verdict is of an earlier state of the port, and should not be."""
    missing: tuple[str, ...] = ()
    """Ids of checks that were never run."""


@dataclass(frozen=True)
class Proof:
    """What the report says; gathered by step `prove`."""

    name: str
    architecture: str
    facts: tuple[tuple[str, str], ...]
    """Name and value: source, licence, checkpoint, device, versions, date."""
    steps: tuple[StepProof, ...]
    limits: tuple[str, ...]
    """What this does not prove."""
    commands: tuple[str, ...]
    """How to run it again."""

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        return tuple(v for step in self.steps for v in step.verdicts)

    @property
    def failed(self) -> tuple[Verdict, ...]:
        return tuple(v for v in self.verdicts if v.status == "failed")

    @property
    def stale(self) -> tuple[str, ...]:
        return tuple(id for step in self.steps for id in step.stale)

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(id for step in self.steps for id in step.missing)


NUMBERS = ("as_users_run_it", "tensor_parallel", "speed")
"""Checks whose tables stand in the open; the others' lie behind folds."""


def proof_report(proof: Proof) -> Report:
    """Arrange a proof as a report; it is not ok if a check failed."""
    blocks: list[Block] = [
        Heading(f"{proof.architecture} in vLLM: what was proven", level=1),
        *_summary(proof),
        Pairs(proof.facts),
        _steps(proof.steps),
    ]
    for verdict in proof.verdicts:
        if verdict.check in NUMBERS and verdict.tables:
            blocks += [Heading(verdict.title), Line(verdict.what, verdict.status), *verdict.tables]
    blocks += [Heading("Every check"), _checks(proof.steps)]
    blocks += [Heading("What this does not prove"), *(Line(x, "note") for x in proof.limits)]
    blocks += [Heading("Run it again"), *(Line(f"`{x}`", "note") for x in proof.commands)]
    evidence = [v for v in proof.verdicts if v.tables and v.check not in NUMBERS]
    if evidence:
        blocks.append(Heading("Evidence of the other checks"))
        blocks += [
            Fold(f"{v.check}: {v.title}", v.tables, v.status, in_text=False) for v in evidence
        ]
    return Report(tuple(blocks), not proof.failed)


def _summary(proof: Proof) -> list[Block]:
    of = {s: sum(v.status == s for v in proof.verdicts) for s in ("passed", "failed", "skipped")}
    counts = ", ".join(f"{number} {status}" for status, number in of.items())
    said: list[Block] = [
        Line(
            f"Checks: {counts}, {len(proof.missing)} never run.",
            "failed" if proof.failed else "passed" if of["passed"] else "warning",
        )
    ]
    for verdict in proof.failed:
        said.append(Line(f"`{verdict.check}`: {verdict.what}", "failed", indent=1))
    if proof.stale:
        said.append(Line(f"Of an earlier state of the port: {', '.join(proof.stale)}.", "warning"))
    if proof.missing:
        said.append(Line(f"Never run: {', '.join(proof.missing)}.", "warning"))
    return said


def _steps(steps: Sequence[StepProof]) -> Table:
    columns = ("step", "", "passed", "failed", "skipped", "never run", "earlier state", "seconds")
    return Table(
        "Steps",
        columns,
        tuple(
            (
                step.number,
                step.title,
                *(sum(v.status == s for v in step.verdicts) for s in columns[2:5]),
                len(step.missing),
                len(step.stale),
                round(sum(v.seconds for v in step.verdicts)),
            )
            for step in steps
        ),
    )


def _checks(steps: Sequence[StepProof]) -> Table:
    return Table(
        "",
        ("step", "check", "status", "what was found", "device", "seconds"),
        tuple(
            (
                step.number,
                v.check,
                f"{SYMBOLS[v.status]}\N{NO-BREAK SPACE}{v.status}",
                v.what,
                v.device,
                round(v.seconds, 1),
            )
            for step in steps
            for v in step.verdicts
        ),
    )
