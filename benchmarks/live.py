"""What a reader waits for: from a save to the verdict of the real vLLM, with a warm worker."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import ports
import psutil
from jupyter_client.manager import KernelManager
from measure import Failed, Row, Say, number, span

from portkit.checks.runner import run_checks
from portkit.curriculum import step as step_of
from portkit.live.client import live_for

MAIN = {"copy": "bit_equal", "forward": "prefill_parity", "weights": "load_parity"}
"""Each step's verdict that matters most: the numbers against Transformers'."""
BETWEEN_SAMPLES = 0.1
"""Seconds."""


def verdicts_after_edit(step: str, repeats: int, say: Say) -> list[Row]:
    """One row until the main verdict, one until all of the step's; the same runs."""
    main = MAIN[step]
    with ports.folder() as root:
        port = ports.at(root, step, say)
        _warm(port, step, None, say)
        runs = [_judge(port, step, n, None, say) for n in range(repeats)]
    count = len(runs[0])
    live = f"edit → live verdict, step {step_of(step).number} ({step})"
    detail = "; ".join(
        f"{check} {number(seconds)}" for check, seconds in _own(runs[-1]) if seconds >= 0.1
    )
    return [
        Row(
            live,
            "s",
            tuple(run[main] for run in runs),
            3.0,
            f"from the write to the verdict of `{main}`, in a run of all {count} checks, as "
            "`step.check()` does it",
        ),
        Row(
            f"… until all {count} verdicts",
            "s",
            tuple(max(run.values()) for run in runs),
            None,
            f"of these, in the last run, s: {detail}",
        ),
    ]


def rehearsal_on_two_ranks(repeats: int, say: Say) -> list[Row]:
    """With what it requires, as `step.check("rehearsal_tp2")` does it."""
    only = ("rehearsal_tp2",)
    with ports.folder() as root:
        port = ports.at(root, "parallel", say)
        _warm(port, "parallel", only, say)
        runs = [_judge(port, "parallel", n, only, say) for n in range(repeats)]
    alone = tuple(dict(_own(run))["rehearsal_tp2"] for run in runs)
    before = [check for check in runs[0] if check not in only]
    note = (
        f"from the write to the verdict of `rehearsal_tp2`, with {' and '.join(before)}, which it "
        f"requires; by itself {span(alone)} s"
    )
    values = tuple(run["rehearsal_tp2"] for run in runs)
    return [Row("edit → TP=2 rehearsal", "s", values, 12.0, note)]


def memory(repeats: int, say: Say) -> list[Row]:
    """A Jupyter kernel of its own runs the checks; a thread here watches its process tree."""
    steps = ("forward", "parallel")
    values, notes = [], []
    for _ in range(repeats):
        with ports.folder() as root, tempfile.TemporaryDirectory() as logs:
            roots = [(step, ports.at(root, step, say).root) for step in steps]
            watch = _in_kernel(roots, Path(logs), say)
            values.append(watch.peak / 2**30)
            notes.append(
                f"at that moment {watch.processes} processes, kernel {watch.kernel / 2**30:.2f}; "
                f"sum of their RSS, shared pages counted again, up to {watch.rss / 2**30:.1f} GiB"
            )
    note = (
        "peak of the process tree of a Jupyter kernel, pages that processes share counted once "
        f"(PSS), over all checks of steps {' and '.join(steps)} with rehearsals on 1, 2, 4 ranks; "
    )
    return [Row("memory of kernel + worker", "GiB", tuple(values), 4.0, note + notes[-1])]


# ---- runs of checks -----------------------------------------------------------------------------


def _warm(port: ports.Port, step: str, only: tuple[str, ...] | None, say: Say) -> None:
    """Start the worker, and run the checks once: Transformers' side is cached on disk by that."""
    say("starting the worker")
    live_for(port).device()
    _judge(port, step, -1, only, say)


def _judge(
    port: ports.Port, step: str, number: int, only: tuple[str, ...] | None, say: Say
) -> dict[str, float]:
    """Edit, run the checks, and return for each the seconds from the edit to its verdict."""
    say(f"step {step}, run {number + 1}" if number >= 0 else f"step {step}, unmeasured first run")
    start = time.perf_counter()
    ports.edit(port, number)
    seen = {}
    for verdict in run_checks(port, step, only=only):
        seen[verdict.check] = time.perf_counter() - start
        if not verdict.ok:
            raise Failed(f"{verdict.check} did not pass: {verdict.what}")
    return seen


def _own(run: dict[str, float]) -> list[tuple[str, float]]:
    """Return each check with the seconds between the verdict before it and its own."""
    ends = [0.0, *run.values()]
    return [(check, end - ends[i]) for i, (check, end) in enumerate(run.items())]


# ---- memory -------------------------------------------------------------------------------------

CHECK = """
from portkit import open_port, run_checks
failed = [v.check + ": " + v.what for v in run_checks(open_port({root!r}), {step!r}) if not v.ok]
assert not failed, failed
"""


@dataclass
class _Watch:
    """The most memory that a process and everything below it had at once."""

    root: psutil.Process
    peak: float = 0.0
    """Bytes, proportional set size: a page that n processes share counts 1/n in each."""
    kernel: float = 0.0
    """Of these, the root's own."""
    processes: int = 0
    rss: float = 0.0
    """The largest sum of resident sizes, at whatever moment it was."""
    ended: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        while not self.ended.wait(BETWEEN_SAMPLES):
            sizes = [_size(process) for process in (self.root, *self.root.children(recursive=True))]
            pss = [size[0] for size in sizes if size[0]]
            self.rss = max(self.rss, sum(size[1] for size in sizes))
            if sum(pss) > self.peak:
                self.peak, self.kernel, self.processes = sum(pss), sizes[0][0], len(pss)


def _size(process: psutil.Process) -> tuple[float, float]:
    """Return (PSS, RSS) in bytes; zeros for a process that is gone."""
    try:
        rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0, 0.0
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in rollup if " kB" in line}
    return float(sizes.get("Pss", 0)), float(sizes.get("Rss", 0))


def _in_kernel(roots: list[tuple[str, Path]], logs: Path, say: Say) -> _Watch:
    """Run the steps' checks in a fresh Jupyter kernel of this Python, watched."""
    manager = KernelManager()
    manager.kernel_spec.argv[0] = sys.executable
    with (logs / "kernel.log").open("w") as log:
        manager.start_kernel(stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "2"})
    client = manager.client()
    watch = _Watch(psutil.Process(manager.provisioner.pid))
    thread = threading.Thread(target=watch.run, daemon=True)
    try:
        client.start_channels()
        client.wait_for_ready(timeout=120)
        thread.start()
        for step, root in roots:
            say(f"in a Jupyter kernel: the checks of step {step}")
            code = CHECK.format(root=str(root), step=step)
            reply = client.execute_interactive(code, timeout=900, output_hook=lambda message: None)
            if reply["content"]["status"] != "ok":
                raise Failed(f"{reply['content']['ename']}: {reply['content']['evalue']}")
    finally:
        watch.ended.set()
        client.stop_channels()
        manager.shutdown_kernel()
    if thread.is_alive():
        thread.join()
    return watch
