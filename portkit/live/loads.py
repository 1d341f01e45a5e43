"""Judge how a port loads, from the evidence of the job `load`, and say what stopped it.

Pure functions on plain values; what they find, the checks of step `weights` say. Imports neither
torch nor vLLM.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from portkit.checks.verdict import Table

VARIANTS = {"tied": "a tied head", "untied": "a head of its own"}

MISPLACED = (
    'two parts of a fused layer are swapped: the shard ids "q", "k", "v" or 0 (gate), 1 (up) in '
    "the mapper",
    "a fused checkpoint tensor has its rows in another order than vLLM's layer (heads interleaved)",
    "a square weight lacks a transpose (Conv1D checkpoints)",
    "the head is tied to the embedding, or is not, against the config",
)
MISPLACED_ON_RANKS = (
    "a tensor is written without the parameter's weight_loader, so each rank takes the same part "
    "of it",
    "a fused tensor is cut by rank before it is taken apart: q's rows land in k and v",
    "a bias of a RowParallelLinear is loaded on every rank and added as often",
)


@dataclass(frozen=True)
class Problem:
    """Something wrong with the load."""

    what: str
    next: str
    line: int = 0
    causes: tuple[str, ...] = ()


def mib(count: int) -> str:
    return f"{count / (1 << 20):.1f}"


def nan_rows(found: dict[str, Any]) -> list[tuple[str, int, int, str]]:
    """Return (parameter, NaN elements, elements, tensors it came from)."""
    parameters = (found.get("coverage") or {}).get("parameters", {})
    return [
        (
            name,
            count,
            parameters.get(name, {}).get("elements", 0),
            ", ".join(parameters.get(name, {}).get("sources", ())),
        )
        for name, count in found.get("nan", {}).items()
    ]


def refused_heads(tied: dict[str, Any]) -> dict[str, str]:
    """Return the variants that the constructor refuses, or load_weights by naming the head: words.

    A limit and no fault, unless it is the port's own checkpoint: nobody computes with less.
    """
    attr = tied["head"].rpartition(".")[0]
    own = "tied" if tied["ties"] else "untied"
    return {
        name: variant["error"]["what"]
        for name, variant in tied["variants"].items()
        if variant["error"]
        and name != own
        and (variant.get("refused") or f"'{attr}'" in variant["error"]["what"])
    }


def head_problem(tied: dict[str, Any]) -> Problem | None:
    """Return what is wrong with tied or untied heads; a variant that is refused is none of it."""
    head, embedding = tied["head"], tied["embedding"]
    variants = tied["variants"]
    for name, variant in variants.items():
        if variant["error"] and name not in refused_heads(tied):
            return Problem(
                f"With a head that is {name}, load_weights stops: {variant['error']['what']}",
                "Make self.lm_head in any case, and share the weight if "
                "config.tie_word_embeddings: "
                "self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens).",
            )
    untied = variants["untied"]
    shared = set(untied["head_from"]) & set(untied["embedding_from"])
    if not untied["error"] and (shared or not untied["head_from"]):
        return Problem(
            f"The checkpoint has a head of its own ({head}) and tie_word_embeddings is false, "
            f"but the port ties it: "
            + (
                f"{head} overwrites {embedding}."
                if untied["head_from"]
                else f"{head} is thrown away."
            ),
            "Tie only if config.tie_word_embeddings.",
            causes=(
                "the head is tied unconditionally",
                "the flag is read from another config than the checkpoint's",
            ),
        )
    plain = variants["tied"]
    left = [n for n in plain["unwritten"] if n not in untied["unwritten"] and not plain["error"]]
    if left:
        return Problem(
            f"tie_word_embeddings is true and the checkpoint stores no {head}, but {left[0]} "
            f"stays unfilled: the logits "
            "would be random.",
            "if config.tie_word_embeddings: self.lm_head = "
            "self.lm_head.tie_weights(self.model.embed_tokens)",
            causes=(
                "the head is built but never tied",
                "the flag is read from another config than the checkpoint's",
            ),
        )
    copy = variants["tied, a copy stored"]
    if copy["twice"]:
        return Problem(
            f"With a tied head of which the checkpoint stores a copy, {copy['twice'][0]} is "
            f"written twice.",
            "Leave tied names out: AutoWeightsLoader does, once tie_weights was called.",
        )
    return None


def cases_table(found: dict[str, Any]) -> Table:
    return Table(
        "Against Transformers",
        ("prompt", "positions", "largest difference", "within tolerance"),
        tuple(
            (c["name"], c["rows"], f"{c['max_abs']:.1e}", "yes" if c["ok"] else "NO")
            for c in found["cases"]
        ),
        f"Tolerance {found['tolerance'][0]:g}: {found['tolerance'][1]}."
        if found.get("tolerance")
        else "",
    )


def stopped(error: dict[str, Any]) -> str:
    """Say that load_weights, or vLLM after it, raised; with the tensor it was at."""
    if error.get("vllm"):
        return f"vLLM refuses what load_weights did: {error['what']}"
    at = f" at {error['tensor']}" if error.get("tensor") else ""
    return f"load_weights stopped{at}: {error['what']}"


def said_left_out(left: list[str]) -> str:
    """Say how many tensors Transformers ignores too, for the end of a verdict; "" for none."""
    if not left:
        return ""
    more = " and others" if left[1:] else ""
    return (
        f" {len(left)} more went nowhere, as in Transformers, which ignores them: {left[0]}{more}."
    )


def advice_on(what: str, tensor: str = "", ignored: Iterable[str] = ()) -> str:
    """Return what helps against an error that load_weights, or vLLM after it, raised.

    `tensor` is the one it was at, `ignored` those that Transformers ignores.
    """
    if tensor.partition(" ")[0] in ignored:
        return (
            f"Transformers ignores {tensor.partition(' ')[0]}: leave it out too, by a mapper with "
            "None in its place (orig_to_new_prefix, _substr) or, where only this checkpoint has "
            "too much, by AutoWeightsLoader(self, ignore_unexpected_prefixes=[...])."
        )
    if match := re.search(r"no module or parameter named '([^']+)'", what):
        return (
            f"Map {match[1]!r} to a name that the port has (orig_to_new_prefix, _substr or "
            f"_stacked), and pass "
            "mapper= to loader.load_weights."
        )
    if "not initialized from checkpoint" in what:
        return "These parameters were in no returned name: follow their tensors through the mapper."
    if "object is not iterable" in what or "NoneType" in what:
        return "load_weights gets an iterator of (name, tensor) and returns a set of names."
    return "The log has the whole traceback; the line named is the port's last one before it."


def causes_of(what: str) -> tuple[str, ...]:
    """Return likely causes of such an error."""
    if "no module or parameter named" in what:
        return (
            "the mapper was not passed, or lacks this name",
            "a layer has another attribute name than the checkpoint",
        )
    if "not initialized from checkpoint" in what:
        return ("a filter keeps norms out", "the checkpoint lacks these tensors")
    if "size" in what or "shape" in what or "AssertionError" in what:
        return (
            "the shard ids of a fused layer's parts are swapped in the mapper: q, k and v differ "
            "in size",
            "a tensor is of another shape than the layer: compare the sizes it was made with",
            "a checkpoint of another size than config.json says",
            "a transpose is missing or one too many (Conv1D checkpoints)",
        )
    return ()
