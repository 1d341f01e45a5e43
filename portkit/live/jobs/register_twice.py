"""Load the port's plugin in a fresh process, as vLLM does.

args: python, cwd, package, module, architecture. value: the answer of scripts/register_twice.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from portkit.live.job import JobRequest
from portkit.live.subprocesses import run_script, user_environment


def run(request: JobRequest, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the answer of scripts/register_twice.py; raise PortkitError if that process fails."""
    say("loading the plugin twice in a fresh process")
    return run_script(
        request.args["python"],
        "register_twice.py",
        request.args,
        cwd=Path(request.args["cwd"]),
        environment=user_environment(),
    )
