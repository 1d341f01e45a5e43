"""The kernel's hold on the worker process: start it, see that it is ready, end it.

A process has at most one worker for each list of modules to import; the handles of all ports
share it, so a second port costs no second import of vLLM.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from portkit.errors import PortkitError
from portkit.live import processes, wire
from portkit.live.environment import WATCHED, require_vllm, worker_environment
from portkit.live.log import last_lines

START_SECONDS = 180.0
"""The first start on a cold disk reads 2 GB of libraries."""
LEAVE_SECONDS = 5.0

_workers: weakref.WeakSet[Worker] = weakref.WeakSet()
_lock = threading.RLock()


class WorkerError(PortkitError):
    """The worker could not start; `log` is what it wrote."""

    def __init__(self, what: str, where: str, next: str, log: str = "") -> None:
        super().__init__(what, where, next)
        self.log = log


class Worker:
    """One worker process."""

    def __init__(self, preload: tuple[str, ...]) -> None:
        self.preload = preload
        self.device = ("", "")
        self.ready: dict[str, Any] = {}
        """What the worker said when ready: pid, threads, seconds, memory_mib."""
        self._holders: set[object] = set()
        self._starting = threading.Lock()
        self._watched = _watched()
        self._owner = os.getpid()
        handle, name = tempfile.mkstemp(prefix="portkit-worker-", suffix=".log")
        self._log = Path(name)
        self._control, theirs = socket.socketpair()
        self._lines = wire.Lines(self._control)
        with os.fdopen(handle, "wb") as output, theirs:
            # -P: a port's folder may be the current one, and must not be searched for the worker's
            # own imports.
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "portkit.live.server",
                    "--control",
                    str(theirs.fileno()),
                    "--parent",
                    str(os.getpid()),
                    "--preload",
                    json.dumps(preload),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                env=_environment(),
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_for_exit(self, seconds: float = 0.5) -> int | None:
        """Return how the worker ended, negative for a signal, or None if it still lives."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def usable(self) -> bool:
        return (
            self._owner == os.getpid()
            and self._watched == _watched()
            and self._process.poll() is None
        )

    def wait_until_ready(self, say: Callable[[str], None]) -> None:
        """Return when the worker has imported everything; PortkitError if it cannot."""
        with self._starting:
            if self.ready:
                return
            say("starting the worker (imports torch and vLLM once; later jobs start at once)")
            until = time.monotonic() + START_SECONDS
            while not self._lines.closed and time.monotonic() < until:
                self._control.settimeout(max(0.1, until - time.monotonic()))
                for message in self._lines.receive():
                    if message["event"] == "importing":
                        say(f"importing {message['module']}")
                    elif message["event"] == "failed":
                        self._fail(message["what"], message["where"], message["next"])
                    elif message["event"] == "ready":
                        self.device = (message["device"], message["device_reason"])
                        self.ready = message
                        self._control.settimeout(None)
                        return
            self._fail(
                "The worker ended while it imported vLLM."
                if self._lines.closed
                else f"The worker was not ready after {START_SECONDS:.0f} s.",
                "portkit.live.server",
                "Run it again; if it fails again, `portkit doctor` looks for the reason.",
            )

    def give(self, job: socket.socket) -> None:
        """Hand the worker its end of a job's socket."""
        with _lock:
            socket.send_fds(self._control, [b"j"], [job.fileno()])

    def hold(self, holder: object) -> None:
        with _lock:
            self._holders.add(holder)

    def release(self, holder: object) -> None:
        """End the worker with its last holder."""
        with _lock:
            self._holders.discard(holder)
            last = not self._holders
        if last:
            self.close()

    def close(self) -> None:
        """End the worker and everything below it, and wait for that."""
        if self._owner != os.getpid():
            self._control.close()
            return
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait(LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
        self._control.close()
        self._log.unlink(missing_ok=True)

    def kill(self) -> None:
        """End the worker at once, with all that runs below it."""
        if self._owner == os.getpid() and self._process.poll() is None:
            below = processes.descendants(self.pid)
            self._process.send_signal(signal.SIGKILL)
            for process in below:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(process, signal.SIGKILL)
            self._process.wait()
        self._log.unlink(missing_ok=True)

    def log_tail(self) -> str:
        return last_lines(self._log)

    def _fail(self, what: str, where: str, next: str) -> None:
        tail = self.log_tail()
        self.kill()
        raise WorkerError(what, where, next, tail)

    def drop_in_fork(self) -> None:
        """In a fork of the kernel: let go of the socket, so that the worker sees the kernel end."""
        with contextlib.suppress(OSError):
            self._control.close()


def shared_worker(preload: tuple[str, ...] | None) -> Worker:
    """Return this process's worker for these modules (None: all that a job with vLLM needs)."""
    if preload is None:
        from portkit.live.preload import MODULES

        try:
            require_vllm()
        except PortkitError as error:
            raise WorkerError(**error.to_dict()) from None
        preload = MODULES
    with _lock:
        for worker in _workers:
            if worker.preload == preload and worker.usable():
                return worker
        worker = Worker(preload)
        _workers.add(worker)
        return worker


def _watched() -> tuple[str | None, ...]:
    return tuple(os.environ.get(name) for name in WATCHED)


def _environment() -> dict[str, str]:
    environment = worker_environment()
    # With -P the worker finds portkit where the kernel found it, installed or not.
    package = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (package, environment.get("PYTHONPATH")))
    )
    return environment


def _in_fork() -> None:
    for worker in list(_workers):
        worker.drop_in_fork()


os.register_at_fork(after_in_child=_in_fork)
