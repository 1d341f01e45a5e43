"""Turn values of the other rooms into reports: verdicts, findings, draft outcomes, diffs, errors.

One function per kind of value. What is shown is in the value already; this only arranges it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from portkit.checks.verdict import Table, Verdict
from portkit.draft.outcome import DraftOutcome
from portkit.errors import PortkitError
from portkit.lint.finding import Finding
from portkit.report.blocks import Block, Code, Diff, Fold, Heading, Line, Link, Log, Pairs, Report


def count(number: int, noun: str) -> str:
    """Return "1 check", "2 checks"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


# ---- verdicts -----------------------------------------------------------------------------------


def verdicts_report(
    verdicts: Sequence[Verdict], foot: Sequence[Block] = (), seconds: float = 0.0
) -> Report:
    """Return the verdicts in order, failures unfolded, and a line that sums them up."""
    blocks = [block for verdict in verdicts for block in verdict_blocks(verdict)]
    blocks.append(summary_line(verdicts, seconds))
    ok = all(v.ok for v in verdicts)
    return Report((*blocks, *foot), ok, tuple(verdicts))


def summary_line(verdicts: Sequence[Verdict], seconds: float = 0.0) -> Line:
    """Return one line: how many passed, failed and were skipped, on what device, in how long.

    The verdicts' own seconds do not add up to it: several may come from one run.
    """
    if not verdicts:
        return Line("No checks ran.", "note")
    by_status = {s: sum(v.status == s for v in verdicts) for s in ("passed", "failed", "skipped")}
    text = ", ".join(f"{n} {status}" for status, n in by_status.items() if n)
    devices = sorted({v.device for v in verdicts if v.device})
    mark = "failed" if by_status["failed"] else "passed" if by_status["passed"] else "skipped"
    aside = ", ".join(filter(None, [" and ".join(devices), f"{seconds:.1f} s" if seconds else ""]))
    return Line(f"{count(len(verdicts), 'check')}: {text}", mark, aside=aside)


def verdict_blocks(verdict: Verdict) -> tuple[Block, ...]:
    """Return one verdict: its line, and what helps if it failed; evidence behind a fold."""
    aside = ", ".join(
        filter(None, [verdict.device, f"{verdict.seconds:.1f} s" if verdict.seconds else ""])
    )
    blocks: list[Block] = [Line(verdict.what, verdict.status, verdict.title, aside)]
    if verdict.where:
        blocks.append(Line(verdict.where, label="where", indent=1))
    if verdict.next:
        blocks.append(Line(verdict.next, label="next", indent=1))
    if verdict.causes:
        blocks.append(Line("most likely first", label="likely causes", indent=1))
        blocks.extend(Line(f"{n}. {cause}", indent=2) for n, cause in enumerate(verdict.causes, 1))
    failed = verdict.status == "failed"
    evidence: list[Block] = list(verdict.tables)
    if verdict.device_reason:
        evidence.append(Line(f"{verdict.device}: {verdict.device_reason}", label="device"))
    if verdict.tables:
        blocks.append(
            Fold(f"evidence of `{verdict.check}`", tuple(evidence), open=failed, in_text=failed)
        )
    if verdict.log:
        blocks.append(Fold("output of the process", (Log(verdict.log),), in_text=failed))
    return tuple(blocks)


# ---- findings -----------------------------------------------------------------------------------


def findings_report(
    findings: Sequence[Finding], source: str = "", title: str = "", around: int = 2
) -> Report:
    """Return the findings as tasks, by symbol, each with the lines concerned.

    `source` is the text of the modeling file; findings of other files are shown without lines.
    """
    blocks: list[Block] = [Heading(title)] if title else []
    if not findings:
        blocks.append(Line("No tasks: no rule has anything to say here.", "passed"))
        return Report(tuple(blocks), True, ())
    lines = source.splitlines()
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in sorted(findings, key=lambda f: (f.path, f.line, f.column)):
        groups.setdefault((finding.path, finding.symbol), []).append(finding)
    for (path, symbol), group in groups.items():
        inside: list[Block] = []
        for finding in group:
            inside.append(Line(finding.message, "todo", aside=_finding_aside(finding)))
            if path.endswith(".py") and 0 < finding.line <= len(lines):
                start = max(1, finding.line - around)
                text = "\n".join(lines[start - 1 : finding.line + around])
                inside.append(Code(text, start, ((finding.line, ""),)))
        summary = f"`{symbol or path}`: {count(len(group), 'task')}"
        blocks.append(Fold(summary, tuple(inside), "todo", open=len(findings) <= 6))
    fixable = sum(f.fix == "safe" for f in findings)
    more = f"; {fixable} can be fixed safely: `step.fix()` or `portkit fix`" if fixable else ""
    blocks.append(
        Line(f"{count(len(findings), 'task')} in {count(len(groups), 'place')}{more}.", "note")
    )
    return Report(tuple(blocks), False, tuple(findings))


