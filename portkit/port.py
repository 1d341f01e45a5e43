"""The port folder: open, write, commit, undo. Nothing else writes under a port.

A port is a git repository and a pip-installable vLLM plugin (design: "Words"). The reader's code
is only ever replaced by an explicit `apply`, after the old text is committed, and each write goes
to a temporary file that is flushed to disk and then renamed: a kill at any moment leaves either
the old text or the new. `portkit.create` makes new ports.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit
import tomlkit.exceptions
from filelock import FileLock, Timeout

from portkit.atomic import cannot_write, remove_leftovers, write_atomically
from portkit.curriculum import Step, steps
from portkit.errors import PortkitError
from portkit.journal import Journal, content, digest, put
from portkit.repository import Repository

__all__ = ["Port", "open_port", "ports_dir", "write_atomically"]


def ports_dir() -> Path:
    """Where ports live: PORTKIT_PORTS, else `ports` in the workbook around here, else ./ports.

    A notebook's kernel runs in `notebooks/`; the ports stand beside that folder.
    """
    if given := os.environ.get("PORTKIT_PORTS"):
        return Path(given).expanduser().absolute()
    here = Path.cwd()
    books = (p for p in (here, *here.parents) if (p / "notebooks" / "00_choose.ipynb").is_file())
    return next(books, here) / "ports"


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
        try:
            path.mkdir(exist_ok=True)
        except OSError as error:
            raise cannot_write(path, error) from error
        return path

    @property
    def meta(self) -> dict[str, Any]:
        """port.toml as plain values."""
        return self._document().unwrap()

    @property
    def source(self) -> str:
        """Text of the modeling file, its line ends unchanged; empty before step 1."""
        data = content(self.modeling)
        try:
            return "" if data is None else data.decode()
        except UnicodeDecodeError as error:
            raise PortkitError(
                f"{self.modeling.name} is not UTF-8 text (byte {error.start}).",
                str(self.modeling),
                "Save it as UTF-8 in your editor.",
            ) from error

    def _document(self) -> tomlkit.TOMLDocument:
        path = self.root / META
        try:
            return tomlkit.parse(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomlkit.exceptions.ParseError) as error:
            # tomlkit shows the end of the file as the character NUL.
            reason = str(error).replace("Unexpected character: '\\x00'", "it ends too early")
            raise PortkitError(
                f"port.toml cannot be read: {reason}.", str(path), _RESTORE_META
            ) from error

    # ---- changing it ------------------------------------------------------------------------

    @contextmanager
    def locked(self, seconds: float = 2.0) -> Iterator[None]:
        """Hold the port's lock; a second kernel or CLI on the same port is told so.

        May be nested in one thread. Taking it first mends what a killed portkit left behind.
        """
        held = _held_locks()
        key = str(self.root)
        if key in held:
            yield
            return
        owner = self.state_dir / "lock.owner"
        lock = FileLock(self.state_dir / "lock", timeout=seconds)
        try:
            lock.acquire()
        except Timeout as error:
            raise PortkitError(
                f"Another portkit{_owner(owner)} is changing the port in {self.root.name!r} now.",
                str(self.root),
                "Wait for it to finish, or close the other notebook or command.",
            ) from error
        except OSError as error:  # a read-only folder
            raise cannot_write(self.state_dir / "lock", error) from error
        try:
            held.add(key)
            write_atomically(owner, json.dumps({"pid": os.getpid()}))
            self._recover()
            yield
        finally:
            held.discard(key)
            lock.release()

    def apply(
        self,
        files: Mapping[Path | str, str | bytes],
        message: str,
        *,
        expected: Mapping[Path | str, str] | None = None,
    ) -> bool:
        """Write files (an explicit fix, draft or copy) after committing what the reader has.

        Paths are absolute or relative to the port. With `expected` (path → text that the new
        files were made from) nothing is written if the reader has saved another text meanwhile.
        Returns False, and does nothing, if every file already has this content.
        """
        wanted = {
            self._inside(path): text.encode() if isinstance(text, str) else text
            for path, text in files.items()
        }
        message = " ".join(message.split())
        with self.locked():
            for path, text in (expected or {}).items():
                on_disk = content(self.root / self._inside(path)) or b""
                if on_disk.decode(errors="replace") != text:
                    raise PortkitError(
                        f"{Path(path).name} was changed on disk since this was made from it.",
                        str(path),
                        "Nothing was written. Run it again to start from the new text.",
                    )
            before = {name: content(self.root / name) for name in wanted}
            if before == wanted:
                return False
            self._commit_all(f"save: before {message}", force=tuple(before))
            self._write(f"apply: {message}", before, wanted)
        return True

    def update_meta(self, section: str, **values: Any) -> None:
        """Set values in port.toml, keeping its comments and order."""
        with self.locked():
            write_atomically(self.root / META, self.meta_with(section, **values))

    def meta_with(self, section: str, **values: Any) -> str:
        """Return the text that port.toml would have with these values; write nothing."""
        document = self._document()
        table = document.setdefault(section, tomlkit.table())
        for key, value in values.items():
            table[key] = value
        return tomlkit.dumps(document)

    def pass_step(self, step: Step) -> None:
        """Commit the port as having passed this step ("step 2: forward")."""
        with self.locked():
            self._commit_all(f"step {step.number}: {step.id}", allow_empty=True)

    def undo(self) -> str:
        """Take back the last apply that is not yet undone; return its message.

        The files which that apply changed get back the exact bytes they had before it. Edits made
        since then are committed first ("save: before undo"), and other files stay as they are. Of
        port.toml only what the apply set is taken back.
        """
        undoes = "%(trailers:key=Undoes,valueonly,separator=)"
        with self.locked():
            log = self.git("log", "--author=portkit@localhost", f"--format=%H%x09{undoes}%x09%s")
            rows = [line.split("\t", 2) for line in log.splitlines()]
            undone = {row[1] for row in rows}
            for commit, _, subject in rows:
                if subject.startswith("apply: ") and commit not in undone:
                    self._take_back(commit, subject.removeprefix("apply: "))
                    return subject.removeprefix("apply: ")
        raise PortkitError(
            "There is nothing to undo.", str(self.root), "`git log` in the port shows its history."
        )

    def steps_passed(self) -> tuple[str, ...]:
        """Ids of the steps with a commit; a bookmark, never trusted: checks are re-run."""
        subjects = self.git("log", "--format=%s").splitlines()
        return tuple(s.id for s in steps() if f"step {s.number}: {s.id}" in subjects)

    # ---- git --------------------------------------------------------------------------------

    def git(self, *arguments: str) -> str:
        """Run git in the port and return its output."""
        return Repository(self.root).run(*arguments)

    def _commit_all(
        self, message: str, *, allow_empty: bool = False, force: Iterable[str] = ()
    ) -> None:
        """Commit everything, and the `force` files even if the reader's .gitignore hides them."""
        self.git("add", "-A")
        hidden = [name for name in force if (self.root / name).is_file()]
        if hidden:
            self.git("add", "-f", "--", *hidden)
        if allow_empty or self.git("status", "--porcelain", "--untracked-files=no"):
            empty = ["--allow-empty"] if allow_empty else []
            self.git("commit", "-q", "--no-verify", "--cleanup=verbatim", "-m", message, *empty)

    def _take_back(self, commit: str, message: str) -> None:
        changed = self.git("diff", "--name-only", "--no-renames", "-z", f"{commit}~1", commit)
        names = changed.split("\0")[:-1]
        wanted = {name: self._at(f"{commit}~1", name) for name in names}
        before = {name: content(self.root / name) for name in names}
        if META in wanted and before[META] != self._at(commit, META):
            wanted[META] = self._merged(commit) or wanted[META]
        self._commit_all("save: before undo", force=names)
        self._write(f"undo: {message}\n\nUndoes: {commit}", before, wanted)

    def _at(self, commit: str, name: str) -> bytes | None:
        if not self.git("ls-tree", "--name-only", "-z", commit, "--", name):
            return None
        return Repository(self.root).bytes("cat-file", "blob", f"{commit}:{name}")

    def _merged(self, commit: str) -> bytes | None:
        """Return port.toml without what `commit` set and with what was set since, if both fit."""
        with tempfile.TemporaryDirectory(dir=self.state_dir) as folder:
            ours, base, theirs = (Path(folder) / name for name in ("ours", "base", "theirs"))
            ours.write_bytes(content(self.root / META) or b"")
            base.write_bytes(self._at(commit, META) or b"")
            theirs.write_bytes(self._at(f"{commit}~1", META) or b"")
            try:
                return Repository(self.root).bytes(
                    "merge-file", "-p", str(ours), str(base), str(theirs)
                )
            except PortkitError:  # the same lines were changed since: take the old text
                return None

    def _head(self) -> str:
        return self.git("rev-parse", "HEAD").strip()

    def _write(
        self, message: str, before: Mapping[str, bytes | None], wanted: Mapping[str, bytes | None]
    ) -> None:
        """Write all files and commit them, or leave everything as it was."""
        after = {name: digest(data) for name, data in wanted.items()}
        journal = Journal(message, self._head(), dict(before), after)
        journal.write(self.state_dir)
        try:
            for name, data in wanted.items():
                put(self.root / name, data)
            self._commit_all(message, allow_empty=True, force=wanted)
        except BaseException:
            if self._head() == journal.base:
                journal.roll_back(self.root)
            journal.remove(self.state_dir)
            raise
        journal.remove(self.state_dir)

    def _recover(self) -> None:
        """End what a killed portkit had begun, and delete the temporary files it left."""
        remove_leftovers(self.root)
        journal = Journal.read(self.state_dir)
        if journal is None:
            return
        if self._head() == journal.base:
            if journal.finished(self.root):
                self._commit_all(journal.message, allow_empty=True, force=journal.after)
            else:
                journal.roll_back(self.root)
        journal.remove(self.state_dir)

    def _inside(self, path: Path | str) -> str:
        """Return a path relative to the port, refusing what portkit may not overwrite."""
        full = self.root / path
        if not full.resolve().is_relative_to(self.root.resolve()) or ".git" in full.parts:
            raise PortkitError(f"{path} lies outside the port.", str(self.root))
        if full.is_symlink():
            raise PortkitError(
                f"{full.name} is a symbolic link, so its history cannot be kept in the port.",
                str(full),
                "Put the file itself there.",
            )
        return full.resolve().relative_to(self.root.resolve()).as_posix()


