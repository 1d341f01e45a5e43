"""One row of the coverage: an architecture and one way of running it, measured. Prints nothing."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from measure import machine

from portkit.architectures import in_scope
from portkit.create import new_port
from portkit.draft.pipeline import apply_draft
from portkit.errors import PortkitError
from portkit.live.client import Live, live_for
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
    digest: str = ""
    """SHA-256 of what ran: the checkpoint's files and, of a port, the drafted source."""
    config: str = ""
    """Fields of the config with values of their own, as JSON; "" for the usual checkpoint."""

    @property
    def name(self) -> str:
        """The architecture and the fields, what a row is kept under."""
        return f"{self.architecture} {self.config}".rstrip()


class Store:
    """Rows on disk, one JSON object a line; the last of a name and part counts."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> dict[tuple[str, str], CoverageRow]:
        """Return the kept rows by name and part."""
        found = {}
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                value = json.loads(line)
                row = CoverageRow(**{**value, "warnings": tuple(value["warnings"])})
                found[row.name, row.part] = row
        return found

    def add(self, row: CoverageRow) -> None:
        """Append a row; an earlier one stays in the file and no longer counts."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(row)) + "\n")


class _Ended(Exception):
    """The row's end, before it matched: (where, reason)."""


def measure_architecture(
    name: str,
    parts: Sequence[str],
    folder: Path,
    say: Callable[[str], None],
    known: Mapping[str, CoverageRow],
    config: str = "",
) -> list[CoverageRow]:
    """Make the checkpoint and run the parts on it, in one worker; a row each.

    Whatever goes wrong becomes the row's reason. A `known` row (by part) that matched is returned
    as it is where checkpoint and drafted source are, byte for byte, what they were.
    """
    try:
        port = _port(name, folder, say, json.loads(config or "{}"))
    except Exception as error:
        return [_Row(name, part, config).ended(error) for part in parts]
    with live_for(port) as live:
        return [
            _measure(_Row(name, part, config), port, live, say, known.get(part)) for part in parts
        ]


def _measure(
    row: _Row, port: Port, live: Live, say: Callable[[str], None], known: CoverageRow | None
) -> CoverageRow:
    try:
        if row.part == "port":
            row.warnings = _draft(port, say)
        row.digest = _digest(port, row.part)
        if known and known.matches and known.digest == row.digest:
            return known
        row.device = live.device()[0]
        run = {"port": _run_port, "backend": _run_backend, "native": _run_native}[row.part]
        return row.matched(run(port, live, say))
    except Exception as error:
        return row.ended(error)


class _Row:
    """A row being measured."""

    def __init__(self, architecture: str, part: str, config: str = "") -> None:
        self.architecture, self.part, self.config = architecture, part, config
        self.warnings: list[str] = []
        self.device, self.digest = "cpu", ""
        self._started = time.monotonic()

    def matched(self, difference: str) -> CoverageRow:
        return self._row(True, "match", difference)

    def ended(self, error: Exception) -> CoverageRow:
        """Return the row of what went wrong; a fault of portkit's own says so."""
        if isinstance(error, _Ended):
            return self._row(False, *error.args)
        return self._row(False, "portkit", f"{type(error).__name__}: {error}")

    def _row(self, matches: bool, where: str, reason: str) -> CoverageRow:
        return CoverageRow(
            architecture=self.architecture,
            part=self.part,
            matches=matches,
            where=where,
            reason=" ".join(reason.split())[:400],
            warnings=tuple(self.warnings),
            device=self.device,
            versions=", ".join(f"{name} {version}" for name, version in machine().versions),
            date=datetime.now(UTC).date().isoformat(),
            seconds=round(time.monotonic() - self._started, 1),
            digest=self.digest,
            config=self.config,
        )


def _digest(port: Port, part: str) -> str:
    """Return the digest of the checkpoint and, for part "port", of the drafted source."""
    digest = hashlib.sha256(part.encode())
    files = sorted(port.checkpoint.iterdir())
    for file in [*files, port.modeling] if part == "port" else files:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _port(name: str, folder: Path, say: Callable[[str], None], config: dict[str, Any]) -> Port:
    """Return a port with a random checkpoint, the bundled model's too: all rows are made alike."""
    checkpoint = folder / "checkpoint"
    made = live_for(None).run(
        "random_checkpoint",
        progress=say,
        timeout=TIMEOUT,
        architecture=name,
        model_type=in_scope()[name],
        out=str(checkpoint),
        set=config,
    )
    if not made.ok:
        raise _Ended("checkpoint", str(made.what))
    try:
        return new_port("covered", checkpoint=checkpoint, root=folder, progress=say)
    except PortkitError as error:
        raise _Ended("checkpoint", error.what) from error


def _draft(port: Port, say: Callable[[str], None]) -> list[str]:
    warnings: list[str] = []
    for step in STEPS:
        say(f"{port.architecture}: draft {step}")
        outcome = apply_draft(port, step)
        if outcome.status != "success":
            raise _Ended(f"draft {step}", outcome.reason)
        warnings.extend(outcome.warnings)
    return warnings


def _run_port(port: Port, live: Live, say: Callable[[str], None]) -> str:
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


def _run_backend(port: Port, live: Live, say: Callable[[str], None]) -> str:
    return _alternative(port, live, "transformers")


def _run_native(port: Port, live: Live, say: Callable[[str], None]) -> str:
    support = _value(live.run("native_support", architecture=port.architecture), "start")
    if support["answer"] != "native":
        raise _Ended("none", "vLLM has no class of its own for it")
    return _alternative(port, live, "vllm")


def _alternative(port: Port, live: Live, impl: str) -> str:
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
