"""Walk two captures side by side, in the original's order, to the first pair that differs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear

from portkit.live.fused import fused_parts
from portkit.live.trace import Captures


@dataclass(frozen=True)
class Step:
    """One pair of captures."""

    path: str
    role: str
    shape: tuple[int, ...]
    max_abs: float
    relative: float
    """max_abs over the largest |value| of the reference."""
    ok: bool


@dataclass(frozen=True)
class Divergence:
    """Where the two sides part."""

    path: str
    """Module path in the original, e.g. "model.layers.0.self_attn"."""
    role: str
    kind: str
    """"value", "shape", "never called" or "logits"."""
    max_abs: float
    relative: float
    position: int
    """The first token position beyond the tolerance."""
    first_ok: int
    """Positions from the start that agree."""
    ours: tuple[float, ...]
    """A few of vLLM's values at the worst place of that position."""
    theirs: tuple[float, ...]
    shape_ours: tuple[int, ...]
    shape_theirs: tuple[int, ...]


def walk(
    ours: Captures,
    theirs: Captures,
    port: nn.Module,
    tolerance: float,
    cut_elsewhere: Collection[str] = (),
) -> tuple[list[Step], Divergence | None]:
    """Compare in the original's order of computing; stop at the first that differs.

    `tolerance` is relative to the largest value of the reference there. A module with others inside
    may differ because the port cuts the work elsewhere (a residual added outside of it): then what
    follows agrees, and it is not what is wrong. `cut_elsewhere`: modules of which that is known;
    what they return is not compared.
    """
    doubt: Divergence | None = None
    followed = False
    """Whether something agreed behind the module in doubt."""
    packed = fused_parts(port)
    modules = dict(port.named_modules(remove_duplicate=False))
    steps: list[Step] = []
    for (path, role), reference in theirs.values.items():
        if role == "out" and path in cut_elsewhere:
            continue
        found = paired(ours, theirs, packed, path, role)
        if found is None:
            unused = _unused_attention(path, role, modules, ours)
            if unused:
                return steps, Divergence(
                    unused,
                    role,
                    "never called",
                    float("inf"),
                    float("inf"),
                    0,
                    0,
                    (),
                    _some(reference[0], 0),
                    (),
                    tuple(reference.shape),
                )
            if role == "out" and _was_skipped(path, modules, ours, reference):
                return steps, Divergence(
                    path,
                    role,
                    "never called",
                    float("inf"),
                    float("inf"),
                    0,
                    0,
                    (),
                    _some(reference[0], 0),
                    (),
                    tuple(reference.shape),
                )
            continue
        if role in ("v", "attn"):
            found = _without_padding(found, reference, _head_size(path, modules))
        rows = min(len(found), len(reference))
        if "AndMul" in type(modules.get(path)).__name__ and role == "out":
            continue  # A fused activation returns the product; the next linear's input shows it.
        if found.shape[1] != reference.shape[1] or not rows:
            return steps, Divergence(
                path,
                role,
                "shape",
                float("inf"),
                float("inf"),
                0,
                0,
                _some(found[0], 0),
                _some(reference[0], 0),
                tuple(found.shape),
                tuple(reference.shape),
            )
        scale = float(reference[:rows].abs().max()) or 1.0
        distance = _distance(found[:rows], reference[:rows])
        worst = float(distance.max())
        if worst > tolerance * scale and role == "out" and fuses(modules.get(path)):
            # Loading may put a fused projection's rows in another order than the checkpoint has:
            # then it gives the same numbers elsewhere. What is cut from it is compared below.
            again = _distance(found[:rows].sort(1).values, reference[:rows].sort(1).values)
            if float(again.max()) <= tolerance * scale:
                distance, worst = again, float(again.max())
        elif worst > tolerance * scale and role in ("q", "k"):
            # Rotary embeddings of pairs may leave them where they are or apart. Where the keys have
            # the order that the queries have, that is the same attention.
            size = _head_size(path, modules)
            both = [_ordered(ours, theirs, path, r, size, tolerance) for r in ("q", "k")]
            if all(order is not None for order in both):
                distance = both[role == "k"]
                worst = float(distance.max())
        ok = worst <= tolerance * scale
        steps.append(Step(path, role, tuple(reference.shape), worst, worst / scale, ok))
        holds = role == "out" and _holds_others(modules.get(path))
        around = holds and doubt is not None and doubt.path.startswith(f"{path}.")
        if ok:
            followed = followed or not holds
            doubt = None if around else doubt
        else:
            if doubt is not None and (around or not (holds or followed)):
                return steps, doubt
            beyond = (distance.max(dim=1).values > tolerance * scale).nonzero()
            position = int(beyond[0])
            column = int(distance[position].argmax())
            here = Divergence(
                path,
                role,
                "value",
                worst,
                worst / scale,
                position,
                position,
                _some(found[position], column),
                _some(reference[position], column),
                tuple(found.shape),
                tuple(reference.shape),
            )
            if not holds:
                return steps, here
            doubt, followed = here, False
    return steps, doubt


