"""Failures in words: an exception, a signal or a stack dump becomes what, where and next.

`where` is always the last frame inside the port's own folder, since that is the code its reader
can change; the frames of vLLM and torch around it are in the log.
"""

from __future__ import annotations

import re
import signal
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from portkit.errors import PortkitError
from portkit.live.missing_kernels import NEXT, missing_kernel

LONGEST = 2000
LINES = 8
"""Characters, and lines of one exception, that are kept in `what`; the log has all of it (dynamo
explains an unsupported line on a page)."""

_PORTKIT = Path(__file__).resolve().parent.parent
_RANK_LINE = re.compile(
    r"\(Worker\S*_(?P<rank>(?:TP|PP)\d+)[^)]*\) [A-Z]+ \S+ \S+ \[[^]]+\] (?P<text>.*)"
)
_LEFT_ALONE = re.compile(r"[Cc]onnection (closed|reset|refused)|gloo|ncclRemoteError")
"""What a rank says that waits for one which has left."""
_KINDS = {"TP": "rank", "PP": "stage"}
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+),? in (?P<name>[^\n]+)')


def describe(error: BaseException, port_root: str) -> dict[str, str]:
    """Return what, where and next of an exception that a job raised."""
    if isinstance(error, PortkitError):
        return error.to_dict()
    where = next((found for link in chain(error) if (found := _where(link, port_root))), "")
    kernel = next((found for link in chain(error) if (found := missing_kernel(link))), "")
    if kernel:
        return {"what": f"{kernel}: {_what(error)}", "where": where, "next": NEXT}
    return {"what": _what(error), "where": where, "next": _next(error, where)}


def traceback_of(error: BaseException, port_root: str) -> str:
    """Return what the log gets: as much of the traceback as is about the port.

    Nothing for an error that says what, where and next by itself; the line and its caret for a file
    that does not parse; else the traceback from where portkit's job leaves portkit. If the port
    has no part in it, everything: it is then portkit's or vLLM's fault.
    """
    if isinstance(error, PortkitError):
        cause = error.__cause__
        return "" if cause is None else traceback_of(cause, port_root)
    if isinstance(error, SyntaxError) and error.filename and _inside(error.filename, port_root):
        return "".join(traceback.format_exception_only(error))
    if not any(_where(link, port_root) for link in chain(error)):
        return "".join(traceback.format_exception(error))
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None and _scaffold(trace):
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(error), error, trace))


def _scaffold(trace: TracebackType) -> bool:
    """True for a frame of portkit, or of the import machinery that it called."""
    file = trace.tb_frame.f_code.co_filename
    return (
        Path(file).is_relative_to(_PORTKIT)
        or file.startswith("<frozen importlib")
        or Path(file).parent.name == "importlib"
    )


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield the exception, then what it was raised from, and so on."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def frame_in_log(text: str, port_root: str, *, innermost_first: bool = False) -> str:
    """Return the innermost frame of the port named in a traceback or a faulthandler dump.

    The log is how a frame is found that belongs to another process (a tensor-parallel rank) or
    to a process that can no longer speak. A faulthandler dump lists the innermost frame first.
    """
    found = [m for m in _FRAME.finditer(text) if _inside(m["file"], port_root)]
    if not found:
        return ""
    match = found[0] if innermost_first else found[-1]
    return _place(match["file"], int(match["line"]), match["name"].strip(), port_root)


