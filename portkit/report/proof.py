"""The report of a port: what was proven, how, and what was not; for a pull request or a release."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from portkit.checks.verdict import Table, Verdict
from portkit.report.blocks import Block, Fold, Heading, Line, Pairs, Report


@dataclass(frozen=True)
class Proof:
    """What the report says; gathered by step `prove`."""

    name: str
    architecture: str
    facts: tuple[tuple[str, str], ...]
    """Name and value: source, licence, checkpoint, device, versions, date."""
    verdicts: Mapping[str, Sequence[Verdict]]
    """The latest verdicts, by title of their step."""
    stale: tuple[str, ...]
    """Ids of checks whose verdict is of an earlier state of the port."""
    missing: tuple[str, ...]
    """Ids of checks that were never run."""
    limits: tuple[str, ...]
    """What this does not prove."""
    commands: tuple[str, ...]
    """How to run it again."""


EVIDENCE = ("as_users_run_it", "tensor_parallel", "speed", "rehearsal_tp2", "quantised_run")
"""Checks whose tables are the report's body; the others' lie behind folds."""


def proof_report(proof: Proof) -> Report:
    """Arrange a proof as a report."""
    every = [v for verdicts in proof.verdicts.values() for v in verdicts]
    failed = [v for v in every if v.status == "failed"]
    passed = [v for v in every if v.status == "passed"]
    blocks: list[Block] = [
        Heading(f"{proof.architecture} in vLLM: what was proven"),
        Line(
            f"{len(passed)} checks passed, {len(failed)} failed, "
            f"{len(every) - len(passed) - len(failed)} were skipped.",
            "failed" if failed else "passed",
        ),
        Pairs(proof.facts),
    ]
    for verdict in every:
        if verdict.check in EVIDENCE and verdict.tables:
            blocks += [Heading(verdict.title), Line(verdict.what, verdict.status), *verdict.tables]
    blocks.append(Heading("Every check"))
    for title, verdicts in proof.verdicts.items():
        rows = tuple((v.check, v.status, v.what, v.device, f"{v.seconds:.1f}") for v in verdicts)
        blocks.append(
            Table(title, ("check", "status", "what was found", "device", "seconds"), rows)
        )
    details = [t for v in every if v.check not in EVIDENCE for t in v.tables]
    if details:
        blocks.append(Fold("Evidence of the other checks", tuple(details), in_text=False))
    blocks.append(Heading("What this does not prove"))
    blocks += [Line(limit, "note") for limit in proof.limits]
    if proof.stale:
        blocks.append(
            Line(f"Of an earlier state of the port: {', '.join(proof.stale)}.", "warning")
        )
    if proof.missing:
        blocks.append(Line(f"Never run: {', '.join(proof.missing)}.", "warning"))
    blocks.append(Heading("Run it again"))
    blocks += [Line(f"`{command}`") for command in proof.commands]
    return Report(tuple(blocks), not failed)
