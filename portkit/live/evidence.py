"""One job whose evidence several checks read: an engine start is paid for once per edit.

Each check may take a piece of evidence once; a check that runs again makes the job run again, so
a verdict is never older than the run it belongs to. Imports neither torch nor vLLM.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from portkit.checks.results import source_hash
from portkit.live.coverage_problems import coverage_problems
from portkit.live.fused import disputed

if TYPE_CHECKING:
    from portkit.checks.base import CheckContext
    from portkit.live.job import JobResult
    from portkit.port import Port


@dataclass
class _Piece:
    key: str
    result: JobResult
    taken_by: set[str] = field(default_factory=set)


_pieces: dict[str, _Piece] = {}
_loaders: dict[str, tuple[str, str]] = {}
"""Port folder -> (hash of what was judged, the loader that works for it)."""


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


def has_load_weights(port: Port) -> bool:
    """Whether the model's own class has a load_weights; a block inside may have one long before."""
    source = port.source
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return "def load_weights" in source
    return any(
        isinstance(node, ast.ClassDef)
        and node.name == port.architecture
        and any(isinstance(m, ast.FunctionDef) and m.name == "load_weights" for m in node.body)
        for node in tree.body
    )


def loads_by_name(source: str) -> bool:
    """Whether the port has no load_weights yet, or only ones that hand tensors on by their names.

    Then the port's own loading gives what portkit's gives, or is wrong.
    """
    functions = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.name.endswith(("load_weights", "_loader"))
    ]
    calls = {
        ast.unparse(node.func)
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, ast.Call)
    }
    return calls <= {"AutoWeightsLoader", "loader.load_weights"}


def loads_whole(context: CheckContext) -> bool:
    """Whether the port's own load_weights takes every tensor whole and fills every parameter."""
    found = context.live.run("coverage", progress=context.progress)
    return found.ok and not (found.value["whole"]["error"] or coverage_problems(found.value))


def run_with_a_loader(
    context: CheckContext,
    start: Callable[[str], JobResult],
    differs: Callable[[dict[str, Any]], int],
) -> JobResult:
    """Return what `start(loader)` found, with portkit's loader or else with the port's own.

    A check of the model's code should not fail for what load_weights does; so portkit loads, by
    name. But a finished port may need its own load_weights, where a fused tensor has to be taken
    apart first, or name the parts of a fused layer in the right order where packed_modules_mapping
    does not: then what that loads counts. `differs` returns how much of a job's value is wrong,
    0 for nothing. The choice is kept for the port as it is now.
    """
    if context.loader:
        return start(context.loader)
    root, key = str(context.port.root), source_hash(context.port)
    held = _loaders.get(root)
    if held and held[0] == key:
        return start(held[1])
    first = start("portkit")
    wrong = differs(first.value) if first.ok else 1_000_000
    if not wrong:
        _loaders[root] = (key, "portkit")
        return first
    if loads_by_name(context.port.source) and not _order_disputed(context):
        return first
    if first.status not in ("ok", "error"):
        return first
    second = start("port")
    left = differs(second.value) if second.ok else wrong
    # Where portkit's loader stops, a tensor may need the port's own, or be of a wrong size: vLLM's
    # loaders cut what is too long without a word, so then only a run that is right counts.
    better = left == 0 or (first.ok and left < wrong) or (second.ok and loads_whole(context))
    _loaders[root] = (key, "port" if better else "portkit")
    return second if better else first


def works_with(context: CheckContext) -> str:
    """Return the loader that `run_with_a_loader` chose for the port as it is now, "" if none."""
    key, loader = _loaders.get(str(context.port.root), ("", ""))
    return loader if key == source_hash(context.port) else ""


def _order_disputed(context: CheckContext) -> bool:
    """Whether packed_modules_mapping and the weights mapper order a layer's parts differently."""
    if "hf_to_vllm_mapper" not in context.port.source:
        return False
    layout = context.live.run("layout", progress=context.progress)
    return layout.ok and bool(disputed(layout.value["packed"], layout.value["stacked"]))
