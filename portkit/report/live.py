"""Show a report now, and show long work while it goes on: in a notebook, a terminal or a log.

In a notebook one output is updated in place; in a terminal a line with a spinner and the elapsed
time stands below what is already known; in a log (or a pipe) each new thing is a plain line.
"""

from __future__ import annotations

import sys
import time
from typing import TextIO

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from portkit.report.blocks import Line, Report
from portkit.report.text import to_text

LOG_WIDTH = 120
LOG_SECONDS = 1.0
"""In a log, progress that follows sooner than this is left out."""


def in_notebook() -> bool:
    """Whether this process is a Jupyter kernel."""
    shell = sys.modules.get("IPython")
    current = shell.get_ipython() if shell is not None else None
    return current is not None and hasattr(current, "kernel")


def console(stream: TextIO | None = None) -> Console:
    """Return a console that wraps at the terminal's width, or late in a log."""
    stream = stream or sys.stdout
    width = None if stream.isatty() else LOG_WIDTH
    return Console(file=stream, width=width, highlight=False, force_jupyter=False)


def show(report: Report, stream: TextIO | None = None) -> None:
    """Display a report where the reader is looking."""
    if stream is None and in_notebook():
        from IPython.display import display

        display(report)
    else:
        _print(report, stream or sys.stdout)


def _print(report: Report, stream: TextIO) -> None:
    """In a terminal with colour; in a log without colour and without padding at the line's end."""
    if stream.isatty():
        console(stream).print(report)
    else:
        print(to_text(report.blocks, LOG_WIDTH), file=stream, flush=True)


class Ongoing:
    """Long work as it goes on: `say` what is being done, `add` what is known.

    A context manager; in a notebook what was added is folded away at the end, because the cell's
    own result then says it all.
    """

    def __init__(self, title: str, stream: TextIO | None = None, quiet: bool = False) -> None:
        self.title = title
        self.stream = stream or sys.stdout
        self.started = time.monotonic()
        self._quiet = quiet
        self._known: list[Report] = []
        self._doing = ""
        self._said = -LOG_SECONDS
        self._handle = None
        self._progress: Progress | None = None

    def __enter__(self) -> Ongoing:
        if self._quiet:
            return self
        if in_notebook():
            from IPython.display import display

            self._handle = display(self._page(), display_id=True)
        elif self.stream.isatty():
            columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self._progress = Progress(*columns, console=console(self.stream), transient=True)
            self._progress.start()
            self._task = self._progress.add_task(self.title)
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._handle is not None:
            seconds = time.monotonic() - self.started
            word = "stopped" if error[0] is not None else "done"
            last = Report((Line(f"{self.title}: {word}", "note", aside=f"{seconds:.1f} s"),))
            self._handle.update(self._page() if error[0] is not None else last)

    @property
    def seconds(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.started

    def say(self, text: str) -> None:
        """Say what is being done now."""
        if self._quiet or text == self._doing:
            return
        self._doing = text
        if self._handle is not None:
            self._handle.update(self._page())
        elif self._progress is not None:
            self._progress.reset(self._task, description=f"{self.title}: {text}")
        elif time.monotonic() - self._said >= LOG_SECONDS:
            self._said = time.monotonic()
            seconds = self._said - self.started
            print(f"  … {text}  [{seconds:.0f} s]", file=self.stream, flush=True)

    def add(self, report: Report) -> None:
        """Show a part of the result."""
        if self._quiet:
            return
        self._known.append(report)
        if self._handle is not None:
            self._handle.update(self._page())
        elif self._progress is not None:
            self._progress.console.print(report)
        else:
            _print(report, self.stream)

    def _page(self) -> Report:
        seconds = time.monotonic() - self.started
        now = Line(
            f"{self.title}{': ' + self._doing if self._doing else ''} …",
            "note",
            aside=f"{seconds:.0f} s",
        )
        return Report((*(block for report in self._known for block in report.blocks), now))
