"""Run vLLM's Transformers backend on the port's checkpoint, and compare it with Transformers.

`args["impl"]` may name "vllm" instead: vLLM's own class of the architecture.

What goes wrong inside the backend is the answer and no error; what goes wrong on the reference
side, or with the checkpoint, is an error.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from vllm import LLM
from vllm.distributed import cleanup_dist_env_and_memory

from portkit.live.checkpoint import open_checkpoint
from portkit.live.device import find_device
from portkit.live.engine import Engine, longest
from portkit.live.job import JobRequest
from portkit.live.parity import compare, compare_decode
from portkit.live.profile import Profile
from portkit.live.prompts import Prompts, prompts_for
from portkit.live.reference import Reference
from portkit.port import Port

TOKENS = 16
SPEED_BATCH, SPEED_TOKENS = 8, 32


def run(request: JobRequest, say: Callable[[str], None]) -> dict[str, Any]:
    """Start vLLM with model_impl="transformers"; return whether it ran, was right, and how fast."""
    port = Port(Path(request.port_root))
    checkpoint = open_checkpoint(port.checkpoint)
    profile = Profile.for_device(find_device()[0])
    length = longest(checkpoint.config, profile)
    prompts = prompts_for(port, checkpoint, longest=length)
    reference = Reference(port, checkpoint, device=profile.device)
    say("Asking Transformers")
    expected = [
        (ids, reference.logprobs(ids), *reference.greedy(ids, TOKENS)) for ids in prompts.short
    ]
    impl = request.args.get("impl", "transformers")
    say(f"Starting vLLM with model_impl={impl}")
    started = time.perf_counter()
    torch.compiler.set_stance("force_eager")  # vLLM's sampler: no compilation for a few tokens
    try:
        llm = LLM(
            str(checkpoint.root),
            model_impl=impl,
            trust_remote_code=bool(port.meta["checkpoint"].get("trust_remote_code")),
            **{
                **profile.options,
                "enable_prompt_embeds": False,
                "max_model_len": length,
            },
        )
    except Exception as error:
        return _failed("start", error)
    seconds = time.perf_counter() - started
    try:
        engine = Engine(llm, port, checkpoint, profile, object, 1)
        say("Comparing")
        return {"ran": True, "start_seconds": seconds, **_measure(engine, prompts, expected)}
    except Exception as error:
        return _failed("run", error)
    finally:
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def _measure(engine: Engine, prompts: Prompts, expected: list[tuple]) -> dict[str, Any]:
    limit = engine.profile.logprobs.value
    rows = []
    for ids, logprobs, tokens, decoded in expected:
        (ours,) = engine.generate([ids], TOKENS, prompt_logprobs=True)
        prefill = compare(f"{len(ids)} tokens", ours.rows, logprobs, limit)
        decode = compare_decode(f"{len(ids)} tokens", ours, tokens, decoded, limit, start=len(ids))
        same = sum(1 for _ in _common(ours.tokens, tokens))
        rows.append(
            {
                "prompt": len(ids),
                "same_tokens": same,
                "prefill": prefill.max_abs,
                "decode": decode.max_abs,
                "ok": prefill.ok and decode.ok,
            }
        )
    batch = [prompts.short[n % len(prompts.short)] for n in range(SPEED_BATCH)]
    begin = time.perf_counter()
    engine.generate(batch, SPEED_TOKENS)
    rate = SPEED_BATCH * SPEED_TOKENS / (time.perf_counter() - begin)
    (kind,) = engine.on_model(_kind)
    return {
        "rows": rows,
        "limit": limit,
        "tokens": TOKENS,
        "tokens_per_second": rate,
        "batch": SPEED_BATCH,
        "model_class": kind,
    }


def _common(ours: tuple[int, ...], theirs: tuple[int, ...]):
    """Yield the tokens up to the first difference."""
    for one, other in zip(ours, theirs, strict=False):
        if one != other:
            return
        yield one


def _kind(model: torch.nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


def _failed(phase: str, error: Exception) -> dict[str, Any]:
    said = " ".join(str(error).split()).split(" [type=")[0]  # pydantic repeats its input there
    return {
        "ran": False,
        "phase": phase,
        "error": f"{type(error).__name__}: {said[:400]}",
        "trace": "".join(traceback.format_exception(error))[-4000:],
    }
