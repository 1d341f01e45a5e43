"""Run pip so that a person sees it move, and knows what to do when it fails."""

from __future__ import annotations

import os
import queue
import subprocess
import threading
import time
from pathlib import Path

from machine import SetupError

EVERY = 10.0
"""Seconds between two progress lines."""

NO_SUCH_RELEASE = (
    "No matching distribution found",
    "Could not find a version that satisfies",
    "ResolutionImpossible",  # pip's words for the same where the user's configuration constrains it
)
LOCKED_RELEASE_MISSING = "the package index does not have a locked release"
NETWORK = (
    "Failed to establish a new connection",
    "Temporary failure in name resolution",
    "Name or service not known",
    "Network is unreachable",
    "NewConnectionError",
    "NameResolutionError",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "Read timed out",
    "ProxyError",
)
CAUSES = (
    (
        ("No space left on device", "Errno 28", "Disk quota exceeded"),
        "the disk is full",
        "make room (pip also unpacks to $TMPDIR and keeps a cache: pip cache purge), then again",
    ),
    (
        ("CERTIFICATE_VERIFY_FAILED",),
        "the package index's certificate is not trusted",
        "behind a company proxy, name its certificate: export PIP_CERT=/path/to/ca.pem",
    ),
    (
        NETWORK,
        "the package index cannot be reached",
        "check the network, or the proxy (https_proxy) and index (pip config list), then again:"
        " what was fetched is kept",
    ),
    (
        ("THESE PACKAGES DO NOT MATCH THE HASHES", "WrongHash"),
        "a downloaded file is not the expected one",
        "empty pip's cache (pip cache purge), then again; is the index a mirror?",
    ),
    (
        ("Permission denied", "Errno 13"),
        "a file may not be written",
        "make the folder yours (sudo chown -R $USER .), then again",
    ),
    (
        NO_SUCH_RELEASE,
        LOCKED_RELEASE_MISSING,
        "look at pip config list: a mirror or a constraint may hide it",
    ),
)


def diagnose(output: str) -> tuple:
    """Return (what, next) for a failed pip run, from what it printed."""
    for signs, what, remedy in CAUSES:
        if any(sign in output for sign in signs):
            return what, remedy
    return "pip failed", "read the log; then again"


def complaint(output: str) -> str:
    """Return pip's own words on a failure: its ERROR lines, or its last ones."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("ERROR", "error"))]
    return "\n".join("       " + line[:300] for line in (errors or lines)[-4:])


def pip_environment(env: dict) -> dict:
    """Return the environment for pip: the user's index and proxy, not their --user or --target."""
    kept = {k: v for k, v in env.items() if k not in ("PIP_TARGET", "PIP_PREFIX", "PYTHONPATH")}
    return {**kept, "PIP_USER": "0", "PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def run(command: list, log: Path, say) -> tuple:
    """Run a command with its output in the log; return (exit status, output), telling progress."""
    lines: queue.Queue = queue.Queue()
    output, seen, last = [], 0, time.monotonic()
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(command)}\n")
        child = subprocess.Popen(
            command,
            env=pip_environment(dict(os.environ)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        )

        def read() -> None:
            for line in child.stdout:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        doing = "starting"
        try:
            while True:
                try:
                    line = lines.get(timeout=1)
                except queue.Empty:
                    line = ""
                if line is None:
                    break
                if line:
                    file.write(line)
                    output.append(line)
                if line.startswith(("Collecting ", "Requirement already satisfied: ")):
                    seen += 1
                    doing = f"{seen} packages looked up or fetched, now {package_in(line)}"
                elif line.startswith("Installing collected packages"):
                    doing = f"unpacking {line.count(',') + 1} packages"
                if time.monotonic() - last > EVERY:
                    last = time.monotonic()
                    say(f"  … {doing}")
        finally:
            if child.poll() is None:
                try:
                    child.wait(timeout=5)
                except subprocess.TimeoutExpired:
                    child.terminate()
        return child.wait(), "".join(output)


def package_in(line: str) -> str:
    """Return the package that a line of pip's is about."""
    return line.replace("Requirement already satisfied: ", "").replace("Collecting ", "").split()[0]


def pip(python: Path, args: list, log: Path, say) -> None:
    """Run pip; a failure becomes a SetupError that names the cause."""
    status, output = run([str(python), "-m", "pip", *args], log, say)
    if status:
        what, remedy = diagnose(output)
        raise SetupError(f"{what} (pip ended with {status})\n{complaint(output)}", str(log), remedy)


def install_torch(python: Path, pin: str, index: str, log: Path, say) -> None:
    """Install the CPU build of torch: from the user's own index if it has it, else from PyTorch's.

    PyPI has no `+cpu` builds. PyTorch's index is asked for torch alone, not for every package.
    """
    status, output = run([str(python), "-m", "pip", "install", "--no-deps", pin], log, say)
    what, remedy = diagnose(output)
    if status and what == LOCKED_RELEASE_MISSING:
        say(f"{pin} is not in your pip's index: asking {index}")
        pip(python, ["install", "--no-deps", "--index-url", index, pin], log, say)
    elif status:
        raise SetupError(f"{what} ({pin})\n{complaint(output)}", str(log), remedy)
