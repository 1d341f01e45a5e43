"""Load a port's blueprint from headers alone, and from checkpoints with one thing wrong with them.

What is the port's duty and what is portkit's audit:
- a tensor of another shape must not be reshaped to fit: the port's duty. vLLM's loaders raise,
  except that a part of a fused layer with too many rows is cut, silently: the audit sees the rest;
- the returned names must be those really written: the port's duty, since vLLM believes them;
- a missing tensor leaves a parameter unwritten, an extra one is left over, one that comes twice
  overwrites itself: portkit's audit names each, whether or not anything is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from portkit.live.blueprint import Blueprint, as_rank
from portkit.live.checkpoint import Checkpoint, TensorInfo
from portkit.live.coverage import Coverage, Tracer, from_headers
from portkit.live.failure import describe
from portkit.live.loader import read_tensors

NO_VALUES = (
    "meta tensor",
    "Meta tensor",
    "data-dependent",
    "aten::_local_scalar_dense",
    "Tensor.item()",
)


def load(
    blueprint: Blueprint,
    tensors: Iterable[TensorInfo],
    root: str,
    checkpoint: Checkpoint | None = None,
) -> Coverage:
    """Run the port's load_weights on headers; on values if it needs them and they are given."""
    tensors = list(tensors)
    found = _load(blueprint, lambda: from_headers(tensors), root)
    if checkpoint is not None and any(word in found.error.get("what", "") for word in NO_VALUES):
        found = _load(blueprint, lambda: read_tensors(checkpoint), root)
    return found


def _load(
    blueprint: Blueprint, stream: Callable[[], Iterator[tuple[str, torch.Tensor]]], root: str
) -> Coverage:
    tracer = Tracer(blueprint.model)
    returned, error = None, {}
    try:
        # Some of vLLM's classes ask for the rank only now.
        with as_rank(blueprint.ranks, blueprint.rank), tracer:
            returned = blueprint.model.load_weights(tracer.watch(stream()))
    except Exception as raised:
        error = describe_load(raised, tracer, root)
    found = tracer.coverage(returned)
    found.error = error
    return found


def describe_load(raised: Exception, tracer: Tracer, root: str) -> dict[str, str]:
    """Return what, where, next and type of what load_weights raised, with the tensor at hand."""
    error = {**describe(raised, root), "type": type(raised).__name__, "tensor": ""}
    if tracer.last is not None:
        error["tensor"] = f"{tracer.last[0]} ({_x(tracer.last[1])})"
    return error


@dataclass(frozen=True)
class Bad:
    """A checkpoint with one thing wrong."""

    kind: str
    """"missing", "extra", "shape" or "twice"."""
    what: str
    tensor: str
    tensors: tuple[TensorInfo, ...]


def bad_checkpoints(tensors: tuple[TensorInfo, ...], sound: Coverage) -> list[Bad]:
    """Return one bad checkpoint of each kind for each kind of parameter (`sound`: a good load)."""
    cases = []
    # A buffer keeps what the constructor put there: no loader misses a tensor for it.
    needed = {s for f in sound.parameters.values() if f.required for s in f.sources}
    for info in _one_of_each(tensors, sound):
        rest = tuple(t for t in tensors if t.name != info.name)
        if info.name in needed:
            cases.append(Bad("missing", f"{info.name} is missing", info.name, rest))
        for words, shape in _other_shapes(info):
            other = replace(info, shape=shape)
            wrong = tuple(other if t.name == info.name else t for t in tensors)
            cases.append(
                Bad(
                    "shape",
                    f"{info.name} {words}: {_x(shape)} instead of {_x(info.shape)}",
                    info.name,
                    wrong,
                )
            )
    first = next(t for t in tensors if len(t.shape) == 2)
    names = {t.name for t in tensors}
    layer = next((t for t in tensors if len(t.shape) == 2 and ".0." in t.name), first)
    head, dot, last = layer.name.rpartition(".weight")
    extra = replace(layer, name=f"{head or last}_extra{dot}")
    cases.append(Bad("extra", f"{extra.name} is one too many", extra.name, (*tensors, extra)))
    for info in tensors:
        bias = info.name.removesuffix(".weight") + ".bias"
        if (
            ".0." in bias
            and len(info.shape) == 2
            and bias not in names
            and bias != info.name + ".bias"
        ):
            # AutoWeightsLoader ignores every bias that has no parameter, without a word.
            new = replace(info, name=bias, shape=info.shape[:1])
            cases.append(Bad("extra", f"{bias} is one too many", bias, (*tensors, new)))
            break
    cases.append(Bad("twice", f"{first.name} comes twice", first.name, (*tensors, first)))
    return cases


