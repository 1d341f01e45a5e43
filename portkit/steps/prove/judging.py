"""Judge one run of the job `prove_run`: vLLM's own rule, the distances, the second time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from portkit.checks.verdict import Table

EXACT = 1e-3
"""Largest |Δ log p| in float32: correct ports lie at 1e-5 to 1e-4, the seeded bugs above 1e-2."""
FLOOR = 2.0
"""In half precision: at most this many times Transformers' own mean distance from float32. Two
implementations round independently, so a correct port is about as far from float32 as that is."""
CARRIED = (
    "Something other than the tokens before decides what comes out: Python in forward keeps state "
    "between calls, or takes its first token for the start of the prompt."
)


@dataclass(frozen=True)
class Judgement:
    """What one run shows."""

    table: Table
    problem: str = ""
    """Empty if the run is right."""
    cause: str = ""
    """The most likely cause, where the numbers tell."""
    log: str = ""
    """What vLLM's rule says, in its own words."""


def judge(value: dict[str, Any]) -> Judgement:
    """Judge the value of one job; the first thing that is wrong decides."""
    rows, table = value["rows"], _table(value)
    if not value["rule"]["ok"]:
        return Judgement(
            table, _broken_rule(value["rule"]["text"], rows), log=value["rule"]["text"]
        )
    exact = value["dtype"] == "float32"
    worst = max(rows, key=lambda r: r["max"])
    if exact and worst["max"] > EXACT:
        return Judgement(
            table,
            f"|Δ log p| is {worst['max']:.1e} on a prompt of {worst['prompt']} tokens; "
            f"{EXACT:.0e} is the bound.",
        )
    ratio = sum(r["mean"] for r in rows) / max(sum(r["floor_mean"] for r in rows), 1e-9)
    if not exact and ratio > FLOOR:
        return Judgement(
            table,
            f"In {value['dtype']} the port is {ratio:.1f} times as far from float32 as "
            f"Transformers itself is; {FLOOR:g} is the bound.",
            "Something that Transformers computes in float32 (norm, softmax, router, rotary) is "
            f"computed in {value['dtype']} here.",
        )
    if not all(r["again_equal"] for r in rows):
        return Judgement(
            table, "Asked again, with its prefix cached, a prompt gets other tokens.", CARRIED
        )
    again = max(rows, key=lambda r: r["again"])
    if exact and again["again"] > EXACT:
        return Judgement(
            table,
            f"Asked again, with its prefix cached, a prompt of {again['prompt']} tokens gets "
            f"log-probabilities that differ by {again['again']:.1e}; {EXACT:.0e} is the bound.",
            CARRIED,
        )
    if value["kept"] and value["scheduled"][1] >= value["scheduled"][0]:
        return Judgement(table, "Prefix caching was on, but no cached token was used.")
    return Judgement(table)


def how(value: dict[str, Any]) -> str:
    """Say in words how the engine ran."""
    if not value["compiled"]:
        return "eager"
    graphs = "" if value["cudagraphs"] == "NONE" else f", CUDA graphs {value['cudagraphs']}"
    return f"compilation mode {value['mode']}{graphs}"


def _broken_rule(text: str, rows: Sequence[dict[str, Any]]) -> str:
    said = "vLLM's own rule (check_logprobs_close: each side's token in the other's top 5) fails"
    match = re.match(r"Test(\d+):", text)
    if match is None:
        return f"{said}: {text.partition(chr(10))[0]}"
    row = rows[int(match[1])]
    return f"{said} at token {row['first_mismatch']} after a prompt of {row['prompt']} tokens."


def _table(value: dict[str, Any]) -> Table:
    first, second = value["scheduled"]
    short = [r for r in value["rows"] if r["asked"] < r["tokens"]]
    limits = "".join(
        f" In {value['dtype']} Transformers itself breaks vLLM's rule at token {r['asked']} after "
        f"the prompt of {r['prompt']} tokens: it is asked up to there."
        for r in short
        if not value["routed"]
    )
    if value["routed"]:
        limits = (
            " Rounding leads routers to other experts for a token here and there, on both sides: "
            "means are those of the token in the middle, along the port's own text, and the rule "
            f"is asked for {sum(r['asked'] for r in value['rows'])} of "
            f"{sum(r['tokens'] for r in value['rows'])} tokens, up to one that stands out."
        )
    if not value["kept"]:
        limits += " No prompt fills a block of the KV cache, so no prefix was cached."
    return Table(
        f"{value['dtype']}, {how(value)}: distance of log-probabilities to Transformers in float32",
        (
            "prompt tokens",
            "generated",
            "first other token",
            "max",
            "mean",
            "Transformers' own mean",
            "max, asked again",
        ),
        tuple(
            (
                r["prompt"],
                r["tokens"],
                "none" if r["first_mismatch"] is None else r["first_mismatch"],
                f"{r['max']:.1e}",
                f"{r['mean']:.1e}",
                f"{r['floor_mean']:.1e}",
                f"{r['again']:.1e}",
            )
            for r in value["rows"]
        ),
        note="Transformers' own mean is its distance from float32 in the engine's precision. Asked "
        f"again: the distance of a second run, which computed {second} tokens where the first "
        f"computed {first}, from the first.{limits}",
    )
