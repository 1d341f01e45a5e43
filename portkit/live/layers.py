"""Judge a port's layers from the evidence of the job `layout`: classes, prefixes, order.

Pure functions on plain values; what they find, the checks of step `parallel` say. A module row is
what `jobs/layout.py` writes. Imports neither torch nor vLLM.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from portkit.analysis.facts import ModelFacts
from portkit.live.fused import disputed

Row = dict[str, Any]
VLLM_KINDS = ("linear", "embedding", "head", "attention")

ROLES = {
    "QKVParallelLinear": "q, k and v in one product; each rank its heads",
    "MergedColumnParallelLinear": "several products in one; each rank its columns of each",
    "ColumnParallelLinear": "each rank its output columns; nothing to say to the others",
    "RowParallelLinear": "each rank its input rows; the partial sums are all-reduced",
    "ReplicatedLinear": "the same on every rank",
    "VocabParallelEmbedding": "each rank its rows of the vocabulary; all-reduced",
    "ParallelLMHead": "each rank its rows of the vocabulary; LogitsProcessor gathers them",
    "Attention": "paged attention over this rank's heads",
    "LogitsProcessor": "gathers the ranks' logits and cuts the padding off",
}


@dataclass(frozen=True)
class Problem:
    """Something wrong with one module."""

    path: str
    line: int
    what: str
    next: str


def pattern(path: str) -> str:
    """Write a module's path for all its layers: model.layers.*.mlp."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)


def grouped(rows: Iterable[Row], kinds: Collection[str]) -> list[tuple[str, int, Row]]:
    """Return (path pattern, count, first row) of the modules of these kinds, in order."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["kind"] in kinds:
            key = (pattern(row["path"]), row["class"], str(row["weights"]))
            found.setdefault(key, []).append(row)
    return [(key[0], len(same), same[0]) for key, same in found.items()]


def advice_on_start(what: str) -> str:
    """Return what to do when vLLM does not even build the model, or "" if its own words must do."""
    if "does not support `--runner" in what:
        return "vLLM finds no text-generation interface on the class: step `forward` comes first."
    if "Duplicate layer name" in what:
        return (
            'Give each Attention its own name: prefix=f"{prefix}.attn", with the layer\'s prefix '
            "handed down from make_layers."
        )
    if "MLA not supported" in what:
        return (
            "portkit compares in float32, for which vLLM has no kernel of latent attention, and "
            "sets VLLM_MLA_DISABLE=1: let the class take plain Attention where "
            "model_config.use_mla is false, as vLLM's deepseek_v2.py does."
        )
    return ""


# ---- classes ------------------------------------------------------------------------------------


def class_problems(layout: dict[str, Any], facts: ModelFacts) -> list[Problem]:
    """Return the modules that are not of the class that vLLM's guide has for their role."""
    problems = []
    for path, count, row in grouped(layout["modules"], ("nn.Linear", "nn.Embedding", "linear")):
        times = f" ({count} of them)" if count > 1 else ""
        shape = row["weights"].get("weight") or [0, 0]
        if row["kind"] == "nn.Embedding":
            if shape[0] != layout["vocab_size"]:
                continue  # Learned positions and the like: small, and every rank needs all of it.
            problems.append(
                Problem(
                    path,
                    row["line"],
                    f"{path} is an nn.Embedding of {shape[0]} rows{times}: every rank would hold "
                    f"the whole vocabulary",
                    "VocabParallelEmbedding(vocab_size, hidden_size, quant_config=quant_config, "
                    "prefix=...) "
                    "belongs there.",
                )
            )
        elif row["kind"] == "nn.Linear":
            belongs, why = class_for(path.rpartition(".")[2], shape, layout, facts)
            problems.append(
                Problem(
                    path,
                    row["line"],
                    f"{path} is an nn.Linear{times}: every rank would hold and compute all of "
                    f"it, and "
                    "no quantisation could reach it",
                    f"{belongs} belongs there: {why}.",
                )
            )
        elif row["class"] == "ReplicatedLinear" and min(shape) >= layout["hidden_size"]:
            belongs, why = class_for(path.rpartition(".")[2], shape, layout, facts)
            problems.append(
                Problem(
                    path,
                    row["line"],
                    f"{path} is a ReplicatedLinear of {shape[0]}x{shape[1]}{times}: every rank "
                    f"holds and "
                    "computes all of it",
                    f"{belongs} belongs there: {why}. ReplicatedLinear is for small products "
                    f"such as routers.",
                )
            )
    return problems


