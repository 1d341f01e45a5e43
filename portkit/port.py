"""The port folder: create, open, write, commit, undo. Nothing else writes under a port.

A port is a git repository and a pip-installable vLLM plugin (design: "Words"). The reader's code
is only ever replaced by an explicit `apply`, after the old text is committed, and each write goes
to a temporary file that is flushed to disk and then renamed: a kill at any moment leaves either
the old text or the new.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from contextlib import contextmanager
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit
from filelock import FileLock, Timeout

from portkit.curriculum import Step, steps
from portkit.errors import PortkitError

GIT_IDENTITY = ("-c", "user.name=portkit", "-c", "user.email=portkit@localhost", "-c", "commit.gpgsign=false")


def ports_dir() -> Path:
    """Where ports live: PORTKIT_PORTS, else ./ports."""
    return Path(os.environ.get("PORTKIT_PORTS") or "ports").absolute()


def write_atomically(path: Path, data: str | bytes) -> None:
    """Replace `path` by `data` so that a crash leaves the old or the new text, never a part."""
    payload = data.encode() if isinstance(data, str) else data
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(payload)
            stream.flush()
            os.fsync(stream.fileno())
        if path.exists():
            os.chmod(temporary, path.stat().st_mode & 0o777)
        else:
            os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise PortkitError(
            f"Could not write {path.name}: {error.strerror or error}.",
            str(path),
            "The old text is untouched. Free some disk space or fix the permissions, then try again.",
        ) from error
    finally:
        Path(temporary).unlink(missing_ok=True)


@dataclass(frozen=True)
class Port:
    """An opened port folder."""

    root: Path

    # ---- where things are -------------------------------------------------------------------

    @property
    def name(self) -> str:
        return str(self.meta["port"]["name"])

    @property
    def architecture(self) -> str:
        """Name of the class, as in config.json's "architectures", e.g. "HeliumForCausalLM"."""
        return str(self.meta["port"]["architecture"])

    @property
    def package(self) -> str:
        """Importable name of the plugin, e.g. "vllm_helium"."""
        return f"vllm_{self.name}"

    @property
    def module(self) -> str:
        return f"{self.package}.modeling_{self.name}"

    @property
    def modeling(self) -> Path:
        """The file being ported, e.g. vllm_helium/modeling_helium.py."""
        return self.root / self.package / f"modeling_{self.name}.py"

    @property
    def init_file(self) -> Path:
        return self.root / self.package / "__init__.py"

    @property
    def checkpoint(self) -> Path:
        return self.root / "checkpoint"

    @property
    def state_dir(self) -> Path:
        """`.portkit/`: results, logs, caches; ignored by git, safe to delete."""
        path = self.root / ".portkit"
        path.mkdir(exist_ok=True)
        return path

    @property
    def meta(self) -> dict[str, Any]:
        """port.toml as plain values."""
        return tomlkit.parse((self.root / "port.toml").read_text()).unwrap()

    @property
    def source(self) -> str:
        """Text of the modeling file; empty before step 1."""
        return self.modeling.read_text() if self.modeling.exists() else ""

    # ---- changing it ------------------------------------------------------------------------

    @contextmanager
    def locked(self, seconds: float = 2.0) -> Iterator[None]:
        """Hold the port's lock; a second kernel or CLI on the same port is told so."""
        try:
            with FileLock(self.state_dir / "lock", timeout=seconds):
                yield
        except Timeout as error:
            raise PortkitError(
                f"Another portkit is changing the port {self.name!r} right now.",
                str(self.root),
                "Wait for it to finish, or close the other notebook or command.",
            ) from error

    def apply(self, files: dict[Path, str | bytes], message: str) -> None:
        """Write files (an explicit fix, draft or copy) after committing what the reader has."""
        with self.locked():
            self._commit_all("save: before " + message)
            for path, text in files.items():
                write_atomically(path, text)
            self._commit_all("apply: " + message)

    def update_meta(self, section: str, **values: Any) -> None:
        """Set values in port.toml, keeping its comments and order."""
        path = self.root / "port.toml"
        document = tomlkit.parse(path.read_text())
        table = document.setdefault(section, tomlkit.table())
        for key, value in values.items():
            table[key] = value
        with self.locked():
            write_atomically(path, tomlkit.dumps(document))

    def pass_step(self, step: Step) -> None:
        """Commit the port as having passed this step ("step 2: forward")."""
        with self.locked():
            self._commit_all(f"step {step.number}: {step.id}", allow_empty=True)

    def undo(self) -> str:
        """Take back the last apply; the text before undoing is committed too. Returns its message."""
        with self.locked():
            self._commit_all("save: before undo")
            log = self.git("log", "--format=%H %s").splitlines()
            undone: set[str] = set()
            for line in log:
                commit, _, subject = line.partition(" ")
                if subject.startswith("undo: "):
                    undone.add(self.git("log", "-1", "--format=%b", commit).strip())
                elif subject.startswith("apply: ") and commit not in undone:
                    self.git("restore", "--source", f"{commit}~1", "--staged", "--worktree", "--", ".")
                    self._commit_all(f"undo: {subject.removeprefix('apply: ')}\n\n{commit}", allow_empty=True)
                    return subject.removeprefix("apply: ")
        raise PortkitError("There is nothing to undo.", str(self.root), "`git log` in the port shows its history.")

    def steps_passed(self) -> tuple[str, ...]:
        """Ids of the steps with a commit; a bookmark, never trusted: checks are re-run."""
        subjects = self.git("log", "--format=%s").splitlines()
        return tuple(s.id for s in steps() if f"step {s.number}: {s.id}" in subjects)

    # ---- git --------------------------------------------------------------------------------

    def git(self, *arguments: str) -> str:
        """Run git in the port and return its output."""
        done = subprocess.run(
            ["git", *GIT_IDENTITY, *arguments], cwd=self.root, text=True, capture_output=True,
            env={**os.environ, "GIT_TERMINAL_PROMPT": "0"},
        )
        if done.returncode:
            raise PortkitError(
                f"git {arguments[0]} failed: {done.stderr.strip() or done.stdout.strip()}",
                str(self.root),
                "Your files are untouched. Run the same git command in that folder to see more.",
            )
        return done.stdout

    def _commit_all(self, message: str, allow_empty: bool = False) -> None:
        self.git("add", "-A")
        if allow_empty or self.git("status", "--porcelain"):
            self.git("commit", "-q", "--no-verify", "-m", message, *(["--allow-empty"] if allow_empty else []))


def open_port(name_or_path: str | Path) -> Port:
    """Open a port by folder or by name under the ports folder; PortkitError if it is none."""
    given = Path(name_or_path).expanduser()
    for root in (given, ports_dir() / given):
        if (root / "port.toml").is_file():
            port = Port(root.resolve())
            try:
                port.meta["port"]["architecture"]
            except Exception as error:
                raise PortkitError(
                    f"port.toml cannot be read: {error}.", str(root / "port.toml"),
                    "`git diff port.toml` in the port shows what changed; `git checkout port.toml` restores it.",
                ) from error
            return port
    raise PortkitError(
        f"{str(name_or_path)!r} is not a port: there is no port.toml.",
        f"looked in {given} and {ports_dir() / given}",
        f"Make one: portkit new {given.name or 'NAME'} --model ARCHITECTURE",
    )
