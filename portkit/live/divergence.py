"""Trace both sides, walk them, diagnose, and say it in plain values."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from portkit.live.diagnose import Diagnosis
from portkit.live.engine import Engine, Prompt
from portkit.live.fused import fused_parts
from portkit.live.locate import Place, call_of, method_place, place_of
from portkit.live.trace import Captures, trace_original, trace_port
from portkit.live.walk import Divergence, Step, paired, walk

ROLES = {
    "in": "the input of {path}",
    "out": "the output of {path}",
    "q": "the queries that {path} gives to the attention (after rotary embedding)",
    "k": "the keys that {path} gives to the attention (after rotary embedding)",
    "v": "the values that {path} gives to the attention",
    "attn": "what the attention in {path} returns (before the output projection)",
}
SHOWN = 12


def first_divergence(
    engine: Engine,
    original: nn.Module,
    prompts: Sequence[Prompt],
    which: int,
    max_tokens: int,
    ids: Sequence[int],
) -> dict[str, Any]:
    """Return where vLLM and Transformers first differ on one request, as plain values.

    `ids` are the tokens of prompt `which`; the tokens that vLLM then generates are given to both
    sides. Keys: path, role, what, kind, numbers, position, causes, where, steps (the pairs walked).
    """
    ours, tokens = trace_port(engine, prompts, which, max_tokens)
    fed = [*ids, *tokens[: max_tokens - 1]]
    theirs = trace_original(original, fed)
    tolerance = engine.profile.module.value
    found, elsewhere = None, _residual_outside(engine.model, original)
    # A small fault may stay below the usual tolerance in one module and add up behind it.
    for share in (1.0, 0.2, 0.05):
        steps, found = walk(ours, theirs, engine.model, tolerance * share, elsewhere)
        found = found or _head(engine, original, ours, theirs, tolerance * share)
        if found is not None:
            break
    if found is None:
        return {"path": "", "what": "", "causes": [], "where": "", "steps": _table(steps)}
    found = _earlier(found, ours, theirs, engine.model, original)
    diagnosis = Diagnosis(found, ours, theirs, engine.model, original)
    try:
        causes = diagnosis.run()
    except Exception:  # the place stands without what explains it
        traceback.print_exc()
        causes = ()
    if block := _block_of_vllm(engine.model, found.path):
        kind = type(engine.model.get_submodule(block)).__name__
        causes = (
            f"What {block} does inside is vLLM's own {kind}: what the port gives it differs from "
            "the original's (its arguments in __init__, such as a layout or an activation; its "
            "input), or load_weights puts its rows in another order.",
            *causes,
        )
    return {
        "path": found.path,
        "role": found.role,
        "kind": found.kind,
        "what": (
            found.path
            if found.kind == "never called"
            else ROLES.get(found.role, "{path}").format(path=found.path)
        ),
        "max_abs": found.max_abs,
        "relative": found.relative,
        "position": found.position,
        "first_ok": found.first_ok,
        "ours": list(found.ours),
        "theirs": list(found.theirs),
        "shape": list(found.shape_theirs),
        "causes": list(causes),
        "proven": len(diagnosis.found),
        "where": _where(engine.model, original, found, diagnosis),
        "steps": _table(steps),
        "walked": len(steps),
    }


def _residual_outside(port: nn.Module, original: nn.Module) -> set[str]:
    """Return paths of blocks that add a residual in the original, and get none in the port.

    There the layer around them adds it, and what they return differs rightly.
    """
    modules = dict(port.named_modules(remove_duplicate=False))
    return {
        path
        for path, module in original.named_modules(remove_duplicate=False)
        if path in modules
        and "residual" in inspect.signature(module.forward).parameters
        and "residual" not in inspect.signature(modules[path].forward).parameters
    }


def _earlier(
    found: Divergence, ours: Captures, theirs: Captures, port: nn.Module, original: nn.Module
) -> Divergence:
    """Return the same divergence at the module's input, if the module itself is right.

    A small fault may pass at the input, below the tolerance, and show behind a large weight. So the
    original's module is given the port's input: if that gives the port's output, the module is not
    to blame.
    """
    mine = paired(ours, theirs, fused_parts(port), found.path, "in")
    given = theirs.values.get((found.path, "in"))
    module = dict(original.named_modules(remove_duplicate=False)).get(found.path)
    output = paired(ours, theirs, fused_parts(port), found.path, "out")
    if found.role != "out" or found.kind != "value" or module is None:
        return found
    if mine is None or given is None or output is None or mine.shape[1:] != given.shape[1:]:
        return found
    parameter = next(module.parameters())
    try:
        with torch.inference_mode():
            again = module(mine.to(parameter.device, parameter.dtype)[None])[0].float().cpu()
    except Exception:  # a module that needs more than its input
        return found
    rows = min(len(again), len(output), len(given))
    left = float((again[:rows] - output[:rows]).abs().max())
    if again.shape[1:] != output.shape[1:] or left > 0.05 * found.max_abs:
        return found
    distance = (mine[:rows] - given[:rows]).abs()
    worst, scale = float(distance.max()), float(given[:rows].abs().max()) or 1.0
    column = int(distance[found.position].argmax())
    return replace(
        found,
        role="in",
        max_abs=worst,
        relative=worst / scale,
        ours=tuple(float(v) for v in mine[found.position, column : column + 4]),
        theirs=tuple(float(v) for v in given[found.position, column : column + 4]),
        shape_ours=tuple(mine.shape),
        shape_theirs=tuple(given.shape),
    )


def _where(port: nn.Module, original: nn.Module, found: Divergence, diagnosis: Diagnosis) -> str:
    """Return the line to look at: where the module is made, or what it is handed in a call."""
    place: Place | None
    if diagnosis.at.kind == "never called" and (whole := diagnosis.uncalled_around(found.path)):
        place = place_of(port, whole)
        return place.at_call if place is not None else ""
    if diagnosis.blamed:
        place = place_of(port, diagnosis.blamed)
    elif diagnosis.call:
        place = place_of(port, f"{found.path}.{diagnosis.call}")
    elif found.kind == "logits":
        place = method_place(type(port), "compute_logits")
    elif found.kind == "value" and found.role == "out" and _holds_modules(port, found.path):
        place = method_place(type(port.get_submodule(found.path)), "forward")
    elif found.role == "in":
        place = call_of(port, found.path)
    else:
        place = place_of(port, found.path)
    if block := _block_of_vllm(port, found.path):
        return str(place_of(port, block) or "")
    if place is None:
        return ""
    handed = found.role == "in" and not diagnosis.blamed
    return place.at_call if diagnosis.at_call or handed else str(place)


def _block_of_vllm(port: nn.Module, path: str) -> str:
    """Return the outermost block of vLLM's own that makes the module at `path`; "" if none does."""
    modules = dict(port.named_modules(remove_duplicate=False))
    parts = path.split(".")
    for depth in range(1, len(parts)):
        around = modules.get(".".join(parts[:depth]))
        inside = around is not None and not isinstance(around, nn.ModuleList)
        if inside and type(around).__module__.startswith("vllm."):
            return ".".join(parts[:depth])
    return ""


