"""Try flips live, each on a copy of the port: the reader's file is never touched."""

from __future__ import annotations

import difflib
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from portkit.diagnosis.flips import Flip, compiles
from portkit.diagnosis.values import Outcome, Trial
from portkit.live.client import Live
from portkit.live.job import JobResult
from portkit.port import META, Port

HELPS = 5.0
"""A flip helps if it makes the distance this many times smaller, without healing the port."""
TIMEOUT = 90.0


@contextmanager
def copy_of(port: Port) -> Iterator[Port]:
    """Yield a copy of the port's code in a temporary folder, with links to its checkpoint."""
    folder = Path(tempfile.mkdtemp(prefix="portkit-trial-"))
    try:
        root = folder / port.root.name
        root.mkdir()
        shutil.copyfile(port.root / META, root / META)
        shutil.copytree(port.root / port.package, root / port.package)
        for name in ("checkpoint", "original"):
            if (port.root / name).exists():
                (root / name).symlink_to((port.root / name).resolve(), target_is_directory=True)
        # The reference's answers are the same, and not computed again.
        (port.state_dir / "cache").mkdir(exist_ok=True)
        (root / ".portkit").mkdir()
        (root / ".portkit" / "cache").symlink_to(port.state_dir / "cache", target_is_directory=True)
        yield Port(root)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def try_flips(
    port: Port,
    flips: Sequence[Flip],
    stages: Sequence[str],
    baseline: float,
    *,
    loader: str,
    ranks: int = 1,
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[Trial, ...]:
    """Try flips in order until one heals the port; return what became of each.

    `stages` are those of the job forward_parity that must agree; with `ranks` above one the job
    `rehearsal` is asked instead. `baseline` is the distance without an edit.
    """
    done: list[Trial] = []
    with copy_of(port) as copy, Live(copy.root) as live:
        for number, flip in enumerate((f for f in flips if compiles(f.source)), 1):
            progress(f"trial {number}: {flip.title}")
            started = time.monotonic()
            copy.modeling.write_text(flip.source, encoding="utf-8")
            if ranks > 1:
                job = live.run("rehearsal", timeout=TIMEOUT, ranks=ranks, loader=loader)
                cases = _cases(job, None)
            else:
                job = live.run(
                    "forward_parity",
                    timeout=TIMEOUT,
                    loader=loader,
                    trace=False,
                    stages=list(stages),
                )
                cases = _cases(job, stages)
            outcome, distance = _judged(cases, baseline)
            done.append(
                Trial(
                    flip.id,
                    flip.title,
                    flip.cause,
                    f"{port.modeling.name}:{flip.line}",
                    _diff(port.source, flip.source, port.modeling.name),
                    outcome,
                    distance,
                    round(time.monotonic() - started, 2),
                )
            )
            if outcome == "heals":
                break
    return tuple(done)


def _cases(job: JobResult, stages: Sequence[str] | None) -> list[dict] | None:
    """Return all comparisons, or None if the port did not run to their end."""
    if not job.ok:
        return None
    parts = [job.value] if stages is None else [job.value.get(stage) for stage in stages]
    if any(part is None or "cases" not in part for part in parts):
        return None
    return [case for part in parts for case in part["cases"]]


def _judged(cases: list[dict] | None, baseline: float) -> tuple[Outcome, float]:
    if cases is None:
        return "breaks", math.inf
    distance = max((float(case["max_abs"]) for case in cases), default=math.inf)
    if cases and all(case["ok"] for case in cases):
        return "heals", distance
    if distance * HELPS < baseline:
        return "helps", distance
    same = math.isclose(distance, baseline, rel_tol=1e-3)
    return ("changes nothing" if same else "does not heal"), distance


def _diff(old: str, new: str, name: str) -> str:
    lines = difflib.unified_diff(
        old.splitlines(), new.splitlines(), f"a/{name}", f"b/{name}", lineterm="", n=2
    )
    return "\n".join(lines)
