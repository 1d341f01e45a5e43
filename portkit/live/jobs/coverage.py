"""Job: follow every tensor of the checkpoint through the port's load_weights, from headers alone.

value: whole (one rank: coverage.Coverage), ranks (2 ranks: each its coverage), lines (parameter ->
line of the port that made its module), ignored
(tensors that Transformers ignores too), tied (per variant of the head: coverage and what is wrong),
ties (the config's word on it),
bad (per bad checkpoint: what the port did, what the audit saw), file.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from portkit.errors import PortkitError
from portkit.live.blueprint import Blueprint, Workbench, workbench
from portkit.live.checkpoint import Checkpoint, open_checkpoint
from portkit.live.derived import Head, head_of, tensors_for
from portkit.live.failure import describe
from portkit.live.ignored import ignored_by
from portkit.live.job import JobRequest
from portkit.live.loading import bad_checkpoints, first_layer, judge, load
from portkit.live.rank_counts import refusal
from portkit.live.reference import original_class
from portkit.port import Port


def run(request: JobRequest, say: Callable[[str], None]) -> dict[str, Any]:
    """Trace; what building the port raises passes through, what loading raises is in the value."""
    port = Port(Path(request.port_root))
    root = str(port.root)
    checkpoint = open_checkpoint(port.checkpoint)
    with workbench(port, checkpoint) as bench:
        blueprint = bench.build()
        if not callable(getattr(blueprint.model, "load_weights", None)):
            raise PortkitError(
                f"{port.architecture} has no load_weights.",
                port.modeling.name,
                "Write it: AutoWeightsLoader(self).load_weights(weights, mapper=...), and return "
                "its answer.",
            )
        say(f"following {len(checkpoint.tensors)} tensors through load_weights")
        whole = load(blueprint, checkpoint.tensors, root, checkpoint)
        original = original_class(port)
        ignored = ignored_by(original, checkpoint)
        value: dict[str, Any] = {
            "file": port.modeling.name,
            "ignored": list(ignored),
            "whole": whole.to_dict(),
            "lines": lines(blueprint),
            "ranks": [],
            "ties": bool(
                getattr(bench.config.model_config.hf_config, "tie_word_embeddings", False)
            ),
        }
        if not refusal(checkpoint.config, 2) and not whole.error:
            value["ranks"] = [
                load(bench.build(2, rank), checkpoint.tensors, root, checkpoint).to_dict()
                for rank in (0, 1)
            ]
        say("loading checkpoints with tied and untied heads")
        head = head_of(original, checkpoint)
        heads = _heads(bench, checkpoint, head, root) if head else {}
        value["tied"] = heads and {**heads, "ties": value["ties"]}
        if not whole.error:
            say("loading checkpoints with one thing wrong")
            some = first_layer(t for t in checkpoint.tensors if t.name not in ignored)
            sound = load(blueprint, some, root, checkpoint)
            value["bad"] = [
                judge(bad, load(blueprint, bad.tensors, root), sound)
                for bad in bad_checkpoints(some, sound)
            ]
            value["bad"].append(_two_shards(checkpoint, port.state_dir / "cache" / "two-shards"))
    return value


def lines(blueprint: Blueprint) -> dict[str, int]:
    """Return for each parameter the line of the port that made its module."""
    modules = dict(blueprint.model.named_modules(remove_duplicate=False))
    return {
        name: blueprint.line_of(modules[name.rpartition(".")[0]])
        for name, _ in blueprint.model.named_parameters(remove_duplicate=False)
    }


def _heads(bench: Workbench, checkpoint: Checkpoint, head: Head, root: str) -> dict[str, Any]:
    """Load headers with a tied head, with a tied one that is stored too, and with an untied one."""
    stored = tensors_for(checkpoint, head, tied=False)
    variants = {
        "tied": (True, tensors_for(checkpoint, head, tied=True)),
        "tied, a copy stored": (True, stored),
        "untied": (False, stored),
    }
    found: dict[str, Any] = {"head": head.weight, "embedding": head.embedding, "variants": {}}
    for name, (tied, tensors) in variants.items():
        try:
            blueprint = bench.build(tie_word_embeddings=tied)
        except Exception as error:  # a class may refuse a tied head, or one of its own
            found["variants"][name] = {
                "error": describe(error, root),
                "refused": True,
                **NOTHING_LOADED,
            }
            continue
        # Values are not at hand for a tensor that the checkpoint lacks.
        done = load(blueprint, [replace(t) for t in tensors], root)
        found["variants"][name] = {
            "error": done.error,
            "unwritten": list(done.unwritten),
            "unconsumed": done.unconsumed,
            "twice": list(done.twice),
            "head_from": [n for n, f in done.parameters.items() if head.weight in f.sources],
            "embedding_from": [
                n for n, f in done.parameters.items() if head.embedding in f.sources
            ],
        }
    return found


NOTHING_LOADED: dict[str, list[str]] = {
    key: [] for key in ("unwritten", "unconsumed", "twice", "head_from", "embedding_from")
}


def _two_shards(checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    """Two shard files that hold the same tensor: vLLM would take the last one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copyfile(checkpoint.root / "config.json", folder / "config.json")
    smallest = min(checkpoint.tensors, key=lambda t: t.bytes)
    # Its values mean nothing here: only the two headers are read.
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        save_file({smallest.name: torch.zeros(1)}, folder / name)
    try:
        open_checkpoint(folder)
        raised = ""
    except PortkitError as error:
        raised = error.what
    shutil.rmtree(folder)
    return {
        "kind": "twice",
        "what": f"{smallest.name} is in two shards",
        "tensor": smallest.name,
        "raised": "",
        "where": "",
        "audit": raised,
        "duty": "" if raised else "nobody notices",
    }
