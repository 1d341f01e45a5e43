"""Run all that applies to a port and say what is wrong first, how sure, and what heals it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from portkit.adopt import SECTION
from portkit.checkpoint import read_config
from portkit.checks.base import Check
from portkit.checks.runner import run_one
from portkit.checks.verdict import Verdict
from portkit.diagnosis.flips import Flip, flips_of
from portkit.diagnosis.order import (
    ALSO_NEEDS,
    SAME_AS,
    STAGES,
    TOPICS,
    checks_that_apply,
    steps_that_apply,
    topics_for,
)
from portkit.diagnosis.trials import try_flips
from portkit.diagnosis.values import Certainty, Diagnosis, Trial
from portkit.lint.engine import findings
from portkit.lint.finding import Finding
from portkit.look import no_code
from portkit.port import Port
from portkit.steps.forward.parity import held_evidence

MOST_TRIALS = 16
"""Trials take two to four seconds each; a flip that fits the place is among the first."""
Progress = Callable[[str], None]


def diagnose(
    port: Port,
    *,
    quick: bool = False,
    trials: bool = True,
    most_trials: int = MOST_TRIALS,
    progress: Progress = lambda text: None,
    verdict: Callable[[Verdict], None] = lambda verdict: None,
) -> Diagnosis:
    """Diagnose a port as it stands; changes nothing in it and passes no step.

    `quick` leaves out checks that seldom fail alone, `trials=False` the live experiments. `verdict`
    is called with each verdict as it comes. Raises PortkitError if there is no code, or if it does
    not parse.
    """
    started = time.monotonic()
    if not port.source.strip():
        raise no_code(port)
    remarks = _remarks(port)
    loader = "port" if "weights" in steps_that_apply(port) else "portkit"
    verdicts = _judge(port, checks_that_apply(port, quick=quick), loader, progress, verdict)
    first = next((v for v in verdicts if v.status == "failed"), None)
    tried: tuple[Trial, ...] = ()
    not_tried, baseline = "", 0.0
    trace: dict[str, Any] = {}
    subject = _subject(verdicts)
    if subject is not None:
        trace, stages, baseline, ranks = _state(port, subject, loader)
        if not baseline:
            not_tried = "the port did not run that far: its own error says where"
        elif not trials:
            not_tried = "trials were not asked for"
        else:
            chosen = _chosen(port, trace, subject, ranks)[:most_trials]
            not_tried = "" if chosen else "no edit is known that fits this place"
            tried = try_flips(
                port, chosen, stages, baseline, loader=loader, ranks=ranks, progress=progress
            )
    certainty, causes = _conclusion(first, subject, trace, tried)
    table = port.meta.get(SECTION, {})
    return Diagnosis(
        name=port.name,
        architecture=port.architecture,
        file=port.modeling.name,
        adopted_from=str(table.get("file", "")),
        verdicts=tuple(verdicts),
        first=first,
        certainty=certainty,
        causes=causes,
        baseline=baseline,
        trials=tried,
        not_tried=not_tried,
        remarks=remarks,
        seconds=round(time.monotonic() - started, 1),
    )


def _judge(
    port: Port,
    checks: Sequence[type[Check]],
    loader: str,
    progress: Progress,
    tell: Callable[[Verdict], None],
) -> list[Verdict]:
    """Run the checks; one whose requirement did not pass is skipped with that reason."""
    verdicts: dict[str, Verdict] = {}
    for check in checks:
        needs = [SAME_AS.get(r, r) for r in check.requires]
        needs += ALSO_NEEDS.get(check.id, ())
        unmet = [r for r in needs if r in verdicts and verdicts[r].status != "passed"]
        if unmet:
            verdicts[check.id] = check().skipped(f"needs `{unmet[0]}`, which did not pass")
        else:
            progress(check.title)
            verdicts[check.id] = run_one(check, port, progress, loader)
        tell(verdicts[check.id])
    return list(verdicts.values())


def _remarks(port: Port) -> tuple[Finding, ...]:
    found = [f for step in steps_that_apply(port) for f in findings(port, step)]
    return tuple(sorted(set(found), key=lambda f: (f.path, f.line, f.rule)))


# ---- experiments --------------------------------------------------------------------------------


def _subject(verdicts: Sequence[Verdict]) -> Verdict | None:
    """Return the first failure that a flip could heal: numbers that differ."""
    return next(
        (
            v
            for v in verdicts
            if v.status == "failed" and (v.check in STAGES or v.check.startswith("rehearsal_tp"))
        ),
        None,
    )


def _state(
    port: Port, subject: Verdict, loader: str
) -> tuple[dict[str, Any], tuple[str, ...], float, int]:
    """Return the trace, the stages that must heal, the distance now, and on how many ranks."""
    if subject.check.startswith("rehearsal_tp"):
        ranks = int(subject.check.removeprefix("rehearsal_tp"))
        # A check's own words carry its numbers here; the trial asks the same job.
        return {}, (), float("inf") if subject.tables else 0.0, ranks
    job = held_evidence(port, loader)
    if job is None or not job.ok:
        return {}, (), 0.0, 1
    found = job.value.get(STAGES[subject.check], {})
    worst = [float(c["max_abs"]) for c in found.get("cases", ()) if not c["ok"]]
    stages = dict.fromkeys(("prefill", STAGES[subject.check]))
    return found.get("divergence") or {}, tuple(stages), max(worst, default=0.0), 1


def _chosen(port: Port, trace: dict[str, Any], subject: Verdict, ranks: int) -> list[Flip]:
    """Return the flips to try, those that fit the place first, one topic after the other."""
    topics = list(TOPICS["ranks"] if ranks > 1 else topics_for(trace, subject.check))
    flips = flips_of(port.source, read_config(port.checkpoint), port.modeling.name)
    line = _line(subject.where)
    rest = {f.topic for f in flips} - {"ranks"} - set(topics)
    wanted = topics if ranks > 1 else [*topics, *sorted(rest)]
    return sorted(
        (f for f in flips if f.topic in wanted),
        key=lambda f: (wanted.index(f.topic), abs(f.line - line) if line else 0),
    )


def _line(where: str) -> int:
    parts = where.split(":")
    digits = parts[1].split(" ")[0] if len(parts) > 1 else ""
    return int(digits) if digits.isdigit() else 0


def _conclusion(
    first: Verdict | None, subject: Verdict | None, trace: dict[str, Any], tried: Sequence[Trial]
) -> tuple[Certainty, tuple[str, ...]]:
    """Return how sure the diagnosis is and the causes in order."""
    if first is None:
        return "certain", ()
    healed = [f"{t.cause} ({t.where})" for t in tried if t.outcome == "heals"]
    helped = [f"{t.cause} ({t.where}; it helps, but is not all)" for t in tried if _helps(t)]
    causes = (*healed, *helped, *first.causes)
    if healed:
        return "certain", tuple(dict.fromkeys(causes))
    if subject is not first or int(trace.get("proven", 0)):
        return "measured", tuple(dict.fromkeys(causes))
    return ("likely" if causes else "open"), tuple(dict.fromkeys(causes))


def _helps(trial: Trial) -> bool:
    return trial.outcome == "helps"
