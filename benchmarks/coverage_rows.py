"""One row of the coverage: an architecture and one way of running it, measured. Prints nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from measure import machine

from portkit.architectures import in_scope
from portkit.create import new_port
from portkit.draft.pipeline import apply_draft
from portkit.errors import PortkitError
from portkit.live.client import live_for
from portkit.live.job import JobResult
from portkit.port import Port

PARTS = ("port", "backend", "native")
STEPS = ("copy", "forward", "parallel", "weights")
STAGES = ("prefill", "chunked", "decode", "ragged", "far")
TIMEOUT = 240.0
"""Seconds of one job: a hang costs its row, not the run."""


@dataclass(frozen=True)
class CoverageRow:
    """What one way of running one architecture came to."""

    architecture: str
    part: str
    """"port", "backend" (vLLM's Transformers backend) or "native" (vLLM's own class)."""
    matches: bool
    where: str
    """Where it ended: "match", "checkpoint", "draft forward", "TP=1 decode", "TP=2", "start", …"""
    reason: str
    """Why it does not match; for a match, the largest difference."""
    warnings: tuple[str, ...]
    """What the draft left to the reader."""
    device: str
    versions: str
    """Of Python, vLLM, torch and Transformers where the row was measured."""
    date: str
    seconds: float


class Store:
    """Rows on disk, one JSON object a line; the last of an architecture and part counts."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> dict[tuple[str, str], CoverageRow]:
        """Return the kept rows by architecture and part."""
        found = {}
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                value = json.loads(line)
                row = CoverageRow(**{**value, "warnings": tuple(value["warnings"])})
                found[row.architecture, row.part] = row
        return found

    def add(self, row: CoverageRow) -> None:
        """Append a row; an earlier one stays in the file and no longer counts."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(row)) + "\n")


class _Ended(Exception):
    """The row's end, before it matched: (where, reason)."""


def measure_architecture(
    name: str, part: str, folder: Path, say: Callable[[str], None]
) -> CoverageRow:
    """Make the checkpoint and run one part. Whatever goes wrong becomes the row's reason."""
    started = time.monotonic()
    warnings: list[str] = []
    device = "cpu"
    matches = False
    try:
        port = _port(name, folder, say)
        with live_for(port) as live:
            device = live.device()[0]
            run = {"port": _run_port, "backend": _run_backend, "native": _run_native}[part]
            where, reason = "match", run(port, live, warnings, say)
            matches = True
    except _Ended as end:
        where, reason = end.args
    except Exception as error:  # a fault of portkit's own: the row says so, the run goes on
        where, reason = "portkit", f"{type(error).__name__}: {error}"
    return CoverageRow(
        architecture=name,
        part=part,
        matches=matches,
        where=where,
        reason=" ".join(str(reason).split())[:400],
        warnings=tuple(warnings),
        device=device,
        versions=", ".join(f"{name} {version}" for name, version in machine().versions),
        date=datetime.now(UTC).date().isoformat(),
        seconds=round(time.monotonic() - started, 1),
    )


def _port(name: str, folder: Path, say: Callable[[str], None]) -> Port:
    """Return a port with a random checkpoint, the bundled model's too: all rows are made alike."""
    checkpoint = folder / "checkpoint"
    made = live_for(None).run(
        "random_checkpoint",
        progress=say,
        timeout=TIMEOUT,
        architecture=name,
        model_type=in_scope()[name],
        out=str(checkpoint),
    )
    if not made.ok:
        raise _Ended("checkpoint", made.what)
    try:
        return new_port("covered", checkpoint=checkpoint, root=folder, progress=say)
    except PortkitError as error:
        raise _Ended("checkpoint", error.what) from error


def _run_port(port: Port, live: Any, warnings: list[str], say: Callable[[str], None]) -> str:
    for step in STEPS:
        say(f"{port.architecture}: draft {step}")
        outcome = apply_draft(port, step)
        if outcome.status != "success":
            raise _Ended(f"draft {step}", outcome.reason)
        warnings.extend(outcome.warnings)
    say(f"{port.architecture}: one rank")
    value = _value(
        live.run("forward_parity", timeout=TIMEOUT, loader="port", trace=False), "TP=1 start"
    )
    if value["starts"].get("error"):
        raise _Ended("TP=1 start", value["starts"]["error"]["what"])
    worst = 0.0
    for stage in STAGES:
        found = value[stage]
        if found.get("error"):
            raise _Ended(f"TP=1 {stage}", found["error"]["what"])
        worst = max(worst, *_judge(found["cases"], f"TP=1 {stage}"))
    say(f"{port.architecture}: two ranks")
    two = _value(live.run("rehearsal", timeout=TIMEOUT, loader="port", ranks=2), "TP=2")
    return f"{max(worst, *_judge(two['cases'], 'TP=2')):.1e}"


def _judge(cases: list[dict[str, Any]], where: str) -> list[float]:
    wrong = [case for case in cases if not case["ok"]]
    if wrong:
        case = max(wrong, key=lambda c: c["max_abs"])
        raise _Ended(where, f"{case['name']}: log-probabilities differ by {case['max_abs']:.2g}")
    return [case["max_abs"] for case in cases] or [0.0]


def _run_backend(port: Port, live: Any, warnings: list[str], say: Callable[[str], None]) -> str:
    return _alternative(port, live, "transformers")


def _run_native(port: Port, live: Any, warnings: list[str], say: Callable[[str], None]) -> str:
    support = _value(live.run("native_support", architecture=port.architecture), "start")
    if support["answer"] != "native":
        raise _Ended("none", "vLLM has no class of its own for it")
    return _alternative(port, live, "vllm")


def _alternative(port: Port, live: Any, impl: str) -> str:
    value = _value(live.run("transformers_backend", timeout=TIMEOUT, impl=impl), "start")
    if not value["ran"]:
        raise _Ended(value["phase"], value["error"])
    worst = max(max(row["prefill"], row["decode"]) for row in value["rows"])
    if not all(row["ok"] for row in value["rows"]):
        raise _Ended("compare", f"log-probabilities differ by {worst:.2g}")
    return f"{worst:.1e}"


def _value(result: JobResult, where: str) -> dict[str, Any]:
    if not result.ok:
        raise _Ended(where, f"{result.status}: {result.what}")
    return result.value