def _finding_aside(finding: Finding) -> str:
    fix = {"safe": ", safe fix", "unsafe": ", unsafe fix"}.get(finding.fix, "")
    return f"{finding.rule}, {finding.path}:{finding.line}{fix}"


def code_report(
    source: str,
    path: str,
    spans: Iterable[tuple[str, int, int]],
    marked: Sequence[tuple[int, str]] = (),
) -> Report:
    """Return spans (symbol, first line, last line) of a source, pointing at lines in `marked`."""
    lines = source.splitlines()
    blocks: list[Block] = []
    for symbol, first, last in spans:
        here = tuple((n, remark) for n, remark in marked if first <= n <= last)
        text = "\n".join(lines[first - 1 : last])
        blocks.append(Code(text, first, here, f"{path}:{first}  {symbol}"))
    return Report(tuple(blocks) or (Line("Nothing to show.", "note"),))


# ---- drafts and diffs ---------------------------------------------------------------------------


def outcome_report(
    outcome: DraftOutcome, root: Path | None = None, applied: bool = False
) -> Report:
    """Return what a draft did and left, with its diff against the files in `root`."""
    mark = {"success": "passed", "skipped": "skipped", "failed": "failed"}[outcome.status]
    verb = "applied" if applied else "drafted"
    what = {
        "success": f"Draft of `{outcome.step}` {verb}: {count(len(outcome.did), 'change')}, "
        f"{count(len(outcome.warnings), 'decision')} left to you.",
        "skipped": f"Nothing drafted for `{outcome.step}`: {outcome.reason}",
        "failed": f"No draft of `{outcome.step}`: {outcome.reason}",
    }[outcome.status]
    blocks: list[Block] = [Line(what, mark)]
    if outcome.did:
        blocks.append(Fold("what changed", tuple(Line(did, "note") for did in outcome.did)))
    blocks.extend(Line(warning, "warning", label="decide") for warning in outcome.warnings)
    if root is not None and not applied:
        for path, text in outcome.files:
            old = (root / path).read_text() if (root / path).is_file() else ""
            diff = unified_diff(old, text, path)
            if diff:
                blocks.append(Fold(f"diff of `{path}`", (Diff(diff),)))
    return Report(tuple(blocks), outcome.status != "failed", (outcome,))


def unified_diff(old: str, new: str, path: str, context: int = 3) -> str:
    """Return the unified diff of two texts, empty if they are equal."""
    lines = difflib.unified_diff(
        old.splitlines(), new.splitlines(), f"a/{path}", f"b/{path}", lineterm="", n=context
    )
    return "\n".join(lines)


def diff_report(diff: str, title: str = "") -> Report:
    """Return a diff, or a line that there is none."""
    if not diff.strip():
        return Report((Line(f"{title + ': ' if title else ''}no difference.", "note"),))
    return Report((Diff(diff, title),))


# ---- the rest -----------------------------------------------------------------------------------


def error_report(error: PortkitError) -> Report:
    """Return what is wrong, where, and what to do next."""
    blocks = [Line(error.what, "failed")]
    if error.where:
        blocks.append(Line(error.where, label="where", indent=1))
    if error.next:
        blocks.append(Line(error.next, label="next", indent=1))
    return Report(tuple(blocks), False, (error,))


def text_report(
    *lines: str | Line | Heading | Table | Link | Code | Fold, ok: bool = True
) -> Report:
    """Return a report of a few lines or blocks as given."""
    return Report(tuple(Line(line) if isinstance(line, str) else line for line in lines), ok)


def pairs_report(pairs: Mapping[str, Any], title: str = "") -> Report:
    """Return facts as name and value."""
    rows = tuple((str(k), _plain(v)) for k, v in pairs.items())
    return Report(((Heading(title),) if title else ()) + (Pairs(rows),), True, (dict(pairs),))


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == "" or value == ():
        return "none"
    if isinstance(value, (tuple, list, set, frozenset)):
        return ", ".join(_plain(v) for v in value)
    return str(value)
