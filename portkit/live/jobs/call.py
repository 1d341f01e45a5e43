"""Call a function of a module in the port's folder, the way every job runs the reader's code."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from portkit.live.job import JobRequest


def run(request: JobRequest, say: Callable[[str], None]) -> dict[str, Any]:
    """Import args["module"] from the port and return {"returned": function(say, **kwargs)}."""
    function = getattr(importlib.import_module(request.args["module"]), request.args["function"])
    return {"returned": function(say, **request.args.get("kwargs", {}))}
