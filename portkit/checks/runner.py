"""Run a step's checks: in the order that `requires` allows, each to a verdict, whatever happens.

A check whose prerequisite did not pass is skipped, not failed. A check that raises becomes a
failed verdict that a person can read; its traceback goes to the port's `.portkit/logs`. Each
verdict is saved with the hash of what it judged, so that a stale one is never taken for a fresh
one. Running is always live: saved verdicts are only shown, and only stand in for prerequisites
when a single check is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter

from portkit.checks import results
from portkit.checks.base import Check, CheckContext
from portkit.checks.verdict import Verdict
from portkit.curriculum import Step, steps
from portkit.curriculum import step as step_of
from portkit.errors import PortkitError
from portkit.port import Port

Progress = Callable[[str], None]


def checks_of(step: str | Step) -> tuple[type[Check], ...]:
    """Return the checks of a step, in the order their module gives; empty if it has none."""
    step = step if isinstance(step, Step) else step_of(step)
    name = f"portkit.steps.{step.id}.checks"
    if importlib.util.find_spec(name) is None:
        return ()
    return tuple(importlib.import_module(name).CHECKS)


def in_order(checks: Collection[type[Check]]) -> tuple[type[Check], ...]:
    """Return the checks so that each comes after what it requires; otherwise as given.

    Raises PortkitError if requirements form a circle.
    """
    by_id = {check.id: check for check in checks}
    graph = {id: [r for r in check.requires if r in by_id] for id, check in by_id.items()}
    position = {id: n for n, id in enumerate(by_id)}
    sorter = TopologicalSorter(graph)
    try:
        sorter.prepare()
    except CycleError as error:
        raise PortkitError(
            f"Checks require each other in a circle: {' → '.join(error.args[1])}.",
            "the `requires` of these checks",
        ) from error
    ordered: list[str] = []
    ready: set[str] = set()
    while sorter.is_active():
        ready.update(sorter.get_ready())
        first = min(ready, key=position.__getitem__)
        ready.discard(first)
        ordered.append(first)
        sorter.done(first)
    return tuple(by_id[id] for id in ordered)


def run_checks(
    port: Port,
    step: str | Step,
    *,
    only: Collection[str] | None = None,
    progress: Progress | None = None,
    checks: Collection[type[Check]] | None = None,
) -> Iterator[Verdict]:
    """Run a step's checks on a port and yield each verdict as it comes.

    `only` names checks to run; what they require runs first unless it passed on this very source.
    `checks` replaces the step's own. Raises PortkitError for an unknown id in `only`.
    """
    step = step if isinstance(step, Step) else step_of(step)
    say = progress or (lambda text: None)
    selected = in_order(checks_of(step) if checks is None else checks)
    passed: dict[str, bool] = {}
    if only is not None:
        selected = _closure(selected, only, port, passed)
    own = {check.id for check in selected} | set(passed)
    for check in selected:
        unmet = [
            r
            for r in check.requires
            if not (passed.get(r, False) if r in own else _met_elsewhere(port, r))
        ]
        if unmet:
            verdict = check().skipped(f"needs {_names(unmet)}, which did not pass")
        else:
            say(check.title)
            verdict = run_one(check, port, say)
        passed[check.id] = verdict.status == "passed"
        unsaved = None
        try:
            results.save(port, verdict)
        except PortkitError as error:  # a full disk: who waited for a verdict gets it all the same
            unsaved = error
        yield verdict
        if unsaved is not None:
            raise unsaved


def _names(ids: Collection[str]) -> str:
    return " and ".join(f"`{id}`" for id in ids)


def _closure(
    checks: tuple[type[Check], ...],
    only: Collection[str],
    port: Port,
    passed: dict[str, bool],
) -> tuple[type[Check], ...]:
    by_id = {check.id: check for check in checks}
    unknown = [id for id in only if id not in by_id]
    if unknown:
        raise PortkitError(
            f"There is no check {_names(unknown)} in this step.",
            next=f"Choose of: {', '.join(by_id)}.",
        )
    wanted = set(only)
    pending = list(only)
    while pending:
        for required in by_id[pending.pop()].requires:
            if required not in by_id or required in wanted:
                continue
            saved = results.load(port, required)
            if saved is not None and saved.fresh and saved.verdict.status == "passed":
                passed[required] = True
            else:
                wanted.add(required)
                pending.append(required)
    return tuple(check for check in checks if check.id in wanted)


def _met_elsewhere(port: Port, check_id: str) -> bool:
    """A check of an earlier step is met by its last verdict; its source has rightly moved on."""
    saved = results.load(port, check_id)
    return saved is not None and saved.verdict.status == "passed"


def run_one(check: type[Check], port: Port, say: Progress, loader: str = "") -> Verdict:
    """Run one check to a verdict, whatever happens in it; `loader` as in CheckContext."""
    from portkit.live.client import live_for

    started = time.monotonic()
    instance = check()
    if check.step != steps()[0].id and (error := _unreadable(port)):  # no worker is needed
        return instance.failed(**error.to_dict(), judged=False)
    try:
        verdict = instance.run(CheckContext(port, live_for(port), say, loader))
        if not isinstance(verdict, Verdict):
            raise TypeError(
                f"{check.__name__}.run returned {type(verdict).__name__}, not a Verdict"
            )
    except PortkitError as error:
        verdict = instance.failed(error.what, where=error.where, next=error.next)
    except Exception as error:
        log = results.write_log(port, check.id, traceback.format_exc())
        verdict = instance.failed(
            f"the check itself stopped with {type(error).__name__}: {error}",
            where=str(log),
            next="Run it again. If it stops again, that log belongs in a bug report for portkit.",
        )
    return replace(verdict, seconds=verdict.seconds or round(time.monotonic() - started, 3))


def _unreadable(port: Port) -> PortkitError | None:
    """Return why there is no code that could be checked: none yet, or it does not parse."""
    from portkit.lint.source import must_parse
    from portkit.look import no_code

    try:
        if not port.source.strip():
            return no_code(port)
        must_parse(port.source, port.modeling.relative_to(port.root).as_posix())
    except PortkitError as error:
        return error
    return None


def completes(step: str | Step, verdicts: Collection[Verdict]) -> bool:
    """Whether these verdicts pass a step: all its checks are there, none failed, one passed."""
    ids = {check.id for check in checks_of(step)}
    return (
        bool(ids)
        and ids <= {v.check for v in verdicts}
        and all(v.ok for v in verdicts)
        and any(v.status == "passed" for v in verdicts)
    )


def all_checks() -> dict[str, tuple[type[Check], ...]]:
    """Return the checks of every step, by step id."""
    return {step.id: checks_of(step) for step in steps()}


def pass_if_complete(port: Port, step: str | Step, verdicts: Collection[Verdict]) -> bool:
    """Commit the port as having passed a step if these verdicts say so; returns whether they do."""
    step = step if isinstance(step, Step) else step_of(step)
    if not completes(step, verdicts):
        return False
    if step.id not in port.steps_passed() or port.git("status", "--porcelain").strip():
        port.pass_step(step)
    return True
