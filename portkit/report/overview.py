"""Reports around a step: where it stands, what to edit, what comes after the checks, hints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from portkit.autopilot import Checked, Drafted, Ended, Event
from portkit.checks.verdict import Table, Verdict
from portkit.curriculum import Step, steps
from portkit.hints import LEVELS, Hint
from portkit.lint.finding import Finding
from portkit.report.blocks import Block, Diff, Fold, Heading, Line, Link, Pairs, Report
from portkit.report.render import count, outcome_report, verdict_blocks
from portkit.status import LastVerdict, PortStatus


def header_report(
    step: Step,
    port_root: Path,
    architecture: str,
    file: Path,
    missing: Sequence[str],
    autopilot: bool,
) -> Report:
    """Return what a step's notebook begins with."""
    rows = [
        ("step", f"{step.number} {step.title}"),
        ("guide", step.guide),
        ("time", f"about {step.minutes} minutes"),
        ("port", f"{port_root}  ({architecture})"),
    ]
    if autopilot:
        rows.append(
            ("autopilot", "on: the draft is applied where you would edit, and a failed check stops")
        )
    blocks: list[Block] = [Pairs(tuple(rows))]
    if file.exists():
        blocks.append(Link(f"open {file.name}", str(file)))
    if missing:
        blocks.append(
            Line(
                f"not done in this port: {', '.join(missing)}. Do them first, or start here cold: "
                "`step.catch_up()` applies their drafts.",
                "warning",
            )
        )
    return Report(tuple(blocks), values=(step,))


def edit_report(file: Path, root: Path, findings: Sequence[Finding]) -> Report:
    """Return which file to open and which symbols to change."""
    blocks: list[Block] = []
    if file.exists():
        first = min((f.line for f in findings), default=0)
        blocks.append(Link(f"open {file.relative_to(root).as_posix()}", str(file), first))
    symbols: dict[str, list[Finding]] = {}
    for finding in findings:
        symbols.setdefault(finding.symbol or finding.path, []).append(finding)
    if symbols:
        rows = tuple((name, group[0].line, len(group)) for name, group in symbols.items())
        blocks.append(Table("Places to change", ("symbol", "line", "tasks"), rows))
    elif file.exists():
        blocks.append(
            Line(
                "The rules of this step find nothing left to change: go on to the check.", "passed"
            )
        )
    else:
        blocks.append(Line(f"{file.name} does not exist yet: step 1 brings the code.", "note"))
    return Report(tuple(blocks), values=tuple(findings))


def fixed_report(fixed: Sequence[Finding], left: int) -> Report:
    """Return what was fixed and how much is left."""
    lines = [Line(f.message, "passed", aside=f"{f.rule}, {f.path}:{f.line}") for f in fixed]
    total = f"{count(len(fixed), 'task')} fixed, {left} left."
    if fixed:
        total += " `step.undo()` or `portkit undo` takes the fixes back."
    return Report((*lines, Line(total, "note")), values=tuple(fixed))


def after_checks(
    step: Step, verdicts: Sequence[Verdict], passed: bool, hints: Sequence[Hint]
) -> tuple[Block, ...]:
    """Return what comes below the verdicts: help for what failed, or the way on."""
    blocks: list[Block] = [
        Fold(
            f"hint for `{hint.key}`: a nudge",
            (
                Line(hint.nudge),
                Line(
                    f'`step.hint("{hint.key}", "pointer")` says more, "answer" shows the change; '
                    f"in a shell `portkit hint {hint.key} --level pointer`.",
                    "note",
                ),
            ),
            "note",
            in_text=True,
        )
        for hint in hints
    ]
    if passed:
        following = next((s for s in steps() if s.number == step.number + 1), None)
        way_on = f" Go on with {following.notebook}." if following else " That was the last step."
        blocks.append(
            Line(
                f"Step {step.number} ({step.id}) passed and is committed in the port.{way_on}",
                "passed",
            )
        )
    elif any(not v.ok for v in verdicts):
        blocks.append(
            Line("Edit, save, and run this again: each run reads the file afresh.", "note")
        )
    return tuple(blocks)


