"""A diagnosis on one page: what is right, what is wrong first, where, how sure, what heals it."""

from __future__ import annotations

import math

from portkit.checks.verdict import Table
from portkit.diagnosis.values import HOW_SURE, Diagnosis, Trial
from portkit.report.blocks import Block, Diff, Fold, Heading, Line, Report
from portkit.report.render import count

REMARKS = 8


def diagnosis_report(found: Diagnosis) -> Report:
    """Return the page."""
    blocks: list[Block] = [Heading(f"Diagnosis of {found.name}: {found.architecture}", 1)]
    origin = f", adopted from {found.adopted_from}" if found.adopted_from else ""
    blocks.append(Line(f"{found.file}{origin}", label="file", aside=f"{found.seconds:.0f} s"))
    blocks += _wrong(found) if found.first else [_nothing(found)]
    blocks += _right(found)
    blocks += _remarks(found)
    return Report(tuple(blocks), found.ok, (found,))


def _nothing(found: Diagnosis) -> Line:
    return Line(
        f"Nothing is wrong that {count(len(found.right), 'check')} can see: loading, prefill, "
        "decoding, batches, ranks as far as they ran.",
        "passed",
    )


def _wrong(found: Diagnosis) -> list[Block]:
    first = found.first
    assert first is not None
    blocks: list[Block] = [
        Heading("Wrong first"),
        Line(first.what, "failed", first.title, f"check `{first.check}`, step {first.step}"),
    ]
    healing = found.healing
    if healing:
        blocks.append(Line(f"{healing.where}, by experiment", label="where", indent=1))
    if first.where:
        label = "first difference seen at" if healing else "where"
        blocks.append(Line(first.where, label=label, indent=1))
    blocks.append(Line(HOW_SURE[found.certainty], label="how sure", indent=1))
    if found.causes:
        blocks.append(Line("most likely first", label="likely causes", indent=1))
        blocks += [Line(f"{n}. {cause}", indent=2) for n, cause in enumerate(found.causes[:5], 1)]
    step = healing.title if healing else first.next
    if step:
        words = f"edit {healing.where}: {step}" if healing else step
        blocks.append(Line(words, label="next", indent=1))
    blocks += _trials(found)
    later = [v for v in found.verdicts if v.status == "failed" and v is not first]
    if later:
        blocks.append(Heading("Wrong, too: perhaps only because of the first"))
        blocks += [Line(v.what, "failed", v.title, f"check `{v.check}`") for v in later]
    return blocks


def _trials(found: Diagnosis) -> list[Block]:
    if found.not_tried:
        return [Line(f"No experiment was run: {found.not_tried}.", "note")]
    if not found.trials:
        return []
    now = "" if math.isinf(found.baseline) else f"; without an edit it is {found.baseline:.2g}"
    table = Table(
        "Experiments, each one edit on a copy of the port, run live",
        ("edit", "where", "result", "largest difference left"),
        tuple((t.title, t.where, _result(t), _distance(t)) for t in found.trials),
        f"Natural logarithm of a probability, over the whole vocabulary{now}.",
    )
    blocks: list[Block] = [table]
    if found.healing:
        blocks.append(Diff(found.healing.diff, "the edit that heals it"))
    else:
        blocks.append(
            Line(
                f"None of {count(len(found.trials), 'edit')} heals it: two faults at once, or one "
                "that no flip undoes. The place and the causes above stand.",
                "note",
            )
        )
    return blocks


def _result(trial: Trial) -> str:
    mark = {"heals": "✓ ", "helps": "! "}.get(trial.outcome, "")
    return f"{mark}{trial.outcome}"


def _distance(trial: Trial) -> str:
    return "it does not run" if math.isinf(trial.distance) else f"{trial.distance:.1e}"


def _right(found: Diagnosis) -> list[Block]:
    blocks: list[Block] = []
    if found.right:
        lines = tuple(Line(v.what, "passed", v.title) for v in found.right)
        short = "; ".join(v.title for v in found.right)
        blocks.append(Heading("Right"))
        blocks.append(Line(f"{short}."))
        blocks.append(Fold("each with its numbers", lines, in_text=False))
    if found.unjudged:
        blocks.append(Heading("Not judged"))
        blocks += [Line(v.what, "skipped", v.title) for v in found.unjudged]
    return blocks


def _remarks(found: Diagnosis) -> list[Block]:
    if not found.remarks:
        return []
    blocks: list[Block] = [Heading("What the rules say about the source")]
    blocks += [
        Line(f.message, "todo", aside=f"{f.rule}, {f.path}:{f.line}")
        for f in found.remarks[:REMARKS]
    ]
    if len(found.remarks) > REMARKS:
        blocks.append(Line(f"and {len(found.remarks) - REMARKS} more: `portkit tasks`", "note"))
    return blocks
