"""One job whose evidence several checks read: an engine start is paid for once per edit.

Each check may take a piece of evidence once; a check that runs again makes the job run again, so
a verdict is never older than the run it belongs to. Imports neither torch nor vLLM.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from portkit.checks.results import source_hash

if TYPE_CHECKING:
    from portkit.checks.base import CheckContext
    from portkit.live.job import JobResult


@dataclass
class _Piece:
    key: str
    result: JobResult
    taken_by: set[str] = field(default_factory=set)


_pieces: dict[str, _Piece] = {}


def gather(
    context: CheckContext, check: str, job: str, *, timeout: float = 300.0, **args: Any
) -> JobResult:
    """Return the result of a job on the port as it is now, from another check's run if possible.

    `check` is the id of the check that asks. Results of failed jobs are shared too: an engine that
    does not start need not fail to start five times.
    """
    name = f"{context.port.root} {job} {json.dumps(args, sort_keys=True)}"
    key = source_hash(context.port)
    piece = _pieces.get(name)
    if piece is None or piece.key != key or check in piece.taken_by:
        result = context.live.run(job, timeout=timeout, progress=context.progress, **args)
        piece = _pieces[name] = _Piece(key, result)
        if result.status not in ("ok", "error"):
            # A crash, a timeout or an interrupt may not happen again.
            del _pieces[name]
    piece.taken_by.add(check)
    return piece.result
