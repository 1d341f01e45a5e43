"""A rehearsal on any number of ranks and pipeline stages, on whatever machine there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from portkit.checks.verdict import Table
from portkit.live import rank_layout
from portkit.live.client import live_for
from portkit.live.evidence import has_load_weights
from portkit.live.job import JobResult
from portkit.port import Port
from portkit.report.blocks import Block, Line, Log, Report
from portkit.steps.parallel.rehearsals import cases_table, rank_table, talk_table

TIMEOUT = 600.0


def rehearse(
    port: Port,
    ranks: int = 2,
    stages: int = 1,
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Run the port on `ranks` tensor-parallel ranks in each of `stages` pipeline stages.

    Compares with Transformers and shows what each rank holds and says to the others. Ranks that
    the config rules out are a report that is not ok.
    """
    live = live_for(port)
    loader = "port" if has_load_weights(port) else "portkit"
    job = live.run(
        "rehearsal", timeout=TIMEOUT, progress=progress, ranks=ranks, stages=stages, loader=loader
    )
    if not job.ok:
        return Report(tuple(_stopped(job)), False)
    found = job.value
    bad = [case for case in found["cases"] if not case["ok"]]
    worst = max(case["max_abs"] for case in found["cases"])
    text = (
        f"{len(bad)} of {len(found['cases'])} prompts differ from Transformers, by {worst:.2g}"
        if bad
        else f"every log-probability equals Transformers' to {worst:.1e}"
    )
    blocks: list[Block] = [
        Line(f"On {found['how']}, {text}.", "failed" if bad else "passed", aside=job.device),
        rank_table(found),
        cases_table(found),
    ]
    if talks := _talks(live, found, ranks):
        blocks.append(talks)
    return Report(tuple(blocks), not bad, (found,))


def _talks(live: Any, found: dict[str, Any], ranks: int) -> Table | None:
    """Return the collectives of one forward beside those that the layers need."""
    if ranks == 1 or not found.get("collectives"):
        return None
    layout = live.run("layout", timeout=TIMEOUT)
    return (
        talk_table(rank_layout.talks(layout.value, found["collectives"][0])) if layout.ok else None
    )


def _stopped(job: JobResult) -> list[Block]:
    lines: list[Block] = [Line(job.what, "failed")]
    if job.where:
        lines.append(Line(job.where, label="where", indent=1))
    if job.next:
        lines.append(Line(job.next, label="next", indent=1))
    return [*lines, *([Log(job.log_tail)] if job.log_tail else [])]
