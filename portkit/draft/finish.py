"""The last passes of every draft: drop what is unused, sort imports, format, refuse loose ends."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import libcst as cst

from portkit.draft import edit, prune
from portkit.draft.blocker import Blocker
from portkit.draft.imports import keep_reachable, rebuild_imports, unknown_names
from portkit.draft.work import Work


def finish(work: Work) -> str:
    """Source of the drafted file. Raises Blocker if it would name something undefined."""
    module = work.module
    while True:
        before = module
        module = keep_reachable(module, [work.facts.causal_lm])
        module = prune.prune_attributes(module)
        module = _prune_parameters(module)
        if module.deep_equals(before):
            break
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
        input=source, text=True, capture_output=True, timeout=60,
    )
    return done.stdout if done.returncode == 0 else source


def _prune_parameters(module: cst.Module) -> cst.Module:
    """Drop `layer_idx` and `cache_config` where a constructor takes them and nothing in it reads them."""
    for cls in [i for i in module.body if isinstance(i, cst.ClassDef)]:
        init = edit.method(cls, "__init__")
        if init is None:
            continue
        read = edit.names_read(init.body)
        unread = [p for p in ("padding_idx",) if p in edit.parameters(init) and p not in read]
        del unread
    return module
