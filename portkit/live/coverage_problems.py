"""What the evidence of job `coverage` says: tensors that went nowhere, parameters left unfilled.

Pure functions on plain values. Imports neither torch nor vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from portkit.checks.verdict import Table
from portkit.live.layers import pattern
from portkit.live.loads import Problem, advice_on

UNFILLED = (
    "a filter or a mapping to None keeps its tensor out",
    "the mapper sends its tensor to another name",
    "the parameter is the port's own: no tensor of the checkpoint is meant for it",
)


def coverage_table(whole: dict[str, Any]) -> Table:
    """One row per kind of parameter: what filled it."""
    rows: dict[tuple[str, str, str], int] = {}
    for name, filled in whole["parameters"].items():
        if not filled["required"] and not filled["sources"]:
            continue
        part = 100 * filled["written"] / max(1, filled["elements"])
        padding = (
            f", {filled['constant']} of them by a constant (padding)" if filled["constant"] else ""
        )
        state = f"{part:.4g} %{padding}" + (f", {filled['twice']} twice" if filled["twice"] else "")
        key = (
            pattern(name),
            ", ".join(pattern(s).rpartition(".layers.*.")[2] for s in filled["sources"]),
            state,
        )
        rows[key] = rows.get(key, 0) + 1
    return Table(
        "What filled each parameter",
        ("parameter", "count", "from", "elements written"),
        tuple(
            (name, count, sources or "NOTHING", state)
            for (name, sources, state), count in rows.items()
        ),
    )


def coverage_problems(found: dict[str, Any]) -> list[Problem]:
    """Return what is wrong: tensors that went nowhere first, then unfilled parameters, doubles."""
    whole, lines = found["whole"], found["lines"]
    problems = [
        _unconsumed(group, whole, lines, found) for group in _groups(_truly_unconsumed(found))
    ]
    problems += [_unfilled(group, whole, lines) for group in _groups(whole["unwritten"])]
    problems = [*_strayed(whole), *problems]
    for group in _groups(whole["cut"]):
        name = group[0]
        problems.append(
            Problem(
                f"only {whole['tensors'][name]:,} of the {whole['sizes'][name]:,} elements of "
                f"{name} went anywhere{_count(group)}",
                "Compare its shape with the sizes the layer was made with.",
                0,
                (
                    "load_weights slices it",
                    "a fused layer's part is smaller than its tensor, and vLLM's loader cuts it",
                ),
            )
        )
    for group in _groups(whole["twice"]):
        filled = whole["parameters"][group[0]]
        line = lines.get(group[0], 0)
        problems.append(
            Problem(
                f"{group[0]} was written more than once, by "
                f"{', '.join(filled['sources'])}{_count(group)}",
                "Give each part of a fused layer its own shard id.",
                line,
                (
                    "two parts have the same shard id in the mapper",
                    "a tied head's stored copy overwrites the embedding",
                ),
            )
        )
    if problems:
        return problems
    for rank, one in enumerate(found["ranks"]):
        if one["error"]:
            problems.append(
                Problem(
                    f"on rank {rank} of two, load_weights stopped: {one['error']['what']}",
                    advice_on(one["error"]["what"]),
                )
            )
        elif one["unwritten"]:
            problems.append(
                Problem(
                    f"on rank {rank} of two, {one['unwritten'][0]} is not "
                    f"filled{_count(one['unwritten'])}",
                    "Write through the parameter's weight_loader: it takes this rank's part.",
                    lines.get(one["unwritten"][0], 0),
                )
            )
    return problems


def _truly_unconsumed(found: dict[str, Any]) -> list[str]:
    """A stored copy of a tied head may go nowhere, and what Transformers ignores as well."""
    copy = (found.get("tied") or {}).get("head") if found["ties"] else None
    return [n for n in found["whole"]["unconsumed"] if n != copy and n not in found["ignored"]]


def left_out(found: dict[str, Any]) -> list[str]:
    """Return the tensors that went nowhere and that Transformers ignores as well."""
    return [name for name in found["whole"]["unconsumed"] if name in found["ignored"]]


def _groups(names: Iterable[str]) -> list[list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(pattern(name), []).append(name)
    return list(found.values())


def _count(group: list[str]) -> str:
    return f" (and the same in {len(group) - 1} more layers)" if len(group) > 1 else ""


def _strayed(whole: dict[str, Any]) -> list[Problem]:
    """Return the parameters whose own tensor went into another one that has its own as well."""
    into = {
        source: name
        for name in whole["twice"]
        for source in whole["parameters"][name]["sources"]
        if source != name
    }
    return [
        Problem(
            f"{name} was filled from no tensor: its own went into {into[name]}, which has one",
            "Follow its name through load_weights and the mapper.",
            0,
            ("the mapper, or load_weights, sends its tensor to another name", *UNFILLED[:1]),
        )
        for name in whole["unwritten"]
        if name in into
    ]


def _unconsumed(
    group: list[str], whole: dict[str, Any], lines: dict[str, int], found: dict[str, Any]
) -> Problem:
    name = group[0]
    parent, _, last = name.rpartition(".")
    sibling = next(
        (p for p, f in whole["parameters"].items() if f"{parent}.weight" in f["sources"]), ""
    )
    if last == "bias" and sibling:
        return Problem(
            f"{name} went nowhere{_count(group)}: {sibling.rpartition('.')[0]} has no bias",
            "Build the layer with bias=True (or the config's field): AutoWeightsLoader ignores a "
            "bias without a "
            "parameter, silently.",
            lines.get(sibling, 0),
            (
                "the layer was built with bias=False, or with another config field than in "
                "Transformers",
            ),
        )
    causes = (
        "a filter or a mapping to None keeps it out",
        "the mapper sends it to a name that is skipped",
        "the port has no such layer",
    )
    line = 0
    # A tied head is no parameter of its own; one that is and stays empty was passed over.
    if name == (found.get("tied") or {}).get("head") and name not in whole["unwritten"]:
        causes = ("the head is tied to the embedding although the config does not say so", *causes)
        line = lines.get(name, 0)
    return Problem(
        f"{name} went nowhere{_count(group)}",
        "Follow its name through the mapper to the parameter it is for.",
        line,
        causes,
    )


def _unfilled(group: list[str], whole: dict[str, Any], lines: dict[str, int]) -> Problem:
    name = group[0]
    filled = whole["parameters"][name]
    left = filled["elements"] - filled["written"]
    if filled["sources"]:
        what = (
            f"{left:,} of the {filled['elements']:,} elements of {name} were not "
            f"written{_count(group)}; "
            f"filled from {', '.join(filled['sources'])}"
        )
    else:
        what = f"{name} was filled from no tensor{_count(group)}"
    causes = UNFILLED
    if name.endswith("lm_head.weight") and not filled["sources"]:
        causes = (
            "the head is not tied to the embedding although the config says so "
            "(tie_word_embeddings)",
            *UNFILLED,
        )
    return Problem(
        what,
        "The engine would start and compute with what was in memory: vLLM's own check exempts "
        "such layers.",
        lines.get(name, 0),
        causes,
    )
