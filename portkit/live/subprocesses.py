"""Programs that a job starts as a user would: a fresh interpreter, `vllm serve`, pytest.

They stay in the job's process group, so that stopping the job stops them.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from portkit.errors import PortkitError
from portkit.live.environment import JOBS_OWN, readers_environment

SCRIPTS = Path(__file__).parent / "scripts"
INHERITED_DROP = (
    "VLLM_ENABLE_V1_MULTIPROCESSING",
    "VLLM_WORKER_MULTIPROC_METHOD",
    "VLLM_PLUGINS",
    "TQDM_DISABLE",
)
"""Settings of the worker that a user's own process would not have."""


def user_environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a process that a user starts, plus `extra`.

    A PYTHONPATH in `extra` goes before the user's own.
    """
    kept = {k: v for k, v in os.environ.items() if k not in INHERITED_DROP + JOBS_OWN}
    # With the job's own PYTHONPATH the port would be importable without being installed.
    own = {k: v for k, v in readers_environment().items() if k in JOBS_OWN}
    extra = dict(extra or {})
    if "PYTHONPATH" in extra and own.get("PYTHONPATH"):
        extra["PYTHONPATH"] += os.pathsep + own["PYTHONPATH"]
    return {**kept, **own, "PYTHONUNBUFFERED": "1", **extra}


def run_script(
    python: str, script: str, request: dict[str, Any], *, cwd: Path, environment: dict[str, str]
) -> dict[str, Any]:
    """Run scripts/<script> in a fresh interpreter and return the value it answers with.

    Raises PortkitError with the last line of its error if it does not answer.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".json") as stream:
        json.dump(request, stream)
        stream.flush()
        done = subprocess.run(
            [python, str(SCRIPTS / script), stream.name],
            cwd=cwd,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    print(done.stdout)  # into the job's log
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    raise PortkitError(
        f"A fresh process failed (exit {done.returncode}): {last_error(done.stdout)}",
        script,
        "The whole output is in the job's log, under .portkit/logs of the port.",
    )


def last_error(output: str) -> str:
    """Return the line of a program's output that says what went wrong: the deepest exception."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    named = [line for line in lines if _is_error(line)]
    # The engine's own wrapper says only "see root cause above": prefer what stands above it.
    roots = [line for line in named if "root cause" not in line.lower()]
    return (roots or named or lines or ["no output"])[-1][:500]


def _is_error(line: str) -> bool:
    head = line.split(":", 1)[0].split(" ")[-1]
    return ":" in line and (
        head.endswith(("Error", "Exception", "Interrupt")) or head == "pydantic_core"
    )


def free_port() -> int:
    """Return a TCP port on the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def server(
    command: list[str],
    port: int,
    *,
    cwd: Path,
    environment: dict[str, str],
    log: Path,
    say: Callable[[str], None],
    timeout: float,
) -> Iterator[str]:
    """Run a server until the block ends; yield its base URL once `/health` answers.

    Raises PortkitError with the server's own error if it exits, or is not up in `timeout` seconds.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=stream, stderr=subprocess.STDOUT
        )
        base, began = f"http://127.0.0.1:{port}", time.monotonic()
        try:
            while not _healthy(base):
                spent = time.monotonic() - began
                if process.poll() is not None:
                    raise PortkitError(
                        f"The server stopped (exit {process.returncode}): "
                        f"{last_error(log.read_text())}",
                        str(log),
                        "Read its log there.",
                    )
                if spent > timeout:
                    raise PortkitError(
                        f"The server was not up after {spent:.0f} s.",
                        str(log),
                        "Read its log there.",
                    )
                if int(spent) % 10 == 0:
                    say(f"waiting for the server ({spent:.0f} s)")
                time.sleep(1)
            yield base
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _healthy(base: str) -> bool:
    try:
        with urllib.request.urlopen(f"{base}/health", timeout=2) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False
