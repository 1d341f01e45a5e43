"""The shape of a check: a small class whose docstring says what it proves."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from portkit.checks.verdict import Table, Verdict

if TYPE_CHECKING:
    from portkit.live.client import Live
    from portkit.live.job import JobResult
    from portkit.port import Port


@dataclass(frozen=True)
class CheckContext:
    """What a check may use: the port, the worker, and a way to say how far it is."""

    port: Port
    live: Live
    progress: Callable[[str], None] = field(default=lambda text: None)
    loader: str = ""
    """Who fills the weights, "portkit" or "port"; empty for what the check's step usually takes."""


class Check(ABC):
    """A live validation. Subclasses live in steps/<id>/checks.py, in the order they run.

    The class docstring is what the reader sees as "what this proves"; `requires` names checks
    that must have passed first (else this one is skipped, not failed).
    """

    id: ClassVar[str]
    step: ClassVar[str]
    title: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()
    timeout: ClassVar[float] = 300.0
    """Seconds after which the worker is stopped and the check fails with what was going on."""

    @abstractmethod
    def run(self, context: CheckContext) -> Verdict:
        """Run the check and return its verdict."""

    @classmethod
    def proves(cls) -> str:
        return inspect.cleandoc(cls.__doc__ or "")

    def passed(
        self, what: str, *tables: Table, job: JobResult | None = None, **more: Any
    ) -> Verdict:
        return self._verdict("passed", what, tables, job, more)

    def failed(
        self,
        what: str,
        *tables: Table,
        where: str = "",
        next: str = "",
        causes: tuple[str, ...] = (),
        job: JobResult | None = None,
        **more: Any,
    ) -> Verdict:
        return self._verdict(
            "failed", what, tables, job, {"where": where, "next": next, "causes": causes, **more}
        )

    def skipped(
        self, reason: str, *tables: Table, job: JobResult | None = None, **more: Any
    ) -> Verdict:
        return self._verdict("skipped", reason, tables, job, more)

    def job(self, context: CheckContext, name: str, **args: Any) -> JobResult:
        """Run a job in the worker, under this check's time limit, with its progress told."""
        return context.live.run(name, timeout=self.timeout, progress=context.progress, **args)

    def failed_job(self, job: JobResult, next: str = "") -> Verdict:
        """Turn a job that did not finish (error, crash, timeout) into a failed verdict."""
        return self._verdict(
            "failed",
            job.what,
            (),
            job,
            {
                "where": job.where,
                "next": next or job.next,
                "log": job.log_tail,
                "judged": bool(job.device),  # empty if the worker could not start
            },
        )

    def _verdict(self, status, what, tables, job, more) -> Verdict:
        if job is not None:
            more = {
                "device": job.device,
                "device_reason": job.device_reason,
                "seconds": job.seconds,
                **more,
            }
        return Verdict(
            check=self.id,
            step=self.step,
            title=self.title,
            status=status,
            what=what,
            tables=tuple(tables),
            **more,
        )


def place(port: Port, line: int) -> str:
    """Return "file:line: the text there" for a line of the port's modeling file."""
    text = port.source.splitlines()
    shown = text[line - 1].strip() if 0 < line <= len(text) else ""
    return f"{port.modeling.name}:{line}: {shown}" if shown else port.modeling.name
