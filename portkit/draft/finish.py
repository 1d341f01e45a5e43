"""The last passes of every draft: drop what is unused, sort imports, format, refuse loose ends."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

from portkit.draft import prune
from portkit.draft.blocker import Blocker
from portkit.draft.imports import keep_reachable, rebuild_imports, unknown_names
from portkit.draft.serving.parameters import drop_unread_constructor_parameters
from portkit.draft.work import Work


def finish(work: Work) -> str:
    """Source of the drafted file. Raises Blocker if it would name something undefined."""
    module = work.module
    size = -1
    while size != len(module.code):  # each pass only removes, and may free more to remove
        size = len(module.code)
        module = keep_reachable(module, [work.facts.causal_lm])
        module = prune.prune_attributes(module)
        module = drop_unread_constructor_parameters(module)
    module = rebuild_imports(module)
    loose = sorted(unknown_names(module))
    if loose:
        raise Blocker(f"the draft would read {loose[0]!r}, which nothing defines.")
    source = formatted(module.code)
    compile(source, "<draft>", "exec")
    return source


def formatted(source: str) -> str:
    """Format as vLLM does (88 columns) when ruff is installed; else as the transforms wrote it."""
    if find_spec("ruff") is None:
        return source
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--isolated", "--line-length", "88", "-"],
        input=source,
        text=True,
        capture_output=True,
        timeout=60,
    )
    return done.stdout if done.returncode == 0 else source