def paired(
    ours: Captures, theirs: Captures, packed: dict[str, list[str]], path: str, role: str
) -> torch.Tensor | None:
    """Return our capture for the original's (path, role), cut out of a fused layer if need be."""
    if (path, role) in ours.values:
        return ours.values[path, role]
    parent, _, name = path.rpartition(".")
    for fused, members in packed.items():
        if name not in members:
            continue
        whole = ours.values.get((f"{parent}.{fused}", role))
        if whole is None or role == "in":
            return whole
        parts = [theirs.values.get((f"{parent}.{member}", "out")) for member in members]
        if any(part is None for part in parts):
            return None
        widths = [part.shape[1] for part in parts if part is not None]
        start = sum(widths[: members.index(name)])
        return whole[:, start : start + widths[members.index(name)]]
    return None


def _distance(found: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return |difference| [rows, width]; a NaN is infinitely far."""
    return torch.nan_to_num((found - reference).abs(), nan=float("inf"))


def _head_size(path: str, modules: dict[str, nn.Module]) -> int:
    """Return the head size of the Attention layer in the block `path`, 0 if there is none."""
    return next(
        (
            module.head_size
            for name, module in modules.items()
            if isinstance(module, Attention) and name.rpartition(".")[0] == path
        ),
        0,
    )


def _without_padding(found: torch.Tensor, reference: torch.Tensor, size: int) -> torch.Tensor:
    """Cut the zeros off that fill heads of values up to the size that queries have.

    vLLM's Attention has one size for queries and values; latent attention, expanded, has two.
    """
    if not size or found.shape[1] % size:
        return found
    heads = found.unflatten(1, (-1, size))
    own, rest = divmod(reference.shape[1], heads.shape[1])
    if rest or own >= size or bool(heads[..., own:].any()):
        return found
    return heads[..., :own].flatten(1)


def _ordered(
    ours: Captures, theirs: Captures, path: str, role: str, size: int, tolerance: float
) -> torch.Tensor | None:
    """Return |difference| of heads whose values are the same, but in another order; else None."""
    found, reference = ours.values.get((path, role)), theirs.values.get((path, role))
    if found is None or reference is None or not size or reference.shape[1] % size:
        return None
    rows = min(len(found), len(reference))
    limit = tolerance * (float(reference[:rows].abs().max()) or 1.0)
    if found.shape[1] != reference.shape[1]:
        return None
    if float(_distance(found[:rows], reference[:rows]).max()) <= limit:
        return None
    distance = _distance(
        found[:rows].unflatten(1, (-1, size)).sort(2).values.flatten(1),
        reference[:rows].unflatten(1, (-1, size)).sort(2).values.flatten(1),
    )
    return distance if float(distance.max()) <= limit else None


def _holds_others(module: nn.Module | None) -> bool:
    return module is not None and any(True for _ in module.children())


def fuses(module: nn.Module | None) -> bool:
    """Whether this is a layer of vLLM that holds several of the original's, or parts of one."""
    return isinstance(module, QKVParallelLinear | MergedColumnParallelLinear)


def _was_skipped(
    path: str, modules: dict[str, nn.Module], ours: Captures, reference: torch.Tensor
) -> bool:
    """Whether the port has this module, with weights, but never called it."""
    module = modules.get(path)
    if module is None or any(True for _ in module.children()):
        return False
    own = dict(module.named_parameters(recurse=False))
    # A parallel head is not called: the LogitsProcessor uses its weight.
    head = path == "lm_head" or "Head" in type(module).__name__
    return bool(own) and not head and (path, "out") not in ours.values


def _unused_attention(path: str, role: str, modules: dict[str, nn.Module], ours: Captures) -> str:
    """Return the path of an Attention layer in the block `path` that was never called, or ""."""
    if role != "q" or (path, "q") in ours.values:
        return ""
    return next(
        (
            p
            for p, m in modules.items()
            if isinstance(m, Attention) and p.rpartition(".")[0] == path
        ),
        "",
    )


def _some(row: torch.Tensor, column: int, count: int = 4) -> tuple[float, ...]:
    start = max(0, min(column, len(row) - count))
    return tuple(float(v) for v in row[start : start + count])
