"""What crosses the pipe between the kernel and the worker: plain values, JSON only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

JobStatus = Literal["ok", "error", "crashed", "timeout", "interrupted"]


@dataclass(frozen=True)
class JobRequest:
    """One job for the worker."""

    job: str
    """Module name under portkit.live.jobs; its `run(request, say)` returns a JSON-able dict."""
    port_root: str
    """Absolute path of the port folder; empty for jobs that need none."""
    args: dict[str, Any] = field(default_factory=dict)
    timeout: float = 300.0


@dataclass(frozen=True)
class JobResult:
    """How a job ended. `value` is the job's answer if status is "ok", else empty."""

    job: str
    status: JobStatus
    value: dict[str, Any] = field(default_factory=dict)
    what: str = ""
    """For anything but "ok": the error in words, e.g. "ValueError: Duplicate layer name: ..."."""
    where: str = ""
    """The last frame inside the port's own file ("modeling_helium.py:142, in forward"), if any."""
    next: str = ""
    log: str = ""
    """Path of the log on disk: the first and the last MiB of what the job printed."""
    log_tail: str = ""
    """Last lines of the child's stdout and stderr, with the traceback."""
    seconds: float = 0.0
    device: str = ""
    device_reason: str = ""
    peak_memory_mib: float = 0.0
    """Peak resident memory of the job's process on this machine, in MiB."""

    @property
    def ok(self) -> bool:
        return self.status == "ok"
