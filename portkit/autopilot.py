"""Walk a port through its steps by its drafts: draft, check, commit; stop at the first failure.

This is the reader's own path with the draft in the reader's place: the same calls, the same checks.
It is how CI runs the workbook, and how a notebook starts cold.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from portkit.checks.runner import checks_of, pass_if_complete, run_checks
from portkit.checks.verdict import Verdict
from portkit.curriculum import Step, steps
from portkit.curriculum import step as step_of
from portkit.draft.outcome import DraftOutcome
from portkit.draft.pipeline import apply_draft
from portkit.port import Port, open_port, ports_dir


@dataclass(frozen=True)
class Drafted:
    """A step's draft was made and, if it succeeded, applied."""

    step: Step
    outcome: DraftOutcome


@dataclass(frozen=True)
class Checked:
    """A check of a step answered."""

    step: Step
    verdict: Verdict


@dataclass(frozen=True)
class Ended:
    """A step ended: passed and committed, or not."""

    step: Step
    passed: bool
    seconds: float
    reason: str = ""


DRAFT_MESSAGE = "draft of step {}"
"""Message of the commit that applies a step's draft (portkit/draft/pipeline.py)."""

WRITE_CODE = ("copy", "forward", "parallel", "weights")
"""The steps whose drafts write the modeling file."""

Event = Drafted | Checked | Ended


def walk(
    port: Port,
    step_ids: Sequence[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Iterator[Event]:
    """Draft, check and pass each step in order, yielding what happens; a failure ends it.

    A step that has passed before is left as it is: what the reader wrote stays.
    """
    wanted = [step_of(i) for i in step_ids] if step_ids is not None else list(steps())
    for step in sorted(wanted, key=lambda s: s.number):
        if step.id in port.steps_passed():
            yield Ended(step, True, 0.0, "passed before; left as it is")
            continue
        started = time.monotonic()
        if progress:
            progress(f"drafting {step.id}")
        outcome = apply_draft(port, step.id)
        yield Drafted(step, outcome)
        if outcome.status == "failed":
            yield Ended(step, False, time.monotonic() - started, outcome.reason)
            return
        if not checks_of(step):
            yield Ended(step, False, time.monotonic() - started, "this step has no checks")
            return
        verdicts: list[Verdict] = []
        for verdict in run_checks(port, step, progress=progress):
            verdicts.append(verdict)
            yield Checked(step, verdict)
        passed = pass_if_complete(port, step, verdicts)
        failed = [v.check for v in verdicts if not v.ok]
        reason = "" if passed else f"failed: {', '.join(failed)}" if failed else "no check passed"
        yield Ended(step, passed, time.monotonic() - started, reason)
        if not passed:
            return


def steps_before(step_id: str) -> tuple[str, ...]:
    """Return the ids of the steps that a step needs, in order."""
    needed: set[str] = set()
    pending = list(step_of(step_id).requires)
    while pending:
        current = pending.pop()
        if current not in needed:
            needed.add(current)
            pending.extend(step_of(current).requires)
    return tuple(s.id for s in steps() if s.id in needed)


def to_catch_up(port: Port, step_id: str) -> tuple[str, ...]:
    """Return the steps before this one whose draft would change files and was not applied yet."""
    done = reached(port)
    return tuple(i for i in steps_before(step_id) if i not in done and has_draft(i))


def has_draft(step_id: str) -> bool:
    """Whether a step changes files at all."""
    return find_spec(f"portkit.steps.{step_id}.draft") is not None


def reached(port: Port) -> tuple[str, ...]:
    """Return the ids of the steps that passed, or whose draft is applied and not undone.

    Of an adopted port, the steps that write the model's code too: a draft would replace it.
    """
    from portkit.adopt import adopted  # brings LibCST, which a light start does without

    log = port.git(
        "log",
        "--author=portkit@localhost",
        "--format=%H%x09%(trailers:key=Undoes,valueonly,separator=)%x09%s",
    )
    rows = [line.split("\t", 2) for line in log.splitlines()]
    undone = {row[1] for row in rows}
    applied = {row[2] for row in rows if row[0] not in undone}
    passed = {*port.steps_passed(), *(WRITE_CODE if adopted(port) else ())}
    return tuple(
        s.id for s in steps() if s.id in passed or f"apply: {DRAFT_MESSAGE.format(s.id)}" in applied
    )


def diff_of_step(port: Port, step: Step) -> str:
    """Return what a step changed in the port's code: since the step before it was left, to now.

    Once a later step has passed, only up to the commit where this one passed.
    """
    log = [
        line.split("\t", 1)
        for line in port.git("log", "--reverse", "--format=%H%x09%s").splitlines()
    ]
    number = {f"step {s.number}: {s.id}": s.number for s in steps()}
    start, end = log[0][0], ""
    for commit, subject in log:
        if subject not in number:
            continue
        if number[subject] < step.number and not end:
            start = commit
        elif number[subject] == step.number:
            end = commit
    on = [end] if end and any(number.get(subject, -1) > step.number for _, subject in log) else []
    return port.git(
        "diff", "--no-color", start, *on, "--", port.package, "in_tree", "pyproject.toml"
    )


def port_for_model(
    model: str, root: Path | None = None, progress: Callable[[str], None] = lambda text: None
) -> Port:
    """Open the port of a model in a folder (default: the ports folder), or make it.

    `model` is a bundled model's name, an architecture, or a model type.
    """
    from portkit.create import new_port

    name = model.removesuffix("ForCausalLM").lower()
    folder = (root or ports_dir()) / name
    if (folder / "port.toml").is_file():
        return open_port(folder)
    return new_port(name, architecture=model, root=root, progress=progress)
