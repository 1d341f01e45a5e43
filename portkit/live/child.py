"""A job's own process: forked from the worker, it runs one job, answers, and ends.

Nothing here returns: whatever the job does, `run_forked` ends the process.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import importlib
import importlib.machinery
import importlib.util
import os
import signal
import socket
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any, NoReturn

from portkit.live import processes, wire
from portkit.live.environment import remember_readers
from portkit.live.failure import describe, traceback_of
from portkit.live.job import JobRequest

DUMP_SIGNAL = signal.SIGUSR2
"""Sent to every process of a job that ran out of time: each writes where it is."""
DUMP_ONE_SIGNAL = signal.SIGRTMIN + 5
"""The same for the thread that gets it alone: of thousands, only the newest would be written."""


def run_forked(
    request: JobRequest,
    answer: socket.socket,
    stack_fd: int,
    scratch: Path,
    environment: dict[str, str],
) -> NoReturn:
    """Run the job in this freshly forked process and exit. fds 0-2 are already redirected.

    `environment`: the kernel's, for programs that a job starts as the reader would.
    """
    code = 1
    try:
        remember_readers(environment)
        _settle(request, stack_fd, scratch)
        message = _answer(request, answer)
        code = 0 if message["event"] == "answer" else 1
        sys.stdout.flush()
        sys.stderr.flush()
        answer.sendall(wire.encode(message))
        # vLLM's own shutdown hooks end its ranks and remove their shared memory.
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        _really_exit(code)


def _settle(request: JobRequest, stack_fd: int, scratch: Path) -> None:
    """Make this process a job's: its signals, where its words and its imports go."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    with contextlib.suppress(OSError):
        # If memory runs out, the job goes first, not the reader's kernel.
        Path("/proc/self/oom_score_adj").write_text("800")
    # vLLM unfreezes and collects when an engine is shut down: over the worker's two million
    # objects that takes a second. What the worker froze stays frozen; only the job's own objects
    # are collected.
    gc.freeze = gc.unfreeze = lambda: None
    faulthandler.enable(stack_fd, all_threads=True)
    faulthandler.register(DUMP_SIGNAL, stack_fd, all_threads=True)
    faulthandler.register(DUMP_ONE_SIGNAL, stack_fd, all_threads=False)
    _note_exit(stack_fd)
    _bind_descendants()
    # What a job leaves in the temporary folder goes with it, except inductor's compile cache.
    os.environ.setdefault(
        "TORCHINDUCTOR_CACHE_DIR",
        os.path.join(tempfile.gettempdir(), f"torchinductor_{os.getuid()}"),
    )
    os.environ["TMPDIR"] = tempfile.tempdir = str(scratch)
    if request.port_root:
        os.chdir(request.port_root)
        read_afresh(request.port_root)


def _answer(request: JobRequest, answer: socket.socket) -> dict[str, Any]:
    def say(text: str) -> None:
        answer.sendall(wire.encode({"event": "progress", "text": str(text)}))

    try:
        module = importlib.import_module(f"portkit.live.jobs.{request.job}")
        value = module.run(request, say)
        message = {"event": "answer", "value": value if value is not None else {}}
        wire.encode(message)
        return message
    except BaseException as error:
        sys.stderr.write(traceback_of(error, request.port_root))
        return {"event": "error", **describe(error, request.port_root)}


class _Uncached(importlib.machinery.SourceFileLoader):
    """Compile from the source each time: a .pyc goes by second and size; edits are quicker."""

    def get_code(self, fullname: str) -> Any:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


def read_afresh(root: str) -> None:
    """Put the port's folder first on the import path, its modules compiled from their text."""

    def hook(path: str) -> importlib.machinery.FileFinder:
        if not Path(path).is_relative_to(root):
            raise ImportError
        return importlib.machinery.FileFinder(path, (_Uncached, [".py"]))

    below = root.rstrip("/") + "/"
    for name in [
        n for n, m in sys.modules.items() if str(vars(m).get("__file__") or "").startswith(below)
    ]:
        del sys.modules[name]
    for path in [p for p in sys.path_importer_cache if f"{p}/".startswith(below)]:
        del sys.path_importer_cache[path]
    sys.path_hooks.insert(0, hook)
    sys.path.insert(0, root)
    # Processes that are spawned, not forked, find the port too, and leave no .pyc in it.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    importlib.invalidate_caches()


def _bind_descendants() -> None:
    """Have the processes that the job forks (vLLM's ranks) die with it, even by SIGKILL.

    The kernel counts the forking *thread* as the parent, so only forks of the job's main thread are
    bound; and a daemon, which outlives the process that forked it on purpose, must not be.
    """
    job, bound = os.getpid(), False

    def before() -> None:
        nonlocal bound
        bound = os.getpid() == job and threading.current_thread() is threading.main_thread()

    def after_in_child() -> None:
        if bound:
            processes.die_with_parent(job)

    os.register_at_fork(before=before, after_in_child=after_in_child)


_really_exit = os._exit


def _note_exit(stack_fd: int) -> None:
    """Write the stack when the job's own process is left by os._exit, which says nothing itself."""
    job = os.getpid()

    def noted(code: int) -> NoReturn:
        if os.getpid() == job:
            faulthandler.dump_traceback(stack_fd, all_threads=False)
        _really_exit(code)

    os._exit = noted