def rank_failure(log: str, port_root: str) -> dict[str, str]:
    """Return what and where of the exception that a rank or a stage logged, if there is one.

    vLLM's executor raises only "Worker failed with error ... see the stack trace above" in the
    job's own process (v1/executor/multiproc_executor.py).
    """
    lines = [(m["rank"], m["text"]) for line in log.splitlines() if (m := _RANK_LINE.match(line))]
    found: list[tuple[bool, dict[str, str]]] = []
    for number in range(len(lines) - 1, -1, -1):
        rank, text = lines[number]
        if not (frame := _FRAME.search(text)) or not _inside(frame["file"], port_root):
            continue
        ends = (t for r, t in lines[number + 1 :] if r == rank and t and not t.startswith(" "))
        said = next(ends, "An exception")
        words = {
            "what": f"{said} (in {_KINDS[rank[:2]]} {rank[2:]})",
            "where": frame_in_log(text, port_root),
        }
        found.append((bool(_LEFT_ALONE.search(said)), words))
    # The last one, but that a rank lost another is no cause while there is one.
    return min(found, key=lambda one: one[0], default=(False, {}))[1]


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def crash_words(exit_code: int, peak_mib: float, machine_mib: float) -> dict[str, str]:
    """Return what and next for a process that ended without an answer.

    `exit_code` as subprocess has it: negative for a signal.
    """
    if exit_code >= 0:
        return {
            "what": f"The job's process left with exit code {exit_code}, without an answer.",
            "next": "Look for os._exit in the code that ran; raise an exception instead.",
        }
    name = signal_name(-exit_code)
    if name == "SIGKILL":
        return {
            "what": f"The job's process was killed (SIGKILL) at {peak_mib:,.0f} MiB, on a machine "
            f"with {machine_mib:,.0f} MiB: it probably ran out of memory.",
            "next": "Use a smaller checkpoint or shorter sequences, or close other programs.",
        }
    hints = {
        "SIGSEGV": "a kernel read outside a tensor's memory",
        "SIGBUS": "a mapped file was cut short, or shared memory (/dev/shm) is full",
        "SIGABRT": "a library gave up; its last words are in the log",
        "SIGFPE": "an integer division by zero in native code",
        "SIGILL": "an instruction that this CPU does not have",
    }
    meaning = hints.get(name)
    return {
        "what": f"The job's process crashed with {name}" + (f": {meaning}." if meaning else "."),
        "next": "Check the shapes, dtypes and indices of what the last line of the port passes on; "
        "the log has the stack.",
    }


def _what(error: BaseException) -> str:
    links = [_line(link) for link in chain(error)]
    text = links[0]
    for cause in links[1:]:
        if cause not in text:
            text += f"\ncaused by {cause}"
    return text if len(text) <= LONGEST else text[:LONGEST] + " … (the rest is in the log)"


def _line(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"SystemExit: sys.exit({error.code!r}) was called"
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg}"
    if isinstance(error, AssertionError) and not str(error) and error.__traceback__:
        frame = traceback.extract_tb(error.__traceback__)[-1]  # bare, the word says nothing
        return f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: {frame.line}"
    lines = "".join(traceback.format_exception_only(type(error), error)).strip().splitlines()
    return "\n".join(lines[:LINES]) + (" … (the rest is in the log)" if len(lines) > LINES else "")


def _where(error: BaseException, port_root: str) -> str:
    if isinstance(error, SyntaxError) and error.filename and _inside(error.filename, port_root):
        return _place(error.filename, error.lineno or 0, "", port_root)
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if _inside(f.filename, port_root)
    ]
    if not frames:
        return ""
    return _place(frames[-1].filename, frames[-1].lineno or 0, frames[-1].name, port_root)


def _next(error: BaseException, where: str) -> str:
    text = str(error)
    if isinstance(error, SyntaxError):
        return "Mend that line: Python could not read the file, so none of it ran."
    if isinstance(error, SystemExit):
        return "Raise an exception with a message instead: this would take a server down."
    if isinstance(error, ImportError):
        return "Mend the import, or install what is missing into this environment."
    if (
        isinstance(error, MemoryError)
        or "allocate memory" in text
        or "OutOfMemory" in type(error).__name__
    ):
        return "Use smaller sizes: look at the shape that is allocated there."
    if "device-side assert" in text:
        return (
            "An index was out of range on the GPU (a position, a token id, a row of a table), "
            "which stops it later than the line that asked. On the CPU that line is named "
            "(PORTKIT_DEVICE=cpu), or set CUDA_LAUNCH_BLOCKING=1 before the worker starts."
        )
    if isinstance(error, EOFError) or type(error).__name__ == "BdbQuit":
        return (
            "Remove input() and breakpoint(): the worker has no keyboard. print() goes to the log."
        )
    return (
        "Mend that line; the log has the whole traceback."
        if where
        else "The log has the whole traceback."
    )


def _inside(file: str, port_root: str) -> bool:
    """True for the port's own code: not for an environment or portkit's files inside its folder."""
    path = Path(file)
    if not port_root or not path.is_relative_to(port_root):
        return False
    return not {"site-packages", ".portkit"}.intersection(path.relative_to(port_root).parts)


def _place(file: str, line: int, name: str, port_root: str) -> str:
    place = f"{Path(file).name}:{line}" + (f", in {name}" if name else "")
    try:
        source = Path(file).read_text(errors="replace").splitlines()[line - 1].strip()
    except (OSError, IndexError):
        source = ""
    return f"{place}: {source}" if source else place
