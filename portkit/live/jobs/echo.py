"""Answer with what was asked: shows that the worker and its transport are alive."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from portkit.live.job import JobRequest


def run(request: JobRequest, say: Callable[[str], None]) -> dict[str, Any]:
    """Say each of args["say"], then return the arguments and this process's id."""
    for text in request.args.get("say", ()):
        say(text)
    return {"args": request.args, "pid": os.getpid()}
