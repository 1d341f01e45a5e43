"""Turns a source-level draft into an outcome: success, skipped or failed, never an exception."""

from __future__ import annotations

from collections.abc import Callable

import libcst as cst
from libcst import ParserSyntaxError

from portkit.draft.blocker import Blocker
from portkit.draft.outcome import DraftOutcome
from portkit.draft.work import Work
from portkit.lint.source import must_compile
from portkit.port import Port

SourceDraft = Callable[[str, str], Work]


def need_roles(work: Work) -> None:
    """Stop if the file's classes could not be found."""
    facts = work.facts
    for found, what in (
        (facts.causal_lm, f"no class {facts.architecture}"),
        (facts.model, f"no model class inside {facts.architecture}"),
        (facts.layer, "no decoder layer"),
        (facts.attention or facts.recurrent, "no attention class"),
    ):
        if not found:
            reason = next((u for u in facts.unknown if u.about in ("roles", "attention")), None)
            raise Blocker(
                f"{what} was found" + (f": {reason.what}." if reason else "."),
                reason.line if reason else 0,
            )


def draft_source_outcome(
    source: str, architecture: str, step: str, path: str, drafting: SourceDraft
) -> DraftOutcome:
    """Run a source-level draft and say what came of it."""
    if not source.strip():
        return DraftOutcome(step, "failed", reason=f"{path} is empty: do step copy first.")
    try:
        must_compile(source)
        cst.parse_module(source)
    except (SyntaxError, ValueError, ParserSyntaxError) as error:
        line = getattr(error, "lineno", None) or getattr(error, "raw_line", 0)
        return DraftOutcome(
            step,
            "failed",
            reason=f"{path}, line {line}: the file does not parse. Mend that line first; "
            "`portkit tasks` shows it.",
        )
    try:
        work = drafting(source, architecture)
    except Blocker as blocker:
        return DraftOutcome(
            step, "failed", reason=f"{path}, {blocker}" if blocker.line else f"{path}: {blocker}"
        )
    except (ParserSyntaxError, SyntaxError) as error:
        # A transform put together what is no Python: its fault, but never the reader's crash.
        said = str(error).splitlines()[0]
        return DraftOutcome(
            step, "failed", reason=f"{path}: portkit could not write this draft ({said})."
        )
    except RecursionError:
        return DraftOutcome(
            step, "failed", reason=f"{path}: the code is nested too deeply to follow."
        )
    text = work.module.code
    if text == source:
        return DraftOutcome(
            step, "skipped", reason=f"{path} already is in the state after this step."
        )
    return DraftOutcome(
        step, "success", files=((path, text),), did=tuple(work.did), warnings=tuple(work.warnings)
    )


def draft_file(port: Port, step: str, drafting: SourceDraft) -> DraftOutcome:
    """Draft the port's modeling file."""
    path = str(port.modeling.relative_to(port.root))
    return draft_source_outcome(port.source, port.architecture, step, path, drafting)