def class_for(
    attr: str, shape: list[int], layout: dict[str, Any], facts: ModelFacts
) -> tuple[str, str]:
    """Return the class that belongs where a linear stands, and why: by its role, else its shape."""
    attention, head = facts.attention, facts.head
    if attention and attr in {
        x.attr for x in (attention.q, attention.k, attention.v, attention.qkv) if x
    }:
        return (
            "QKVParallelLinear",
            "q, k and v become one `qkv_proj` that gives each rank its heads",
        )
    if attention and attention.o and attr == attention.o.attr:
        return (
            "RowParallelLinear",
            "its input is this rank's heads, its partial sums are all-reduced",
        )
    if (head and attr == head.attr) or shape[0] >= layout["vocab_size"]:
        return (
            "ParallelLMHead",
            "with LogitsProcessor in compute_logits, each rank has its rows of the vocabulary",
        )
    for mlp in facts.mlp:
        if mlp.down and attr == mlp.down.attr:
            return "RowParallelLinear", "its input is this rank's part of the MLP's width"
        if mlp.gate and attr in {x.attr for x in (mlp.gate, mlp.up) if x}:
            return (
                "MergedColumnParallelLinear",
                "gate and up become one `gate_up_proj`, followed by SiluAndMul",
            )
        if mlp.up and attr == mlp.up.attr:
            return "ColumnParallelLinear", "each rank computes its part of the MLP's width"
    if min(shape) < layout["hidden_size"]:
        return "ReplicatedLinear", "it is small, and what follows needs all of it"
    if shape[1] > shape[0]:
        return "RowParallelLinear", "it goes from a wide, divided input back to the hidden size"
    return "ColumnParallelLinear", "each rank computes its columns of the output"


# ---- prefixes -----------------------------------------------------------------------------------


def prefix_problems(layout: dict[str, Any], tensors: Collection[str]) -> list[Problem]:
    """Return modules whose prefix is not their path, or that the quantisation config never sees.

    `tensors` are the checkpoint's names: fused layers whose members stand there need
    packed_modules_mapping.
    """
    problems: dict[tuple[str, str], Problem] = {}
    rows = [row for row in layout["modules"] if row["kind"] in VLLM_KINDS]
    lines = {row["path"]: row["line"] for row in layout["modules"]}
    for row in rows:
        path = row["path"]
        if row["kind"] == "embedding" and not row["prefix"]:
            # As in many of vLLM's own classes: only formats that quantise embeddings would miss it.
            continue
        if row["kind"] == "attention" and len(re.findall(r"\.\d+(?=\.|$)", path)) > 1:
            # vLLM tells KV caches apart by the one number in their name: a path has too many.
            continue
        if row["quant"] is None and _never_quantised(row):
            continue
        if row["prefix"] != path and row["kind"] != "head":
            wrong = _misnamed(path, row["prefix"] or "")
            problems.setdefault(
                (pattern(path), "prefix"),
                Problem(
                    path,
                    lines.get(wrong) or row["line"],
                    f"{path} was given the prefix {row['prefix']!r}"
                    if row["prefix"]
                    else f"{path} was given no prefix",
                    f'Pass prefix=f"{{prefix}}.{wrong.rpartition(".")[2]}" where '
                    f"{'it' if wrong == path else wrong} is made: a quantised checkpoint names "
                    "layers by their path.",
                ),
            )
        elif row["kind"] == "head" and row["prefix"] != path and not _is_tied(path, layout):
            problems.setdefault(
                (path, "prefix"),
                Problem(
                    path,
                    row["line"],
                    f"{path} was given the prefix {row['prefix']!r}",
                    f'Pass prefix=maybe_prefix(prefix, "{path}").',
                ),
            )
        if (
            row["quant"] is None
            and not row["closed"]
            and row["kind"] not in ("embedding", "gate")
            and not _is_tied(path, layout)
        ):
            problems.setdefault(
                (pattern(path), "quant"),
                Problem(
                    path,
                    row["line"],
                    f"{path} was given no quant_config: "
                    + (
                        "the scales of a quantised KV cache would find no place"
                        if row["kind"] == "attention"
                        else "it would silently stay unquantised"
                    ),
                    "Pass quant_config=quant_config where it is made, and hand it down from "
                    "vllm_config.quant_config.",
                ),
            )
    return [*problems.values(), *_packed_problems(layout, rows, tensors)]


