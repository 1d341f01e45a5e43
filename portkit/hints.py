"""Hints in three levels: a nudge, a pointer, and the answer.

Nudge and pointer are text in steps/<id>/hints.toml, keyed by the id of a rule or a check and filed
under the symptoms a reader sees. The answer is never stored: it is the diff of the step's draft
for this very port, cut to the lines that the rule is about where it can be.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from difflib import unified_diff
from functools import cache

from portkit.checks.verdict import Verdict
from portkit.curriculum import step as step_of
from portkit.curriculum import steps
from portkit.errors import PortkitError
from portkit.port import Port

LEVELS = ("nudge", "pointer", "answer")


@dataclass(frozen=True)
class Hint:
    """Help for one rule or check."""

    step: str
    key: str
    """Id of the rule or check."""
    nudge: str
    """What to look at, without saying what is wrong."""
    pointer: str
    """What vLLM wants and where it says so."""
    symptoms: tuple[str, ...] = ()
    """What the reader sees when this is wrong."""


@cache
def hints_of(step_id: str) -> tuple[Hint, ...]:
    """Return the hints of a step in the order of its file; empty if it has none."""
    path = step_of(step_id).room / "hints.toml"
    if not path.is_file():
        return ()
    return tuple(
        Hint(step_id, row["key"], row["nudge"], row["pointer"], tuple(row.get("symptoms", ())))
        for row in tomllib.loads(path.read_text()).get("hint", ())
    )


def find(text: str, step_id: str | None = None) -> tuple[Hint, ...]:
    """Return the hints for a rule id, a check id, or a symptom in the reader's words.

    Best first: an exact key, then symptoms that share the most words. PortkitError if none fits.
    """
    candidates = [h for s in steps() if step_id in (None, s.id) for h in hints_of(s.id)]
    exact = tuple(h for h in candidates if h.key == text)
    if exact:
        return exact
    wanted = _words(text)
    scored = [
        (max((_overlap(wanted, s) for s in (*h.symptoms, h.key)), default=0.0), h)
        for h in candidates
    ]
    best = sorted((pair for pair in scored if pair[0] > 0), key=lambda pair: -pair[0])
    if best:
        return tuple(h for score, h in best if score >= 0.6 * best[0][0])[:5]
    keys = ", ".join(h.key for h in candidates) or "none yet"
    raise PortkitError(
        f"No hint for {text!r}.",
        f"hints of {'step ' + step_id if step_id else 'all steps'}",
        f"Describe what you see in other words, or name one of: {keys}.",
    )


def for_failure(verdict: Verdict) -> Hint | None:
    """Return the hint for a failed verdict: that of the check whose symptoms fit best, if any."""
    if not verdict.judged:
        return None
    own = [h for h in hints_of(verdict.step) if h.key == verdict.check]
    if len(own) < 2:
        return own[0] if own else None
    said = _words(f"{verdict.what} {' '.join(verdict.causes)}")
    return max(own, key=lambda h: max((_overlap(said, s) for s in h.symptoms), default=0.0))


def answer(port: Port, hint: Hint) -> str:
    """Return the draft's diff for this port as it stands; of a rule with findings, their lines.

    PortkitError if there is no draft to take the answer from.
    """
    from portkit.draft.pipeline import draft_step

    outcome = draft_step(port, hint.step)
    if outcome.status != "success":
        raise PortkitError(
            f"There is no drafted answer for step {hint.step!r}: {outcome.reason}",
            str(port.modeling),
            "If the code has a syntax error, mend that first: `portkit tasks` names the line.",
        )
    lines = _lines_of_rule(port, hint)
    parts = []
    for path, new in outcome.files:
        file = port.root / path
        old = file.read_text() if file.is_file() else ""
        diff = list(
            unified_diff(old.splitlines(), new.splitlines(), f"a/{path}", f"b/{path}", lineterm="")
        )
        parts.append("\n".join(_near(diff, lines.get(path)) if path in lines else diff))
    return "\n".join(part for part in parts if part)


def _lines_of_rule(port: Port, hint: Hint) -> dict[str, set[int]]:
    from portkit.lint.engine import findings

    found: dict[str, set[int]] = {}
    for finding in findings(port, hint.step):
        if finding.rule == hint.key:
            found.setdefault(finding.path, set()).add(finding.line)
    return found


def _near(diff: list[str], lines: set[int] | None) -> list[str]:
    """Keep the hunks of a diff whose old side holds one of the lines; all if none does."""
    hunks: list[tuple[range, list[str]]] = []
    for line in diff[2:]:
        if match := re.match(r"@@ -(\d+)(?:,(\d+))?", line):
            start = int(match[1])
            hunks.append((range(start, start + int(match[2] or 1)), []))
        hunks[-1][1].append(line)
    kept = [text for span, text in hunks if any(n in span for n in lines or ())]
    return [*diff[:2], *(line for text in kept for line in text)] if kept else diff


def _words(text: str) -> set[str]:
    return {w for w in re.findall(r"[a-z0-9]+", text.lower().replace("_", " ")) if len(w) > 2}


def _overlap(wanted: set[str], text: str) -> float:
    words = _words(text)
    shared = len(wanted & words)
    return shared / (len(wanted | words) or 1) if shared else 0.0
