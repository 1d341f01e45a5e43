"""git for a port: the same answers whatever the reader's own git settings are, and after a kill.

portkit's commits are its undo history, so nothing of the reader's global configuration (hooks,
templates, signing, line ends, ignore files) may change or stop them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from portkit.errors import PortkitError

SETTINGS = {
    "user.name": "portkit",
    "user.email": "portkit@localhost",
    "commit.gpgsign": "false",
    "core.hooksPath": os.devnull,
    "core.autocrlf": "false",
    "core.quotePath": "false",
    "core.fsmonitor": "false",
    "gc.auto": "0",  # no background process that outlives the command
    "maintenance.auto": "false",
    "advice.addIgnoredFile": "false",
    "init.defaultBranch": "main",
}
LOCK_PATIENCE = 5.0
"""Seconds to wait for a git that a killed portkit left behind to finish by itself."""

FULL = ("No space left", "quota", "File too large", "SIGXFSZ")
"""What git, or its end, says when no more can be written."""


def environment() -> dict[str, str]:
    """Return an environment for git without the reader's configuration or an outer repository."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    return {
        **inherited,
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_OPTIONAL_LOCKS": "0",
        "LC_ALL": "C",
    }


@dataclass(frozen=True)
class Repository:
    """The git repository of one folder."""

    root: Path

    def create(self) -> None:
        """Make the repository, without the reader's templates."""
        self.run("init", "-q", "--template=")

    def run(self, *arguments: str) -> str:
        """Run git in the folder and return its output as text."""
        return self.bytes(*arguments).decode(errors="replace")

    def bytes(self, *arguments: str) -> bytes:
        """Run git in the folder and return its output; PortkitError if it fails.

        A lock left by a git that was killed is removed, once no git process works in the folder.
        """
        deadline = time.monotonic() + LOCK_PATIENCE
        while True:
            done = self._call(arguments)
            if not done.returncode:
                return done.stdout
            said = (done.stderr.strip() or done.stdout.strip()).decode(errors="replace")
            if not said and done.returncode < 0:
                said = f"it was ended by {signal.Signals(-done.returncode).name}"
            locked = ".lock': File exists" in said
            if not locked or (not self.remove_stale_locks() and time.monotonic() > deadline):
                full = any(sign in said for sign in FULL)
                remedy = (
                    "Free some disk space, then try again."
                    if full
                    else "Run that git command in the folder to see more."
                )
                raise PortkitError(
                    f"git {arguments[0]} failed: {said}",
                    str(self.root),
                    f"Your files are as they were. {remedy}",
                )
            time.sleep(0.05)

    def _call(self, arguments: tuple[str, ...]) -> subprocess.CompletedProcess[bytes]:
        settings = {**SETTINGS, "safe.directory": str(self.root)}
        options = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
        try:
            return subprocess.run(
                ["git", *options, *arguments], cwd=self.root, capture_output=True, env=environment()
            )
        except FileNotFoundError as error:
            if not self.root.is_dir():
                raise PortkitError(f"{self.root.name} is gone.", str(self.root)) from error
            raise PortkitError(
                "git is not installed, and a port is a git repository.",
                "looked for `git` on PATH",
                "Install it (apt, brew or conda install git), then try again.",
            ) from error

    def remove_stale_locks(self) -> bool:
        """Delete git's lock files if no git process works in this folder; say whether any went."""
        if any(self._works_here(process) for process in psutil.process_iter(["name"])):
            return False
        locks = [path for path in (self.root / ".git").rglob("*.lock") if path.is_file()]
        for path in locks:
            with suppress(OSError):
                path.unlink()
        return bool(locks)

    def _works_here(self, process: psutil.Process) -> bool:
        if not (process.info["name"] or "").startswith("git"):
            return False
        try:
            folder = Path(process.cwd())
            zombie = process.status() == psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False  # it ended meanwhile, or belongs to somebody else
        return not zombie and folder.is_relative_to(self.root.resolve())
