"""The worker: a fork server that has everything imported, and forks one process per job.

Started by client.py as `python -m portkit.live.server`. It imports torch, Transformers, vLLM and
what an engine start imports (preload.py), runs no torch operation and does not initialise CUDA:
it must stay one thread, since a fork takes only one thread along. Each job is then a fork that
starts warm in milliseconds, and whatever the reader's code does there ends with that process.

The kernel sends a socket per job (and closes it to stop the job). When the kernel is gone, however
it went, the control socket ends, and the worker ends with every process below it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import time
from typing import Any

from portkit.errors import PortkitError
from portkit.live import processes, wire
from portkit.live.failure import describe
from portkit.live.forked_job import ForkedJob

TICK = 0.05
"""Seconds between looks at a running job's clock, memory and exit."""
LEAVING_TICK = 0.005
"""The same for a job that has answered: its result waits for its end."""
IDLE_TICK = 1.0


class Server:
    """One worker process: the control socket, and the jobs that run."""

    def __init__(self, control: socket.socket, parent: int) -> None:
        self.control = control
        self.parent = parent
        self.device = ("", "")
        self.jobs: dict[int, ForkedJob] = {}
        self.selector = selectors.DefaultSelector()

    def tell(self, event: str, **values: Any) -> None:
        with contextlib.suppress(OSError):
            self.control.sendall(wire.encode({"event": event, **values}))

    def prepare(self, modules: tuple[str, ...]) -> bool:
        """Import what jobs will need; False (and the reason told) if that fails."""
        started = time.monotonic()
        signal.signal(signal.SIGALRM, lambda *_: self._leave_if_alone())
        signal.siginterrupt(signal.SIGALRM, False)
        signal.setitimer(signal.ITIMER_REAL, 1.0, 1.0)
        try:
            for module in modules:
                self.tell("importing", module=module)
                importlib.import_module(module)
            if "vllm" in sys.modules:
                from portkit.live.device import find_device
                from portkit.live.preload import warm

                self.device = find_device()
                warm()
            else:
                self.device = ("cpu", "this worker was started without vLLM")
        except BaseException as error:
            import traceback

            traceback.print_exc()
            words = describe(error, "")
            if not isinstance(error, PortkitError):
                words |= {
                    "what": f"The worker could not import what it needs: {words['what']}",
                    "where": f"import {module}",
                    "next": "Run `portkit doctor`; `make setup` repairs the environment.",
                }
            self.tell("failed", **words)
            return False
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        gc.collect()
        gc.freeze()  # A job's garbage collector leaves these pages alone, so they stay shared.
        self.tell(
            "ready",
            pid=os.getpid(),
            threads=processes.thread_count(),
            device=self.device[0],
            device_reason=self.device[1],
            seconds=time.monotonic() - started,
            memory_mib=processes.resident_mib(os.getpid()),
        )
        return True

    def serve(self) -> None:
        """Fork jobs until the kernel is gone."""
        self.selector.register(self.control, selectors.EVENT_READ, self._from_kernel)
        try:
            while True:
                for key, _ in self.selector.select(self._tick()):
                    key.data()
                for pid, job in list(self.jobs.items()):
                    if job.look():
                        del self.jobs[pid]
                if not self.jobs:
                    self._reap_orphans()
                self._leave_if_alone()
        finally:
            self.stop()

    def _tick(self) -> float:
        if not self.jobs:
            return IDLE_TICK
        return LEAVING_TICK if any(job.answered_at for job in self.jobs.values()) else TICK

    def stop(self) -> None:
        for job in self.jobs.values():
            processes.kill_tree(job.pid)
        self._reap_orphans()

    def _from_kernel(self) -> None:
        data, fds, _, _ = socket.recv_fds(self.control, 1, 8)
        if not data:
            raise SystemExit(0)
        for fd in fds:
            job = ForkedJob.start(
                socket.socket(fileno=fd), self.selector, self.device, self._close_in_child
            )
            if job is not None:
                self.jobs[job.pid] = job

    def _close_in_child(self) -> None:
        self.control.close()
        self.selector.close()
        for job in self.jobs.values():
            job.close()

    def _leave_if_alone(self) -> None:
        """End when the kernel died without closing the socket (a fork of it may hold it open)."""
        if os.getppid() != self.parent:
            raise SystemExit(0)

    def _reap_orphans(self) -> None:
        """End and reap what a finished job left behind; this process adopted it."""
        for orphan in processes.children(os.getpid()):
            processes.kill_tree(orphan)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--control", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--preload", type=json.loads, default=[])
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    for stream in (sys.stdout, sys.stderr):  # inherited by every job, whose last words count
        stream.reconfigure(line_buffering=True, errors="backslashreplace")
    processes.adopt_orphans()
    server = Server(socket.socket(fileno=options.control), options.parent)
    server.tell("started", pid=os.getpid())
    if server.prepare(tuple(options.preload)):
        server.serve()


if __name__ == "__main__":
    main()