def hints_report(hints: Sequence[Hint], level: str, diffs: Mapping[str, str]) -> Report:
    """Return hints at a level: the nudge; nudge and pointer; or these and the answer's diff."""
    if not hints:
        return Report(
            (Line("Nothing to help with: no check has failed and no task is left.", "note"),)
        )
    blocks: list[Block] = []
    for hint in hints:
        blocks.append(Heading(hint.key))
        if hint.symptoms:
            blocks.append(Line("; ".join(hint.symptoms), label="symptoms"))
        blocks.append(Line(hint.nudge, label="nudge"))
        if level != "nudge":
            blocks.append(Line(hint.pointer, label="pointer"))
        if hint.key in diffs:
            text = diffs[hint.key]
            blocks.append(
                Diff(text, "answer: what the draft would change")
                if text
                else Line("The draft changes nothing here.", "note")
            )
    deeper = LEVELS[LEVELS.index(level) + 1 :]
    if deeper:
        key, level = hints[0].key, deeper[0]
        blocks.append(
            Line(
                f'More: `step.hint("{key}", "{level}")`, in a shell '
                f"`portkit hint {key} --level {level}`.",
                "note",
            )
        )
    return Report(tuple(blocks), values=tuple(hints))


def saved_report(verdicts: Sequence[LastVerdict]) -> Report:
    """Return the last verdicts, saying which are out of date."""
    return Report(
        tuple(_saved_line(v) for v in verdicts) or (Line("This step has no checks.", "note"),)
    )


def _saved_line(verdict: LastVerdict) -> Line:
    if verdict.status == "never":
        return Line(f"{verdict.title}: never run", "todo")
    age = verdict.at if verdict.fresh else f"{verdict.at}, out of date: something changed since"
    return Line(f"{verdict.title}: {verdict.what}", verdict.status, aside=age)


def status_report(status: PortStatus) -> Report:
    """Return all steps of a port: passed, tasks left, last verdicts."""
    rows = []
    for s in status.steps:
        state = "✓ passed" if s.passed else "→ next" if s.step == status.next else "□ to do"
        ran = [v for v in s.verdicts if v.status != "never"]
        stale = sum(not v.fresh for v in ran)
        checks = (
            f"{sum(v.status == 'passed' for v in ran)} of {len(s.verdicts)} passed"
            if ran
            else "not run"
        )
        if stale:
            checks += f", {stale} out of date"
        tasks = s.problem or ("" if s.tasks is None else s.tasks)
        rows.append((s.step.number, s.step.id, state, tasks, checks, s.step.notebook))
    table = Table("", ("", "step", "state", "tasks", "checks, last run", "notebook"), tuple(rows))
    title = Heading(f"{status.name}: {status.architecture}")
    where = Line(status.root, label="port")
    return Report((title, where, table), values=(status,))


def whole_report(status: PortStatus) -> Report:
    """Return the status and, step by step, the last verdict of every check."""
    report = status_report(status)
    for s in status.steps:
        if any(v.status != "never" for v in s.verdicts):
            report += Report(
                (Heading(f"{s.step.number} {s.step.title}"), *map(_saved_line, s.verdicts))
            )
    proofs = sorted((Path(status.root) / "report").glob("*.html"))
    links = tuple(Link(f"the report of step 7, {proof.name}", str(proof)) for proof in proofs)
    if links:
        report += Report(links)
    return report


def event_report(event: Event, root: Path) -> Report:
    """Return one event of autopilot."""
    match event:
        case Drafted(step, outcome):
            return Report((Heading(f"{step.number} {step.title}"),)) + outcome_report(
                outcome, root, applied=True
            )
        case Checked(_, verdict):
            return Report(verdict_blocks(verdict), verdict.ok)
        case Ended(step, passed, seconds, reason):
            text = f"step {step.number} {step.id}" + (f": {reason}" if reason else "")
            return Report(
                (Line(text, "passed" if passed else "failed", aside=f"{seconds:.1f} s"),), passed
            )
    raise TypeError(f"no report for {type(event).__name__}")


def doctor_report(findings: Sequence[Any]) -> Report:
    """Return the doctor's findings, each with its remedy where it falls short."""
    blocks: list[Block] = []
    for finding in findings:
        mark = "passed" if finding.ok else "failed" if finding.required else "warning"
        blocks.append(Line(f"{finding.name}: {finding.value}", mark))
        if finding.remedy and not finding.ok:
            blocks.append(Line(finding.remedy, label="next", indent=1))
    return Report(tuple(blocks), all(f.ok or not f.required for f in findings), tuple(findings))
