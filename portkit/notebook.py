"""What a notebook calls: `begin(step)` returns a session with a dozen short methods.

Each method returns a report (text and HTML) over values that the other rooms computed; the session
holds no state that matters, so every cell can be run twice, in any order. With
PORTKIT_AUTOPILOT=1 `edit()` applies the draft where a reader would edit, and a failed check raises;
otherwise nothing raises but `begin`, so that Run All goes on to the end.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

from portkit import autopilot, hints, ports
from portkit.checks import results
from portkit.checks.runner import checks_of, pass_if_complete, run_checks
from portkit.curriculum import Step
from portkit.curriculum import step as step_of
from portkit.draft.pipeline import apply_draft, draft_step
from portkit.errors import PortkitError
from portkit.port import Port
from portkit.report import live, overview, render
from portkit.report.blocks import Line, Report
from portkit.status import last_verdicts, status_of


def autopilot_on() -> bool:
    """Whether PORTKIT_AUTOPILOT asks for the draft where a reader would edit."""
    return os.environ.get("PORTKIT_AUTOPILOT", "") not in ("", "0")


def begin(step_id: str, port: str | Path | Port | None = None) -> Session:
    """Open the port for a step and show where things stand; PortkitError if no port can be meant.

    Without any port, one is made for the model that PORTKIT_MODEL names (a bundled model or an
    architecture; "helium" unless said).
    """
    step = step_of(step_id)
    if not isinstance(port, Port):
        port = port_or_new(port)
    session = Session(step, port)
    if autopilot_on():
        session.catch_up()
    live.show(session.where())
    return session


def port_or_new(given: str | Path | None) -> Port:
    """Return the port that is meant; if there is none at all, make one of PORTKIT_MODEL."""
    try:
        return ports.find_port(given)
    except PortkitError:
        if given or os.environ.get("PORTKIT_PORT") or ports.known_ports():
            raise
    model = os.environ.get("PORTKIT_MODEL") or "helium"
    with live.Ongoing(f"making a port of {model}") as ongoing:
        return autopilot.port_for_model(model, progress=ongoing.say)


def told(method: Callable[..., Report]) -> Callable[..., Report]:
    """Show a PortkitError as a report; in autopilot let it stop the notebook."""

    @functools.wraps(method)
    def told(self: Session, *args, **options) -> Report:
        try:
            return method(self, *args, **options)
        except PortkitError as error:
            if autopilot_on():
                raise
            return render.error_report(error)

    return told


class Session:
    """One step of one port, for a notebook."""

    def __init__(self, step: Step, port: Port) -> None:
        self.step = step
        self.port = port

    # ---- look -------------------------------------------------------------------------------

    @told
    def where(self) -> Report:
        """Show the port, the step and what should come first."""
        missing = autopilot.to_catch_up(self.port, self.step.id)
        port = self.port
        return overview.header_report(
            self.step, port.root, port.architecture, port.modeling, missing, autopilot_on()
        )

    @told
    def doctor(self) -> Report:
        """Show what is installed and what the machine has, with a remedy where it falls short."""
        from portkit.steps.choose.doctor import examine

        return overview.doctor_report(examine())

    @told
    def look(self) -> Report:
        """Show what the model is made of, read from the source without running it."""
        from portkit.look import model_of

        return model_of(self.port)

    @told
    def show(self, symbol: str = "") -> Report:
        """Show the port's own code: the classes and functions whose name ends so, with their tasks.

        Without a name, those that this step's tasks are about.
        """
        from portkit.look import code_of

        return code_of(self.port, self.step, symbol)

    # ---- edit -------------------------------------------------------------------------------

    @told
    def edit(self) -> Report:
        """Show the file to edit and its places; in autopilot apply the draft."""
        before = Report(())
        if autopilot_on() and self.step.id not in autopilot.reached(self.port):
            outcome = apply_draft(self.port, self.step.id)
            before = render.outcome_report(outcome, self.port.root, applied=True)
            if outcome.status == "failed":
                raise PortkitError(
                    f"No draft of {self.step.id}: {outcome.reason}", str(self.port.modeling)
                )
        return before + overview.edit_report(self.port.modeling, self.port.root, self._findings())

    @told
    def tasks(self) -> Report:
        """Show what the rules of this step find in the port, at their lines."""
        from portkit.look import tasks_of

        return tasks_of(self.port, self.step)

    @told
    def fix(self, rule: str | None = None, unsafe: bool = False) -> Report:
        """Apply the safe fixes of this step's rules (or one rule's); `undo` takes them back."""
        from portkit.lint.engine import fix

        return overview.fixed_report(fix(self.port, rule, unsafe=unsafe), len(self._findings()))

    @told
    def decide(self, destination: str, reason: str) -> Report:
        """Write into port.toml where the port will live: "out_of_tree" or "in_tree", and why."""
        from portkit.create import decide

        decide(self.port, destination, reason)  # type: ignore[arg-type]
        return render.text_report(Line(f"decided: {destination}, because {reason}", "passed"))

    # ---- check ------------------------------------------------------------------------------

    @told
    def check(self, *only: str) -> Report:
        """Run this step's checks in the real vLLM; passing all of them commits the step."""
        if not checks_of(self.step):
            return render.text_report(Line(f"Step {self.step.id} has no checks.", "note"))
        verdicts = []
        with live.Ongoing(f"checking {self.step.id}") as ongoing:
            for verdict in run_checks(
                self.port, self.step, only=only or None, progress=ongoing.say
            ):
                verdicts.append(verdict)
                ongoing.add(Report(render.verdict_blocks(verdict)))
        passed = pass_if_complete(self.port, self.step, verdicts)
        helpful = [hint for v in verdicts if not v.ok and (hint := hints.for_failure(v))]
        foot = overview.after_checks(self.step, verdicts, passed, helpful)
        report = render.verdicts_report(verdicts, foot, ongoing.seconds)
        if autopilot_on() and not report.ok:
            live.show(report)
            failed = [v for v in verdicts if not v.ok]
            raise PortkitError(
                f"{render.count(len(failed), 'check')} of step {self.step.id} failed: "
                + "; ".join(f"{v.check}: {v.what}" for v in failed),
                failed[0].where,
                failed[0].next,
            )
        return report

    @told
    def last(self) -> Report:
        """Show the verdicts of the last run, and which are out of date; runs nothing."""
        return overview.saved_report(last_verdicts(self.port, self.step))

    # ---- help -------------------------------------------------------------------------------

    @told
    def hint(self, about: str = "", level: str = "nudge") -> Report:
        """Help for a check id, a rule id or a symptom; level: nudge, pointer or answer.

        Without `about`, for the first check that failed last time, else for the first task.
        """
        if level not in hints.LEVELS:
            raise PortkitError(
                f"There is no level {level!r}.", next=f"Choose of: {', '.join(hints.LEVELS)}."
            )
        found = hints.find(about, self.step.id) if about else self._hints_now()
        diffs = {h.key: hints.answer(self.port, h) for h in found[:1]} if level == "answer" else {}
        return overview.hints_report(found, level, diffs)

    def _hints_now(self) -> tuple[hints.Hint, ...]:
        for check in checks_of(self.step):
            saved = results.load(self.port, check.id)
            failed = saved is not None and saved.verdict.status == "failed"
            if failed and (hint := hints.for_failure(saved.verdict)):
                return (hint,)
        rules = [f.rule for f in self._findings()]
        own = {h.key: h for h in hints.hints_of(self.step.id)}
        return tuple(own[r] for r in dict.fromkeys(rules) if r in own)[:1]

    @told
    def draft(self) -> Report:
        """Show a solution for this very model as a diff; nothing is changed."""
        return render.outcome_report(draft_step(self.port, self.step.id), self.port.root)

    @told
    def apply(self) -> Report:
        """Write the draft into the port, after committing what is there; `undo` takes it back."""
        return render.outcome_report(apply_draft(self.port, self.step.id), applied=True)

    @told
    def undo(self) -> Report:
        """Take back the last fix, draft or apply."""
        return render.text_report(Line(f"Taken back: {self.port.undo()}", "passed"))

    @told
    def catch_up(self) -> Report:
        """Start cold: apply the drafts of the steps before this one that were not done yet."""
        done = Report(())
        for step_id in autopilot.to_catch_up(self.port, self.step.id):
            outcome = apply_draft(self.port, step_id)
            done += render.outcome_report(outcome, self.port.root, applied=True)
            if outcome.status == "failed":
                raise PortkitError(
                    f"No draft of {step_id}: {outcome.reason}", str(self.port.modeling)
                )
        return (
            done
            if done.blocks
            else render.text_report("Nothing to catch up with: the earlier steps are done.")
        )

    # ---- recap ------------------------------------------------------------------------------

    @told
    def diff(self) -> Report:
        """Show what this step changed in the port so far."""
        return render.diff_report(
            autopilot.diff_of_step(self.port, self.step), f"step {self.step.number}: {self.step.id}"
        )

    @told
    def recap(self) -> Report:
        """Show all steps: passed, tasks left, last verdicts."""
        return overview.status_report(status_of(self.port))

    def panel(self):
        """Return buttons for tasks, check, hints and draft, each with its line of code."""
        from portkit.widgets.panel import Panel

        return Panel(self)

    # ---- inside -----------------------------------------------------------------------------

    def _findings(self):
        from portkit.lint.engine import findings

        return findings(self.port, self.step.id)

    def __repr__(self) -> str:
        return f"Session(step={self.step.id!r}, port={str(self.port.root)!r})"