def _misnamed(path: str, prefix: str) -> str:
    """Return the module that was made with a wrong prefix: the layer, or what hands it one."""
    names, given = path.split("."), prefix.split(".")
    while min(len(names), len(given)) > 1 and names[-1] == given[-1]:
        names, given = names[:-1], given[:-1]
    return path if names[-1].isdigit() else ".".join(names)


def _never_quantised(row: Row) -> bool:
    """A convolution's weight in a linear (it has three dimensions), or a gate of a single row.

    The first is an nn.Conv1d of the original, the second no kernel for quantised weights takes.
    """
    shape = row["weights"].get("weight") or ()
    return len(shape) == 3 or (row["class"] == "ReplicatedLinear" and shape[:1] == [1])


def _packed_problems(
    layout: dict[str, Any], rows: list[Row], tensors: Collection[str]
) -> list[Problem]:
    parts = {part for name in tensors for part in name.split(".")}
    problems: dict[str, Problem] = {}
    for row in rows:
        attr = row["path"].rpartition(".")[2]
        if row["class"] not in ("QKVParallelLinear", "MergedColumnParallelLinear") or attr in parts:
            continue
        members = layout["packed"].get(attr)
        if not members:
            problems.setdefault(
                attr,
                Problem(
                    row["path"],
                    row["line"],
                    f"{attr} fuses layers of the checkpoint, but packed_modules_mapping does not "
                    f"name it",
                    f'Add "{attr}": [...] with the checkpoint\'s names, in their order, to '
                    f"packed_modules_mapping of "
                    "the ForCausalLM class: ignore lists and LoRA adapters speak of the parts.",
                ),
            )
        elif strangers := [m for m in members if m not in parts]:
            problems.setdefault(
                attr,
                Problem(
                    row["path"],
                    row["line"],
                    f"packed_modules_mapping says that {attr} holds {', '.join(strangers)}, "
                    f"which is in no tensor's name",
                    "Use the names of the checkpoint's tensors.",
                ),
            )
    return list(problems.values())


def order_problems(layout: dict[str, Any]) -> list[Problem]:
    """Return fused layers whose parts packed_modules_mapping and the mapper order differently."""
    problems = []
    for attr in disputed(layout["packed"], layout["stacked"]):
        row = next(row for row in layout["modules"] if row["path"].rpartition(".")[2] == attr)
        problems.append(
            Problem(
                row["path"],
                row["line"],
                f"packed_modules_mapping says that {attr} holds "
                f"{', '.join(layout['packed'][attr])}, in hf_to_vllm_mapper their shards are in "
                f"the order {', '.join(layout['stacked'][attr])}",
                "List the parts in the order of their shards: an adapter or a scale of one lands "
                "in the other's place.",
            )
        )
    return problems


def _is_tied(path: str, layout: dict[str, Any]) -> bool:
    """A tied head may be the embedding itself, or share its weight and leave its own name out."""
    own = next(row for row in layout["modules"] if row["path"] == path)
    return own["kind"] == "head" and bool(layout.get("tied"))
