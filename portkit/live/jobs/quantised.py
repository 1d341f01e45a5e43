"""Job: run the port quantised, beside Transformers rounded alike.

args: "loader", "portkit" (default) or "port"; "way", "8 bits" or "4 bits" (a quantised copy of the
checkpoint, in 4 bits its weights alone) or "online" (vLLM rounds to fp8 while it loads); "closed",
paths of linears in blocks of vLLM's that take no quantisation (default none).
value: format, dtype, ignored, layers [path, class, members, expected, actual], linears (each on its
own input, see live/quantised_linears.py), cases [prompt, mean and largest difference to
Transformers quantised alike, mean difference that quantising makes at all], difference, effect
(means over all of them), tolerance [part of the effect, reason], or none where the whole model is
not judged; "nothing" with a reason instead, if the model has nothing to quantise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config.model import _FLOAT16_NOT_SUPPORTED_MODELS
from vllm.model_executor.kernels.linear.scaled_mm import cpu as cpu_kernels
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig

from portkit.live.checkpoint import open_checkpoint
from portkit.live.device import find_device
from portkit.live.engine import start
from portkit.live.job import JobRequest
from portkit.live.portmodule import port_class
from portkit.live.prompts import prompts_for
from portkit.live.quantised import (
    Format,
    Plan,
    Way,
    format_for,
    in_port,
    logprobs,
    multiple_for,
    online,
    plan,
    quantised_original,
    write_copy,
)
from portkit.live.quantised_linears import by_hand, watched
from portkit.live.reference import load_model, original_class
from portkit.port import Port

TOLERANCE = {
    ("8 bits", "float32"): (
        0.3,
        "both sides round alike, so most prompts agree to 1e-5; but float32 sums in another "
        "order can push an activation over a rounding step, which a single time moves a prompt by "
        "a tenth of what quantising moves it",
    ),
    ("int4", "float16"): (
        0.3,
        "only weights are rounded, on both sides alike; what is left is that vLLM computes in "
        "float16: a hundredth of what rounding weights to 4 bits changes, a sixth where that makes "
        "a router choose another expert",
    ),
    ("int4", "bfloat16"): (
        0.5,
        "only weights are rounded, on both sides alike; what is left is that vLLM computes in "
        "bfloat16, a fifth of what rounding weights to 4 bits changes",
    ),
}
"""The largest mean |difference| of log-probabilities, as a part of the effect. Not judged where
8-bit kernels answer in 16 bits: activations cross rounding steps then, and routers choose other
experts, the port and Transformers each its own way. Then `linears` are judged."""


def run(request: JobRequest, say: Callable[[str], None]) -> dict[str, Any]:
    """Quantise, run, compare; what vLLM or the port raises passes through."""
    port = Port(Path(request.port_root))
    checkpoint = open_checkpoint(port.checkpoint)
    device = find_device()[0]
    way: Way = request.args["way"]
    format = format_for(device, way)
    if format is None:
        return {"nothing": "vLLM has no fp8 kernel for this GPU (it wants compute capability 8.9)"}
    cls = port_class(port)
    packed = dict(getattr(cls, "packed_modules_mapping", None) or {})
    original = load_model(original_class(port), checkpoint)
    closed = set(request.args.get("closed", ()))

    def as_is(name: str) -> bool:
        return name in closed or in_port(name, cls) in closed

    multiple = multiple_for(format, device)
    chosen = plan(original, set(checkpoint.names), packed, multiple, as_is)
    if not chosen.quantised:
        return {
            "nothing": "the original has no nn.Linear that its checkpoint names"
            + (" outside vLLM's blocks that can be given no quant_config" if closed else "")
            + (f" and whose sizes divide by {multiple}" if multiple > 1 else "")
        }
    folder = checkpoint.root
    if way != "online":
        folder = port.state_dir / "cache" / "quantised"
        say(f"writing an {format} copy of the checkpoint")
        write_copy(checkpoint, folder, chosen, format)
    for dtype in _dtypes(format, device):
        options: dict[str, Any] = {
            "dtype": dtype,
            **(online(chosen, cls) if way == "online" else {}),
        }
        if device == "cpu" and format == "int8":
            # On a CPU with AMX vLLM prefers a kernel that takes no float32; oneDNN's, its choice on
            # every other CPU, does. A job is a process of its own: nothing has to be put back.
            cpu_kernels.check_cpu_sgl_kernel = lambda *_: False
        elif device == "cpu" and format == "fp8":
            # vLLM asks for 16 bits here whatever the device; its fp8 kernels for CPUs, which it
            # would run in float16, give float32 too.
            OnlineQuantizationConfig.get_supported_act_dtypes = lambda *_: [torch.float32]
        say(f"starting vLLM, quantised to {format}, in {dtype}")
        with start(
            port.root, loader=request.args.get("loader", "portkit"), checkpoint=folder, **options
        ) as engine:
            prompts = prompts_for(
                port, checkpoint, longest=int(engine.llm.llm_engine.model_config.max_model_len)
            ).short[:4]
            rows = _layers(engine.model, cls, chosen, packed)
            with watched(engine.model) as seen:
                ours = engine.prompt_logprobs(prompts)
        if all(np.isfinite(values).all() for values in ours):
            break  # else float16's range was too small
    else:
        # Where Transformers' model stays finite in float16, the port's NaN is its own: compared.
        if dtype == "float16" and not _finite_in_half(original, chosen, format, prompts):
            return {
                "nothing": "Transformers' model is not finite in float16, which vLLM needs here"
            }
    say("the same port unquantised, for each layer by hand")
    with start(port.root, loader=request.args.get("loader", "portkit")) as engine:
        # A copy is rounded from what the checkpoint holds, while loading from what vLLM made of it.
        rounded_in = getattr(torch, dtype) if way == "online" else torch.float32
        linears = by_hand(engine.model, seen, format, packed, rounded_in)
    cases, itself = [], 0.0
    plain = [logprobs(original, ids) for ids in prompts]
    with quantised_original(original, chosen, format) as model:
        half = copy.deepcopy(model).to(getattr(torch, dtype)) if format == "int4" else None
        for ids, mine, unrounded in zip(prompts, ours, plain, strict=True):
            theirs = logprobs(model, ids)
            if half is not None:
                itself += float(np.abs(logprobs(half, ids) - theirs).mean()) / len(prompts)
            distance = np.abs(mine - theirs)
            cases.append(
                {
                    "name": f"prompt of {len(ids)} tokens",
                    "mean": float(distance.mean()),
                    "max": float(distance.max()),
                    "effect": float(np.abs(theirs - unrounded).mean()),
                }
            )
    return {
        "format": format,
        "dtype": dtype,
        "ignored": [*chosen.ignored, *chosen.experts],
        "layers": rows,
        "linears": linears,
        "cases": cases,
        "difference": float(np.mean([c["mean"] for c in cases])),
        "effect": float(np.mean([c["effect"] for c in cases])),
        "itself": itself if np.isfinite(itself) else 0.0,
        "tolerance": TOLERANCE.get((format if format == "int4" else "8 bits", dtype), ()),
    }


def _finite_in_half(
    original: nn.Module, chosen: Plan, format: Format, prompts: Sequence[Sequence[int]]
) -> bool:
    with quantised_original(original, chosen, format) as model:
        half = copy.deepcopy(model).half()
    return all(np.isfinite(logprobs(half, ids)).all() for ids in prompts)


def _dtypes(format: Format, device: str) -> tuple[str, ...]:
    """Return the dtypes to try, one after the other, until the port's numbers are finite.

    A CPU's 8-bit kernels give float32, a GPU's and those of 4 bits do not. Of the two that these
    give, float16 has three bits more, so that fewer activations cross a rounding step. On a CPU it
    is the only one: many lack the instructions that vLLM's CPU build has for bfloat16.
    """
    if device == "cpu" and format != "int4":
        return ("float32",)
    # vLLM refuses float16 for these, whose published weights leave its range. Whether the weights
    # at hand do is seen. A job is a process of its own: nothing has to be put back.
    _FLOAT16_NOT_SUPPORTED_MODELS.clear()
    return ("float16",) if device == "cpu" else ("float16", "bfloat16")


def _layers(
    model: nn.Module, cls: type, chosen: Plan, packed: dict[str, list[str]]
) -> list[dict[str, Any]]:
    """Return for each parallel linear whether it is quantised, and whether it should be."""
    rows = []
    # A port may call a layer as Transformers does, as the checkpoint, or as its mapper says.
    stored = [chosen.stored[name] for name in chosen.quantised]
    rounded = {*chosen.quantised, *stored, *(in_port(name, cls) for name in stored)}
    ignored = {*chosen.ignored, *(in_port(name, cls) for name in chosen.ignored)} - rounded
    for path, module in model.named_modules():
        if not isinstance(module, LinearBase):
            continue
        parent, _, attr = path.rpartition(".")
        members = [f"{parent}.{part}" for part in packed.get(attr, (attr,))]
        rows.append(
            {
                "path": path,
                "class": type(module).__name__,
                "members": members,
                "expected": any(m in rounded for m in members),
                "known": any(m in rounded or m in ignored for m in members),
                "actual": not isinstance(module.quant_method, UnquantizedLinearMethod),
                "scheme": _scheme(module),
            }
        )
    return rows


def _scheme(layer: LinearBase) -> str:
    if isinstance(layer.quant_method, UnquantizedLinearMethod):
        return ""
    return type(getattr(layer, "scheme", layer.quant_method)).__name__
