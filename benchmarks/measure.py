"""Values that a benchmark gives, and the machine it ran on. No torch, no vLLM."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from portkit import __version__
from portkit.live.environment import installed_vllm

Say = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One line of the table: something measured several times, and what it may be at most."""

    what: str
    unit: str
    """"s", "min" or "GiB"."""
    values: tuple[float, ...]
    """One per run, in the order of the runs."""
    budget: float | None = None
    """None: shown beside a row that has one."""
    note: str = ""
    """What exactly was measured, and anything else that was seen."""
    problem: str = ""
    """Why there is no honest number, or what else broke the budget (torch was imported)."""

    @property
    def verdict(self) -> str:
        if self.problem:
            return f"✗ {self.problem}"
        if self.budget is None:
            return ""
        return "✓ within" if statistics.median(self.values) < self.budget else "✗ over"

    def to_dict(self) -> dict[str, Any]:
        median = statistics.median(self.values) if self.values else None
        return {**asdict(self), "median": median, "verdict": self.verdict}


@dataclass(frozen=True)
class Machine:
    """Where and when the numbers were measured."""

    device: str
    cores: int
    memory_gib: float
    load: float
    """Load average over the minute before the start. Above the number of cores the machine was
    busy with other things and every time is too long."""
    versions: tuple[tuple[str, str], ...]
    date: str

    @property
    def noisy(self) -> bool:
        return self.load > self.cores / 2


class Failed(Exception):
    """A benchmark could not measure what it should; the message says why."""


def machine() -> Machine:
    """Look at this machine, now."""
    vllm = installed_vllm()
    versions = [("portkit", __version__), ("Python", platform.python_version())]
    versions += [vllm] if vllm else []
    versions += [(name, metadata.version(name)) for name in ("torch", "transformers")]
    return Machine(
        device=_device(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=psutil.virtual_memory().total / 2**30,
        load=os.getloadavg()[0],
        versions=tuple(versions),
        date=datetime.now(UTC).date().isoformat(),
    )


def repeated(run: Callable[[int], float], repeats: int) -> tuple[float, ...]:
    """Call `run` with 0, 1, ... and return what it measured each time."""
    return tuple(run(number) for number in range(repeats))


def span(values: tuple[float, ...]) -> str:
    """Return the smallest and the largest value as text."""
    return f"{number(min(values))}-{number(max(values))}"


def number(value: float) -> str:
    """Write a measured value with as many places as mean something."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _device() -> str:
    gpus = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    for line in gpus[0].read_text().splitlines() if gpus else ():
        if line.startswith("Model:"):
            return line.partition(":")[2].strip()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
