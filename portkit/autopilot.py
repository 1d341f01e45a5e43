"""Walk a port through its steps by the drafts: draft, apply, check, commit; stop at the first failure.

This is the reader's own path with the draft in the reader's place: the same calls, the same checks.
It is how CI runs the workbook, and how a notebook starts cold.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portkit.checks.runner import checks_of, completes, run_checks
from portkit.checks.verdict import Verdict
from portkit.curriculum import Step, step as step_of, steps
from portkit.draft.outcome import DraftOutcome
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


Event = Drafted | Checked | Ended


def apply_step(port: Port, step: Step) -> DraftOutcome:
    """Apply a step's draft where the reader would edit; steps without one change nothing."""
    import importlib.util

    if importlib.util.find_spec(f"portkit.steps.{step.id}.draft") is None:
        return DraftOutcome(step.id, "skipped", reason="this step has nothing to edit")
    from portkit.draft.pipeline import apply_draft

    return apply_draft(port, step.id)


def walk(
    port: Port, step_ids: Sequence[str] | None = None, progress: Callable[[str], None] | None = None,
) -> Iterator[Event]:
    """Draft, check and pass each step in order, yielding what happens; ends after the first failure.

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
        outcome = apply_step(port, step)
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
        passed = completes(step, verdicts)
        if passed:
            port.pass_step(step)
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


def port_for_model(model: str, root: Path | None = None) -> Port:
    """Open the port of a model, or make it: a bundled model by its name, else by its architecture."""
    name, options = model_options(model)
    folder = root or ports_dir() / name
    if (folder / "port.toml").is_file():
        return open_port(folder)
    from portkit.create import new_port

    return new_port(name, root=folder, **options)


def model_options(model: str) -> tuple[str, dict[str, Any]]:
    """Return the port's name and what `new_port` needs for a model's name or architecture."""
    import tomllib

    recipe = Path(__file__).parent / "models" / model / "model.toml"
    if recipe.is_file():
        architecture = tomllib.loads(recipe.read_text())["architecture"]
        return model, {"architecture": architecture}
    return model.removesuffix("ForCausalLM").lower(), {"architecture": model}
