"""A job's output, on disk and bounded: its beginning and its end, however much was printed."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path

HEAD = 1 << 20
TAIL = 1 << 20
SHOWN_LINES = 60
SHOWN_CHARACTERS = 8000
KEPT_LOGS = 20


class LogSink:
    """Write what comes out of a job to `path`: the first MiB at once, the last at `finish`."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_old(path.parent)
        self.path = path
        self._file = path.open("wb", buffering=0)
        self._written = 0
        self._tail: deque[bytes] = deque()
        self._tail_size = 0
        self._left_out = 0

    def write(self, data: bytes) -> None:
        room = HEAD - self._written
        if room > 0:
            self._written += len(data[:room])
            self._put(data[:room])
            data = data[room:]
        if data:
            self._tail.append(data)
            self._tail_size += len(data)
            while self._tail_size - len(self._tail[0]) >= TAIL:
                dropped = len(self._tail.popleft())
                self._tail_size -= dropped
                self._left_out += dropped

    def finish(self) -> str:
        """Write the end, close the file and return the last lines as text."""
        if self._left_out:
            self._put(f"\n[portkit left out {self._left_out:,} bytes here]\n".encode())
        for chunk in self._tail:
            self._put(chunk)
        self._file.close()
        return last_lines(self.path)

    def _put(self, data: bytes) -> None:
        try:
            self._file.write(data)
        except OSError:  # A full disk must not take the worker, nor the job, with it.
            self._left_out += len(data)


def last_lines(path: Path) -> str:
    """Return the end of a log as a reader wants to see it, without a progress bar's redrawings."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - 4 * SHOWN_CHARACTERS))
            text = stream.read().decode(errors="replace")
    except OSError:
        return ""
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return "\n".join(lines[-SHOWN_LINES:]).strip("\n")[-SHOWN_CHARACTERS:]


def _remove_old(folder: Path) -> None:
    logs = sorted(folder.glob("*.log"), key=lambda p: p.stat().st_mtime)
    for log in logs[: max(0, len(logs) - KEPT_LOGS + 1)]:
        log.unlink(missing_ok=True)
