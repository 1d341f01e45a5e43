"""JSON lines over a socket: what the kernel, the worker and a job's process say to each other.

Not stdout: the reader's code may print anything it likes. A message is one line with an "event"
(or, towards the worker, an "op") and plain values; a line that a killed process wrote in part is
dropped with it.
"""

from __future__ import annotations

import json
import socket
from typing import Any

CHUNK = 1 << 16


def plain(value: Any) -> Any:
    """Turn numpy and torch scalars and arrays, paths and tuples into what JSON can hold."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "__fspath__"):
        return str(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"a job's answer must be plain values, not {type(value).__name__}")


def encode(message: dict[str, Any]) -> bytes:
    """Return the message as one line; TypeError if it holds something JSON cannot."""
    return json.dumps(message, default=plain).encode() + b"\n"


class Lines:
    """Messages out of a socket, whole lines at a time."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.closed = False
        self._pending = b""

    def receive(self) -> list[dict[str, Any]]:
        """Read what is there (blocking as the socket does); `closed` is set at its end."""
        try:
            data = self.connection.recv(CHUNK)
        except (BlockingIOError, InterruptedError, TimeoutError):
            return []
        except OSError:
            data = b""
        if not data:
            self.closed = True
        *whole, self._pending = (self._pending + data).split(b"\n")
        return [json.loads(line) for line in whole if line]
