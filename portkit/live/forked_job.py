"""The worker's side of one job: fork it, carry its words, watch its time and memory, end it."""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from portkit.live import child, processes, wire
from portkit.live.job import JobRequest
from portkit.live.log import LogSink

MEMORY_TICK = 0.1
MOST_THREADS = 4096 + 64 * (os.cpu_count() or 1)
"""Of all processes of a job together. Eight ranks have some hundred; beyond this, a loop starts
them, and soon nobody else on the machine could start one."""
DUMP_SECONDS = 1.0
"""How long a job that ran out of time may take to write where it is."""
LEAVE_SECONDS = 2.0
"""How long a job that has answered may take to end by itself."""
HEARING_SECONDS = 30.0
"""How long the kernel may take to read what a job says; then it is taken for gone."""
ORDER_SECONDS = 5.0
"""How long the kernel may take to send the order after the socket."""


class ForkedJob:
    """A job that runs. `look` is called often and returns True when all is over and told."""

    def __init__(
        self,
        pid: int,
        request: JobRequest,
        kernel: socket.socket,
        answer: socket.socket,
        output: int,
        stack: Path,
        scratch: Path,
        log: LogSink,
        selector: selectors.BaseSelector,
        limit_mib: float,
    ) -> None:
        self.pid = pid
        self.request = request
        self.kernel = kernel
        self.answer = answer
        self.output = output
        self.stack = stack
        self.scratch = scratch
        self.log = log
        self.selector = selector
        self.limit_mib = limit_mib
        self.started = time.monotonic()
        self.started_at = time.time()
        self.inherited_mib = processes.resident_mib(os.getpid())
        self.peak_mib = 0.0
        self.cause = ""
        self.answered_at = 0.0
        self._lines = wire.Lines(answer)
        self._memory_seen = 0.0
        self._seen: set[int] = set()
        self._segments: set[Path] = set()
        kernel.settimeout(HEARING_SECONDS)
        answer.setblocking(False)
        os.set_blocking(output, False)
        selector.register(kernel, selectors.EVENT_READ, self._from_kernel)
        selector.register(answer, selectors.EVENT_READ, self._from_job)
        selector.register(output, selectors.EVENT_READ, self._from_output)

    @classmethod
    def start(
        cls,
        kernel: socket.socket,
        selector: selectors.BaseSelector,
        device: tuple[str, str],
        close_in_child: Callable[[], None],
    ) -> ForkedJob | None:
        """Read the order from the kernel's socket and fork; None if the kernel has left."""
        order = _read_order(kernel)
        if order is None:
            kernel.close()
            return None
        request = JobRequest(**order["request"])
        scratch = Path(tempfile.mkdtemp(prefix="portkit-"))
        stack = scratch.with_name(scratch.name + ".stack")
        log = LogSink(Path(order["log"]))
        ours, theirs = socket.socketpair()
        output, output_end = os.pipe()
        os.environ["PORTKIT_JOB_DEVICE"] = device[0]
        worker = os.getpid()
        pid = os.fork()
        if pid == 0:
            processes.die_with_parent(worker)
            os.setsid()
            stack_fd = os.open(stack, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            null = os.open(os.devnull, os.O_RDONLY)
            for source, target in ((null, 0), (output_end, 1), (output_end, 2)):
                os.dup2(source, target)
            for fd in (null, output, output_end, log._file.fileno()):
                os.close(fd)
            ours.close()
            kernel.close()
            close_in_child()
            child.run_forked(request, theirs, stack_fd, scratch, order["environment"])
        theirs.close()
        os.close(output_end)
        limit = order["limit_mib"] or 0.9 * processes.available_mib()
        job = cls(pid, request, kernel, ours, output, stack, scratch, log, selector, limit)
        job._tell("forked", pid=pid, threads=processes.thread_count())
        return job

    def close(self) -> None:
        """Close this job's descriptors in another fork."""
        self.kernel.close()
        self.answer.close()
        os.close(self.output)
        self.log._file.close()

    # ---- what comes in ----------------------------------------------------------------------

    def _from_kernel(self) -> None:
        """Anything from the kernel, its leaving included, means: stop."""
        self.cause = self.cause or "interrupted"
        self.selector.unregister(self.kernel)

    def _from_job(self) -> None:
        for message in self._lines.receive():
            if message["event"] in ("answer", "error"):
                self.answered_at = time.monotonic()
            self._tell(**message)
        if self._lines.closed:
            self._forget(self.answer)

    def _from_output(self) -> None:
        with contextlib.suppress(BlockingIOError):
            data = os.read(self.output, 1 << 16)
            if data:
                self.log.write(data)
            else:
                self._forget(self.output)

    # ---- the clock --------------------------------------------------------------------------

    def look(self) -> bool:
        """Watch time, memory and exit once; True when the job is over and the kernel told.

        Called between messages: a job that has just answered has a moment to leave by itself.
        """
        now = time.monotonic()
        if now - self._memory_seen > MEMORY_TICK:
            self._memory_seen = now
            below = processes.descendants(self.pid)
            self._seen.update(below)
            if below:
                self._segments |= processes.shared_segments(
                    (self.pid, *below), self.started_at, self._segments
                )
            memory = processes.memory_mib((self.pid, *below), self.inherited_mib)
            self.peak_mib = max(self.peak_mib, memory)
            if memory > self.limit_mib and not self.answered_at:
                self.cause = self.cause or "memory"
            if processes.threads_of((self.pid, *below)) > MOST_THREADS and not self.answered_at:
                self.cause = self.cause or "threads"
        if not self.cause and not self.answered_at and now - self.started > self.request.timeout:
            self.cause = "timeout"
        if self.cause in ("timeout", "memory", "threads"):
            self._ask_for_stacks()
        if self.cause or (self.answered_at and now - self.answered_at > LEAVE_SECONDS):
            processes.kill_tree(self.pid)
        waited, status, usage = os.wait4(self.pid, 0 if self.cause else os.WNOHANG)
        if not waited:
            return False
        self._finish(os.waitstatus_to_exitcode(status), usage.ru_maxrss / 1024)
        return True

    def _ask_for_stacks(self) -> None:
        """Have every process of the job write its stack, and wait for that while it still grows.

        Ranks first: when one of them hangs, the job's own process only waits for it. Of too many
        threads or processes only the job's own main thread is asked.
        """
        ranks = reversed(processes.descendants(self.pid))
        one = self.cause == "threads"
        for process in (*(() if one else ranks), self.pid):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if one:
                    processes.signal_main_thread(process, child.DUMP_ONE_SIGNAL)
                else:
                    os.kill(process, child.DUMP_SIGNAL)
                time.sleep(0.05)
        end, size = time.monotonic() + DUMP_SECONDS, -1
        while time.monotonic() < end:
            time.sleep(0.1)
            now = self.stack.stat().st_size if self.stack.exists() else 0
            if now and now == size:
                break
            size = now

    def _finish(self, exit_code: int, maxrss_mib: float) -> None:
        processes.kill_group(self.pid)
        processes.kill_adopted(self._seen)
        with contextlib.suppress(BlockingIOError, OSError):
            while data := os.read(self.output, 1 << 16):
                self.log.write(data)
        while self.answer in self.selector.get_map():
            before = self.answered_at, self._lines.closed
            self._from_job()
            if (self.answered_at, self._lines.closed) == before:
                break
        stack = self.stack.read_text(errors="replace") if self.stack.exists() else ""
        if stack:
            self.log.write(b"\n" + stack[:100_000].encode())
        tail = self.log.finish()
        self.stack.unlink(missing_ok=True)
        shutil.rmtree(self.scratch, ignore_errors=True)
        for segment in self._segments:
            segment.unlink(missing_ok=True)
        for channel in (self.kernel, self.answer, self.output):
            self._forget(channel)
        self._tell(
            "done",
            exit_code=exit_code,
            cause=self.cause,
            stack=stack[:100_000],
            log_tail=tail,
            seconds=time.monotonic() - self.started,
            peak_mib=max(self.peak_mib, maxrss_mib),
            limit_mib=self.limit_mib,
            machine_mib=processes.machine_mib(),
        )
        self.kernel.close()
        self.answer.close()
        os.close(self.output)

    def _forget(self, channel: Any) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self.selector.unregister(channel)

    def _tell(self, event: str, **values: Any) -> None:
        try:
            self.kernel.sendall(wire.encode({"event": event, **values}))
        except OSError:
            self.cause = self.cause or "interrupted"


def _read_order(kernel: socket.socket) -> dict[str, Any] | None:
    kernel.settimeout(ORDER_SECONDS)
    lines = wire.Lines(kernel)
    end = time.monotonic() + ORDER_SECONDS
    while not lines.closed and time.monotonic() < end:
        for order in lines.receive():
            return order
    return None
