"""What the worker needs of Linux: find and end every process of a job, and measure its memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterable
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
MIB = 1024 * 1024
_PAGE = os.sysconf("SC_PAGE_SIZE")


def _prctl(option: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def adopt_orphans() -> None:
    """Make this process the parent of its descendants whose own parent dies."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread of `parent` that forked it ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os.kill(os.getpid(), signal.SIGKILL)


def signal_main_thread(pid: int, number: int) -> None:
    """Send a signal to the main thread of a process; `os.kill` leaves the thread to the kernel.

    Any thread may take a signal to the process, and one that is creating another thread (a bomb of
    them) has it blocked.

    Raises:
        ProcessLookupError: there is no such process.
        OSError: the signal cannot be sent.
    """
    if ctypes.CDLL(None, use_errno=True).tgkill(pid, pid, number):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def thread_count(pid: int | str = "self") -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def threads_of(pids: Iterable[int]) -> int:
    """Return how many threads these processes have together; one that is gone has none."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += thread_count(pid)
    return total


def children(pid: int) -> list[int]:
    """Return the direct children of a process, whichever of its threads started them."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return found


def descendants(pid: int) -> list[int]:
    """Return the processes below `pid`, parents before children."""
    found = children(pid)
    for child in found:
        found += children(child)
    return found


def kill_group(pid: int) -> None:
    """Kill what is left of a job's process group; the leader itself may be reaped already."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def kill_adopted(candidates: set[int]) -> None:
    """Kill those of a finished job's processes that this process has adopted, and what is below."""
    for process in candidates.intersection(children(os.getpid())):
        kill_tree(process)


def kill_tree(pid: int) -> None:
    """Kill a job's process, its group and everything below it, also what left the group."""
    below = descendants(pid)
    kill_group(pid)
    for process in (pid, *below):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, signal.SIGKILL)


def shared_segments(pids: Iterable[int], since: float, known: set[Path]) -> set[Path]:
    """Return the files in /dev/shm made after `since` (time.time()) that these processes map.

    vLLM's ranks talk through such memory, hundreds of MiB of it; a killed rank leaves it behind,
    and some stays even when they are shut down in good order.
    """
    new = set()
    with contextlib.suppress(OSError):
        new = {Path(e.path) for e in os.scandir("/dev/shm") if e.stat().st_ctime >= since} - known
    mapped = ""
    for pid in pids if new else ():
        with contextlib.suppress(OSError):
            mapped += Path(f"/proc/{pid}/maps").read_text()
    return {segment for segment in new if str(segment) in mapped}


def resident_mib(pid: int) -> float:
    """Return the resident memory of one process (its shared pages counted too), 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE / MIB
    except (OSError, IndexError, ValueError):
        return 0.0


def memory_mib(pids: Iterable[int], inherited_mib: float) -> float:
    """Return the memory of a job's processes; the worker's pages, which all share, count once."""
    sizes = [resident_mib(process) for process in pids]
    return inherited_mib + sum(max(0.0, size - inherited_mib) for size in sizes if size)


def available_mib() -> float:
    """Return the memory this machine can still give, in MiB."""
    return _meminfo("MemAvailable")


def machine_mib() -> float:
    return _meminfo("MemTotal")


def _meminfo(key: str) -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    return 0.0
