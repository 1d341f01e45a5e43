"""What each rank holds and says to the others, from the evidence of the job `layout`.

Pure functions on plain values; a module row is what `jobs/layout.py` writes. Imports neither torch
nor vLLM.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from portkit.live.layers import Row, pattern


def shares(layout: dict[str, Any], ranks: int) -> list[tuple[str, str, str, str, float, str]]:
    """Return per parameter (pattern, class, whole shape, a rank's shape, fraction, note).

    From building the port as the first and as the last of `ranks` ranks.
    """
    whole = layout["ranks"]["1"]["shapes"][0]
    part = layout["ranks"][str(ranks)]["shapes"][0]
    classes = {row["path"]: row for row in layout["modules"]}
    found: dict[str, tuple[str, str, str, str, float, str]] = {}
    for name, shape in whole.items():
        if name not in part or pattern(name) in found:
            continue
        row = classes.get(name.rpartition(".")[0], {})
        fraction = math.prod(part[name]) / max(1, math.prod(shape))
        found[pattern(name)] = (
            pattern(name),
            row.get("class", ""),
            "x".join(map(str, shape)),
            "x".join(map(str, part[name])),
            round(fraction, 3),
            _share_note(row, fraction, ranks),
        )
    return list(found.values())


def _share_note(row: Row, fraction: float, ranks: int) -> str:
    if abs(fraction - 1 / ranks) < 1e-9:
        return ""
    if row.get("class") == "QKVParallelLinear":
        return "more ranks than KV heads: each holds a copy of one"
    if fraction == 1:
        return "the same on every rank"
    return "not an even share"


def held(layout: dict[str, Any], ranks: int) -> tuple[int, int]:
    """Return (parameters of the whole model, parameters that the first of `ranks` ranks holds)."""
    whole = layout["ranks"]["1"]["shapes"][0]
    part = layout["ranks"][str(ranks)]["shapes"][0]
    return sum(map(math.prod, whole.values())), sum(map(math.prod, part.values()))


@dataclass(frozen=True)
class Talk:
    """What a kind of module says to the other ranks in one forward."""

    path: str
    modules: int
    counted: str
    needed: str
    line: int
    missing: bool
    spare: bool


def talks(layout: dict[str, Any], collectives: dict[str, dict[str, int]]) -> list[Talk]:
    """Compare the collectives of one forward with those that its layers need.

    A RowParallelLinear has to be followed by one all-reduce, its own or that of a module around it
    (models with parallel blocks reduce the sum); embedding and logits need one each.
    """
    found: dict[str, Talk] = {}
    for row in layout["modules"]:
        path, kind = row["path"], row["kind"]
        own = collectives.get(path, {})
        row_parallel = kind == "linear" and (row["class"] == "RowParallelLinear" or row["reduces"])
        if row_parallel or kind == "embedding":
            needed = {"all_reduce": 1}
        elif kind == "logits":
            needed = {"gather or all_gather": 1}
        else:
            needed = {}
        if not needed and not own:
            continue
        total = sum(own.values())
        around = any(
            collectives.get(path.rpartition(".")[0].rsplit(".", n)[0], {}).get("all_reduce")
            for n in (0, 1)
        )
        spare = total > sum(needed.values())
        if not kind:
            # The port's own code calls it, e.g. to gather for a norm over all heads. One thing is
            # wrong for sure: to reduce again what a layer inside has reduced already.
            spare = "all_reduce" in own and any(
                "all_reduce" in calls and inner.startswith(f"{path}.")
                for inner, calls in collectives.items()
            )
        key = pattern(path)
        before = found.get(key)
        found[key] = Talk(
            key,
            (before.modules if before else 0) + 1,
            ", ".join(f"{n} {c}" for c, n in own.items())
            or ("by the module around it" if around else "none"),
            ", ".join(f"{n} {c}" for c, n in needed.items()) or ("none" if kind else "as coded"),
            row["line"],
            bool(before and before.missing) or (bool(needed) and not total and not around),
            bool(before and before.spare) or spare,
        )
    return list(found.values())