def _holds_modules(model: nn.Module, path: str) -> bool:
    module = dict(model.named_modules(remove_duplicate=False)).get(path)
    # A part of a fused layer has no module of its own.
    return module is not None and any(True for _ in module.children())


def _head(
    engine: Engine, original: nn.Module, ours: Captures, theirs: Captures, tolerance: float
) -> Divergence | None:
    """Give the port's compute_logits the original's last hidden states and compare the logits."""
    hidden = theirs.values.get(("lm_head", "in"))
    wanted = theirs.extra["logits"]
    if hidden is None:
        return None
    parameter = next(engine.model.parameters())
    with torch.inference_mode():
        logits = engine.model.compute_logits(hidden.to(parameter.device, parameter.dtype))
    logits = logits.float().cpu()
    ours.extra["logits"] = logits
    if logits.shape != wanted.shape:
        return Divergence(
            "lm_head",
            "out",
            "shape",
            float("inf"),
            float("inf"),
            0,
            0,
            (),
            (),
            tuple(logits.shape),
            tuple(wanted.shape),
        )
    distance = (logits - wanted).abs()
    scale = float(wanted.abs().max()) or 1.0
    if float(distance.max()) <= tolerance * scale:
        return None
    position = int((distance.max(dim=1).values > tolerance * scale).nonzero()[0])
    column = int(distance[position].argmax())
    return Divergence(
        "lm_head",
        "out",
        "logits",
        float(distance.max()),
        float(distance.max()) / scale,
        position,
        position,
        tuple(float(v) for v in logits[position, column : column + 4]),
        tuple(float(v) for v in wanted[position, column : column + 4]),
        tuple(logits.shape),
        tuple(wanted.shape),
    )


def _table(steps: list[Step]) -> list[list[Any]]:
    return [[s.path, s.role, list(s.shape), s.max_abs, s.relative, s.ok] for s in steps[-SHOWN:]]
