"""Job: which layers the port is made of, on one rank and on several, without an engine.

value: modules (one row each: path, class, the line that made it, prefix, whether it got the
quantisation config, the block of vLLM's that made it and takes none, its weights), packed
(packed_modules_mapping), stacked (the same by the port's weights mapper), ranks (per number of
ranks: what the config says against it, what vLLM says, what building the port says, the weights'
shapes).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import GateLinear
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from portkit.live.blueprint import Blueprint, Workbench, workbench
from portkit.live.checkpoint import open_checkpoint
from portkit.live.failure import describe
from portkit.live.fused import stacked_parts
from portkit.live.job import JobRequest
from portkit.live.rank_counts import refusal
from portkit.port import Port

RANKS = (1, 2, 3, 4, 5, 6, 7, 8)


def run(request: JobRequest, say: Callable[[str], None]) -> dict[str, Any]:
    """Build the port for every number of ranks; what its code raises on one rank passes through."""
    port = Port(Path(request.port_root))
    checkpoint = open_checkpoint(port.checkpoint)
    say("building the port's layers")
    with workbench(port, checkpoint) as bench:
        whole = bench.build()
        closed = _closed_blocks(whole.model)
        config = bench.config.model_config.hf_config.to_dict()
        return {
            "file": port.modeling.name,
            "modules": [
                _row(path, module, whole, closed) for path, module in whole.model.named_modules()
            ],
            "packed": dict(getattr(whole.model, "packed_modules_mapping", None) or {}),
            "stacked": stacked_parts(whole.model),
            "ranks": {str(n): _on_ranks(bench, n, config, str(port.root)) for n in RANKS},
            "tied": bool(config.get("tie_word_embeddings")),
            "hidden_size": bench.config.model_config.get_hidden_size(),
            "vocab_size": bench.config.model_config.get_vocab_size(),
        }


def _closed_blocks(model: nn.Module) -> dict[str, str]:
    """Return path -> class of vLLM's own blocks that make linears and can be given no quant_config.

    Their linears stay as they are whatever a port does: MambaMixer's.
    """
    return {
        path: type(module).__name__
        for path, module in model.named_modules()
        if type(module).__module__.startswith("vllm.")
        and any(isinstance(child, LinearBase) for child in module.children())
        and not any(
            name in ("quant_config", "vllm_config") or parameter.kind is parameter.VAR_KEYWORD
            for name, parameter in inspect.signature(type(module).__init__).parameters.items()
        )
    }


def _row(
    path: str, module: nn.Module, blueprint: Blueprint, closed: dict[str, str]
) -> dict[str, Any]:
    kind = next(
        (
            word
            for base, word in (
                (ParallelLMHead, "head"),
                (VocabParallelEmbedding, "embedding"),
                # A router's gate is never quantised: vLLM's own models give it no quant_config.
                (GateLinear, "gate"),
                (LinearBase, "linear"),
                (Attention, "attention"),
                (nn.Linear, "nn.Linear"),
                (nn.Embedding, "nn.Embedding"),
                (LogitsProcessor, "logits"),
            )
            if isinstance(module, base)
        ),
        "",
    )
    return {
        "path": path,
        "class": type(module).__name__,
        "kind": kind,
        "line": blueprint.line_of(module),
        "prefix": getattr(module, "layer_name" if kind == "attention" else "prefix", None),
        "quant": blueprint.asked.get(id(module)),
        "closed": next((c for block, c in closed.items() if path.startswith(f"{block}.")), ""),
        "weights": {n: list(p.shape) for n, p in module.named_parameters(recurse=False)},
        "reduces": bool(getattr(module, "reduce_results", False)),
        "gathers": bool(getattr(module, "gather_output", False)),
        "kv_copies": int(getattr(module, "num_kv_head_replicas", 1)),
    }


def _on_ranks(bench: Workbench, ranks: int, config: dict[str, Any], root: str) -> dict[str, Any]:
    """Build every rank of `ranks`; errors in words."""
    answer: dict[str, Any] = {
        "config": refusal(config, ranks),
        "vllm": "",
        "error": {},
        "shapes": [],
    }
    parallel = copy.copy(bench.config.parallel_config)
    parallel.tensor_parallel_size = ranks
    try:
        bench.config.model_config.verify_with_parallel_config(parallel)
    except ValueError as error:
        answer["vllm"] = str(error)
    try:
        for rank in sorted({0, ranks - 1}):
            model = bench.build(ranks, rank).model
            answer["shapes"].append({n: list(p.shape) for n, p in model.named_parameters()})
    except Exception as error:
        answer["error"] = {**describe(error, root), "type": type(error).__name__}
    return answer
