"""Job: what the dtype that vLLM chooses by itself costs in each module of the port.

The engine runs twice: in that dtype and with that attention, for the values, and in float32, to
know which modules of the two sides are the same thing. See live/precision.py for the comparison.

args: loader, "port" (default) or "portkit".
value: dtype, tokens, layers [{path, same}] (same: whether its output agrees in float32), places
(how many the original has), reaches_the_end (whether float32 agrees there), rows [{path, role,
ours, theirs, ratio, where}], in the original's order.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from portkit.live import engine as live_engine
from portkit.live.job import JobRequest
from portkit.live.locate import call_of, method_place, place_of
from portkit.live.precision import Lost, agreeing, layers_of, lost, reaches_the_end
from portkit.live.prompts import random_ids
from portkit.live.reference import Reference, load_model
from portkit.live.trace import Captures, trace_original, trace_port
from portkit.port import Port

TOKENS = 400
"""Of the prompt: bfloat16 has no whole numbers between 256 and 258, so positions show by then."""
DECODED = 4
CUT = 10
"""How many times the tolerance of one module two may differ in float32 and be the same thing."""
OPTIONS = {
    "enable_prompt_embeds": False,
    "max_num_batched_tokens": 2048,
    # Enough for this one prompt in blocks of vLLM's own size, sliding windows apart.
    "num_gpu_blocks_override": 512,
}


def run(request: JobRequest, say: Callable[[str], None]) -> dict[str, Any]:
    """Trace the port in its own dtype and in float32, and the original beside both."""
    port = Port(Path(request.port_root))
    loader = request.args.get("loader", "port")
    say("starting vLLM in the dtype that it chooses by itself")
    try:
        dtype, ids, half, tokens = _as_vllm_chooses(port, loader)
    except ValueError as error:
        # It has kernels of latent attention for a few sizes only, and no checkpoint of another one
        # can be served but expanded.
        if "MLA" not in str(error) or os.environ.get("VLLM_MLA_DISABLE") == "1":
            raise
        os.environ["VLLM_MLA_DISABLE"] = "1"
        dtype, ids, half, tokens = _as_vllm_chooses(port, loader)
    fed = [*ids, *tokens[:-1]]
    value = {"dtype": str(dtype).removeprefix("torch."), "tokens": len(fed)}
    say("the same in float32, to know what to compare")
    with live_engine.start(port.root, loader=loader, **OPTIONS) as engine:
        device = engine.profile.device
        reference = Reference(port, engine.checkpoint, device=device)
        full, _ = trace_port(engine, [fed], 0, 1)
        theirs = trace_original(reference.model, fed)
        same = agreeing(full, theirs, engine.model, CUT * engine.profile.module.value)
        layers = layers_of(reference.model)
        handed_on = {
            p: half.values[p, "out"] for p in layers if (p, "out") in same & {*half.values}
        }
        say("Transformers in that dtype, and exactly")
        original = load_model(reference.model_class, engine.checkpoint, device, dtype)
        itself = trace_original(original, fed, handed_on)
        exact = trace_original(copy.deepcopy(original).float(), fed, handed_on)
        rows = lost(same, half, itself, exact, engine.model, dtype)
        return {
            **value,
            "layers": [{"path": p, "same": p in handed_on} for p in layers],
            "places": len(theirs.values),
            "reaches_the_end": reaches_the_end(same, theirs, layers),
            "rows": [_row(r, engine.model) for r in rows],
        }


def _as_vllm_chooses(
    port: Port, loader: str
) -> tuple[torch.dtype, list[int], Captures, tuple[int, ...]]:
    """Return the dtype, a prompt, what its run gave everywhere, and the tokens decoded."""
    own = {"dtype": "auto", "attention_config": None, "block_size": None}
    with live_engine.start(port.root, loader=loader, **OPTIONS, **own) as engine:
        config = engine.llm.llm_engine.model_config
        length = min(TOKENS, int(config.max_model_len) - DECODED)
        ids = random_ids(engine.vocab_size, length, seed=600)
        return config.dtype, ids, *trace_port(engine, [ids], 0, DECODED)


def _row(row: Lost, port: nn.Module) -> dict[str, Any]:
    return {
        "path": row.path,
        "role": row.role,
        "ours": list(row.ours),
        "theirs": list(row.theirs),
        "ratio": row.ratio,
        "where": _where(row, port),
    }


def _where(row: Lost, port: nn.Module) -> str:
    """Return the line that makes the module, or that of the block whose forward computes this."""
    module = dict(port.named_modules(remove_duplicate=False)).get(row.path)
    children = dict(module.named_children()) if module is not None else {}
    rotary = next((name for name in children if "rot" in name), "")
    if row.role in ("q", "k") and rotary:
        place = place_of(port, f"{row.path}.{rotary}")
    elif children and row.role != "in":
        place = method_place(type(module), "forward")
    elif row.role == "in":
        place = call_of(port, row.path)
    else:
        place = place_of(port, row.path)
    if place is None:
        return ""
    return place.at_call if row.role == "in" else str(place)