def _one_of_each(tensors: tuple[TensorInfo, ...], sound: Coverage) -> list[TensorInfo]:
    """Return a tensor of each kind: weight or bias, in a layer or not, alone or a part."""
    fused = {s for f in sound.parameters.values() if len(f.sources) > 1 for s in f.sources}
    seen: dict[tuple[Any, ...], TensorInfo] = {}
    for info in tensors:
        if sound.tensors.get(info.name):
            parts = info.name.split(".")
            in_layer = any(part.isdigit() for part in parts)
            # Outside the layers each tensor is one of its kind: embedding, last norm, head.
            key = (parts[-1], len(info.shape), info.name in fused, in_layer or info.name)
            seen.setdefault(key, info)
    return list(seen.values())


def _other_shapes(info: TensorInfo) -> list[tuple[str, tuple[int, ...]]]:
    shape = info.shape
    if not shape or min(shape) < 2:
        return []
    found = [("has a row too many", (shape[0] + 1, *shape[1:]))]
    if len(shape) == 2 and shape[0] != shape[1]:
        found.append(("is transposed", (shape[1], shape[0])))
    elif len(shape) == 2:
        found.append(("has a column too few", (shape[0], shape[1] - 1)))
    return found


def _x(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def first_layer(tensors: Iterable[TensorInfo]) -> tuple[TensorInfo, ...]:
    """Return the tensors of the first layer and those outside the layers."""
    numbered = [
        (t, next((int(p) for p in t.name.split(".") if p.isdigit()), None)) for t in tensors
    ]
    first = min((n for _, n in numbered if n is not None), default=None)
    return tuple(t for t, n in numbered if n in (None, first))


def judge(bad: Bad, found: Coverage, sound: Coverage) -> dict[str, Any]:
    """Say what the port did with a bad checkpoint, what portkit's audit sees, and if that will do.

    `sound` is how the same tensors load when nothing is wrong with them.
    """
    raised = found.error.get("what", "")
    news = [n for n in found.unwritten if n not in sound.unwritten]
    sees = ""
    if bad.kind == "missing" and news:
        left = found.unwritten[news[0]]
        count = left.elements - left.written + left.constant
        sees = f"{news[0]}: {count} of {left.elements} elements unwritten"
    elif bad.kind in ("extra", "shape") and bad.tensor in found.unconsumed:
        sees = f"{bad.tensor} went nowhere"
    elif bad.kind == "shape" and bad.tensor in found.cut:
        count = found.tensors[bad.tensor]
        sees = f"only {count} of its {found.sizes[bad.tensor]} elements went anywhere"
    elif bad.kind == "shape" and news:
        sees = f"{news[0]} is not full"
    elif bad.kind == "twice" and found.twice:
        sees = f"{next(iter(found.twice))} was written twice"
    duty = ""
    if bad.kind == "missing" and not raised and found.returned is not None:
        claimed = [n for n in news if n in found.returned and not found.unwritten[n].sources]
        if claimed:
            duty = f"load_weights says that it loaded {claimed[0]}, which no tensor was for"
    if not duty and not raised and not sees:
        duty = (
            "the port reshapes it into its parameter, and nobody notices"
            if bad.kind == "shape"
            else "neither the port nor the audit notices"
        )
    return {
        "kind": bad.kind,
        "what": bad.what,
        "tensor": bad.tensor,
        "raised": raised,
        "where": found.error.get("where", ""),
        "audit": sees,
        "duty": duty,
    }
