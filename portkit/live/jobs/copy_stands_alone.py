"""Job: does the copied modeling file import by itself, and what does it need?"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from portkit.live.job import JobRequest
from portkit.live.portmodule import port_class
from portkit.port import Port


def run(request: JobRequest, say: Callable[[str], None]) -> dict[str, Any]:
    """Return {"class", "imports", "siblings", "bases"}.

    "imports": (module, line) of every import in the port's files; "siblings": modules of the port
    that were imported; "bases": classes of other models' files that the port's class derives from.
    """
    port = Port(Path(request.port_root))
    say("importing the port")
    cls = port_class(port)
    package = port.package  # read from port.toml each time; there are thousands of modules
    files = sorted((port.root / package).glob("*.py"))
    return {
        "class": f"{cls.__module__}.{cls.__qualname__}",
        "imports": [[file.name, *row] for file in files for row in imports_of(file.read_text())],
        "siblings": sorted(n for n in sys.modules if n.startswith(f"{package}.")),
        "bases": [
            [base.__module__, base.__qualname__]
            for base in cls.__mro__
            if base.__module__.startswith("transformers.models.")
        ],
    }


def imports_of(source: str) -> list[tuple[str, int]]:
    """Return (module, line) of each import; relative ones with their dots."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            found.append(("." * node.level + (node.module or ""), node.lineno))
        elif isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
    return found