META = "port.toml"
_RESTORE_META = (
    "`git diff port.toml` in the port shows what changed; `git checkout port.toml` restores it."
)
_local = threading.local()


def _held_locks() -> set[str]:
    """Roots whose lock this thread holds; a lock is re-entrant within a thread."""
    if not hasattr(_local, "held"):
        _local.held = set()
    return _local.held


def _owner(path: Path) -> str:
    with suppress(OSError, ValueError, KeyError):
        return f" (process {json.loads(path.read_text())['pid']})"
    return ""


def open_port(name_or_path: str | Path) -> Port:
    """Open a port by folder or by name under the ports folder; PortkitError if it is none.

    Mends what a killed portkit left in it, unless another portkit is at work there.
    """
    given = Path(name_or_path).expanduser()
    for root in (given, ports_dir() / given):
        if (root / META).is_file():
            port = Port(root.resolve())
            _validate(port)
            with suppress(Timeout, PortkitError), port.locked(seconds=0):
                pass
            return port
    name = given.name if given.name.isidentifier() and given.name.islower() else "NAME"
    raise PortkitError(
        f"{str(name_or_path)!r} is not a port: there is no port.toml.",
        f"looked in {given} and {ports_dir() / given}",
        f"{_known()}: `portkit new {name} --model ARCHITECTURE`.",
    )


def _known() -> str:
    names = sorted(path.parent.name for path in ports_dir().glob(f"*/{META}"))
    return f"Known ports: {', '.join(names)}. Or make one" if names else "Make one"


def _validate(port: Port) -> None:
    path = port.root / META
    table = port.meta.get("port", {})
    for key in ("name", "architecture"):
        value = table.get(key) if isinstance(table, dict) else None
        if not isinstance(value, str) or not value.isidentifier():
            raise PortkitError(
                f"port.toml cannot be read: [port] {key} is {value!r}, not a name.",
                str(path),
                _RESTORE_META,
            )
    git = port.root / ".git"
    if not (git.is_file() or (git / "HEAD").is_file()):  # a file in a worktree or submodule
        raise PortkitError(
            f"{port.root.name} has a port.toml but no whole git repository, so nothing could be "
            "undone.",
            str(port.root),
            "Copy the port again with its .git folder. If that is lost: `git init && git add -A && "
            "git commit -m start` in the folder begins a new history.",
        )
