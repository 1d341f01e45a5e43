"""Load the port in a fresh process, as a user's own would, and compare with Transformers.

args: environment (extra variables), python (interpreter; "" is this one), cwd, options (of
vllm.LLM, over the plain ones). value: the answer of scripts/fresh_engine.py, and `expected`, the
greedy tokens of Transformers for the same prompts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from portkit.live.checkpoint import open_checkpoint
from portkit.live.device import find_device
from portkit.live.engine import expand_latents
from portkit.live.job import JobRequest
from portkit.live.profile import Profile
from portkit.live.prompts import prompts_for
from portkit.live.reference import Reference
from portkit.live.subprocesses import run_script, user_environment
from portkit.port import Port

TOKENS = 12
USER_OPTIONS = (
    "dtype",
    "enforce_eager",
    "max_num_seqs",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "attention_config",
)
"""What a fresh process needs of the profile: float32 (tokens must be equal) and a small engine."""


def run(request: JobRequest, say: Callable[[str], None]) -> dict[str, Any]:
    """Run scripts/fresh_engine.py; raise PortkitError if that process fails."""
    port = Port(Path(request.port_root))
    checkpoint = open_checkpoint(port.checkpoint)
    profile = Profile.for_device(find_device()[0])
    prompts = [list(p) for p in prompts_for(port, checkpoint, longest=256).short]
    options = {k: v for k, v in profile.options.items() if k in USER_OPTIONS}
    expand_latents(port, checkpoint.config, options["dtype"])
    say("a fresh Python process, with nothing of portkit")
    answer = run_script(
        request.args["python"] or sys.executable,
        "fresh_engine.py",
        {
            "checkpoint": str(port.checkpoint.resolve()),
            "prompts": prompts,
            "max_tokens": TOKENS,
            "options": {**options, "max_model_len": 256} | request.args.get("options", {}),
        },
        cwd=Path(request.args["cwd"]),
        # A class of the port, not a picklable message, goes to the engine's process.
        environment=user_environment(
            {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", **request.args["environment"]}
        ),
    )
    say("Transformers on the same prompts")
    reference = Reference(port, checkpoint)
    answer["expected"] = [list(reference.greedy(p, TOKENS)[0]) for p in prompts]
    return answer
