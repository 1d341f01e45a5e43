"""The kernel's side of the worker: give it a job, get back a frozen result.

Imports neither torch nor vLLM. One worker process serves every port of a kernel; a `Live` is one
port's handle on it. The worker starts with the first job and ends with the last open `Live`, or
with the kernel, however that ends. Nothing that happens in a job raises here: it becomes a
JobResult. Only what the kernel itself is told to do (KeyboardInterrupt, an exception of the
progress callback) passes through, after the job was stopped.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portkit.atomic import cannot_write
from portkit.errors import PortkitError
from portkit.live import processes, wire
from portkit.live.job import JobRequest, JobResult
from portkit.live.outcome import result_of, worker_gone
from portkit.live.worker import Worker, WorkerError, shared_worker

if TYPE_CHECKING:
    from portkit.port import Port

STOP_SECONDS = 10.0
"""How long the worker may take to end a job it was told to stop; then the worker is ended too."""
GRACE_SECONDS = 20.0
"""Added to a job's timeout before the kernel gives up on the worker itself."""


class Live:
    """One port's handle on the worker. Jobs of one handle run one after the other."""

    def __init__(self, root: Path | None, preload: tuple[str, ...] | None = None) -> None:
        self.root = root
        self._preload = preload
        self._turn = threading.Lock()
        self._holder = 0
        self._job: socket.socket | None = None
        self._worker: Worker | None = None
        self._count = 0

    def run(
        self,
        job: str,
        *,
        timeout: float = 300.0,
        progress: Callable[[str], None] | None = None,
        max_memory_mib: float | None = None,
        **args: Any,
    ) -> JobResult:
        """Run `portkit.live.jobs.<job>` in a fresh process and return how it ended.

        `timeout` (seconds) counts from the fork, not from the worker's start. `progress` is called
        in this thread with what the job says. A job whose processes together pass
        `max_memory_mib` (default: nine tenths of what the machine can give when it starts) is
        ended. `args` are plain values, in the job's `request.args`.
        """
        say = progress or (lambda text: None)
        if self._holder == threading.get_ident():
            raise PortkitError(
                f"The job {job!r} was started from the progress callback of another one.",
                "Live.run",
                "Start it after the first one's result is there.",
            )
        with self._turn:
            self._holder = threading.get_ident()
            try:
                request = JobRequest(job, str(self.root or ""), args, timeout)
                log = self._log_path(job)
                try:
                    log.parent.mkdir(parents=True, exist_ok=True)
                    log.touch()
                except OSError as error:  # the worker could not tell: its words go there
                    return JobResult(job, "error", **cannot_write(log, error).to_dict())
                try:
                    worker = self._ready(say)
                except WorkerError as error:
                    return JobResult(job, "error", log_tail=error.log, **error.to_dict())
                result = self._converse(worker, request, log, say, max_memory_mib)
                return replace(result, device=worker.device[0], device_reason=worker.device[1])
            finally:
                self._holder = 0

    def device(self) -> tuple[str, str]:
        """Return ("cpu" or "cuda", why); starts the worker. PortkitError if it cannot start."""
        return self._ready(lambda text: None).device

    def close(self) -> None:
        """Stop what runs; the worker ends with the last open handle. A later `run` starts one."""
        job = self._job
        if job is not None:
            with contextlib.suppress(OSError):
                job.sendall(wire.encode({"op": "stop"}))
            if self._holder != threading.get_ident():
                with self._turn:
                    pass
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.release(self)

    def __enter__(self) -> Live:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- one job ----------------------------------------------------------------------------

    def _ready(self, say: Callable[[str], None]) -> Worker:
        worker = self._worker
        if worker is None or not worker.usable():
            if worker is not None:
                worker.release(self)
            worker = self._worker = shared_worker(self._preload)
            worker.hold(self)
        worker.wait_until_ready(say)
        return worker

    def _log_path(self, job: str) -> Path:
        base = (
            self.root / ".portkit"
            if self.root
            else Path(tempfile.gettempdir()) / f"portkit-{os.getuid()}"
        )
        self._count += 1
        return (
            base
            / "logs"
            / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{self._count}-{job}.log"
        )

    def _converse(
        self,
        worker: Worker,
        request: JobRequest,
        log: Path,
        say: Callable[[str], None],
        max_memory_mib: float | None,
    ) -> JobResult:
        order = wire.encode(
            {
                "request": asdict(request),
                "log": str(log),
                "limit_mib": max_memory_mib,
                "environment": dict(os.environ),
            }
        )
        ours, theirs = socket.socketpair()
        heard: dict[str, dict[str, Any]] = {}
        try:
            self._job = ours
            worker.give(theirs)
            theirs.close()
            ours.sendall(order)
            self._listen(ours, heard, say, time.monotonic() + request.timeout + GRACE_SECONDS)
        except OSError:
            pass  # The worker is gone: `heard` lacks "done".
        except BaseException:
            self._stop(worker, ours, heard)
            raise
        finally:
            self._job = None
            theirs.close()
            ours.close()
        if "done" not in heard:
            result = worker_gone(request, log, worker)
            worker.kill()
            if "forked" in heard:
                processes.kill_tree(heard["forked"]["pid"])
            return result
        return result_of(request, heard, log)

    def _listen(
        self,
        job: socket.socket,
        heard: dict[str, dict[str, Any]],
        say: Callable[[str], None],
        until: float,
    ) -> None:
        """Read what the worker says until the job is done, the worker gone or the time up."""
        lines = wire.Lines(job)
        while "done" not in heard and not lines.closed:
            job.settimeout(max(0.1, until - time.monotonic()))
            messages = lines.receive()
            for message in messages:
                if message["event"] == "progress":
                    say(message["text"])
                else:
                    heard[message["event"]] = message
            if not messages and time.monotonic() > until:
                break

    def _stop(self, worker: Worker, job: socket.socket, heard: dict[str, dict[str, Any]]) -> None:
        """End the job's processes, and make sure of it, before an interrupt goes on."""
        try:
            job.sendall(wire.encode({"op": "stop"}))
            self._listen(job, heard, lambda text: None, time.monotonic() + STOP_SECONDS)
        except OSError:
            pass
        except BaseException:  # Interrupted once more: no more waiting.
            worker.kill()
            raise
        if "done" not in heard:
            worker.kill()


_lives: dict[str, Live] = {}
_lives_lock = threading.Lock()


def live_for(port: Port | Path | None) -> Live:
    """Return this process's handle for a port (None: for jobs without one), always the same one."""
    root = port if isinstance(port, (Path, type(None))) else port.root
    key = str(Path(root).resolve()) if root else ""
    with _lives_lock:
        if key not in _lives:
            _lives[key] = Live(Path(key) if key else None)
        return _lives[key]


def close_all() -> None:
    """Close every handle and so end the worker; also done when the process exits."""
    with _lives_lock:
        lives = list(_lives.values())
    for live in lives:
        live.close()


atexit.register(close_all)
os.register_at_fork(after_in_child=_lives.clear)
