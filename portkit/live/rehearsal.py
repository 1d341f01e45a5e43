"""Run the port on N tensor-parallel ranks on whatever devices there are.

On the CPU, and on a GPU machine with fewer GPUs than ranks, the ranks talk through gloo; with
enough GPUs they are what users run. Rank counts that the model's config rules out are refused
before anything starts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from portkit.errors import PortkitError
from portkit.live.checkpoint import open_checkpoint
from portkit.live.device import find_device
from portkit.live.engine import Engine, start
from portkit.live.rank_counts import possible, refusal
from portkit.port import Port

WORKER = "portkit.live.shared_gpu.SharedGPUWorker"


@contextmanager
def rehearse(root: Path, ranks: int, *, stages: int = 1, **options: Any) -> Iterator[Engine]:
    """Start the port on `ranks` ranks and yield the engine; `options` go to `engine.start`.

    `stages`: pipeline stages, each with `ranks` ranks.

    Raises PortkitError, before anything starts, for a number of ranks that the config rules out.
    """
    port = Port(Path(root).resolve())
    checkpoint = open_checkpoint(options.get("checkpoint") or port.checkpoint)
    refuse(checkpoint.config, ranks)
    with start(
        port.root,
        tensor_parallel_size=ranks,
        pipeline_parallel_size=stages,
        **{**placement(ranks * stages), **options},
    ) as engine:
        yield engine


def refuse(config: dict[str, Any], ranks: int) -> None:
    """Raise PortkitError if the config rules out this number of ranks."""
    reason = refusal(config, ranks)
    if reason:
        allowed = ", ".join(str(n) for n in possible(config))
        raise PortkitError(
            f"This model cannot run on {ranks} ranks: {reason}.",
            "config.json",
            f"Rank counts that it allows: {allowed}.",
        )


def placement(ranks: int) -> dict[str, Any]:
    """Return the vllm.LLM arguments that put `ranks` ranks on this machine's devices."""
    if ranks == 1 or find_device()[0] == "cpu":
        return {}
    from vllm.platforms import current_platform

    devices = current_platform.device_count()
    if devices >= ranks:
        return {"distributed_executor_backend": "mp"}
    # Read when the ranks make their process group.
    os.environ["VLLM_DISABLE_PYNCCL"] = "1"
    return {
        "worker_cls": WORKER,
        "distributed_executor_backend": "mp",
        # It, too, wants a device for each rank.
        "disable_custom_all_reduce": True,
        # The ranks start at the same time and each looks at the memory of the same GPU.
        "gpu_memory_utilization": 0.6 / ranks,
        # Said outright, since a rank that measures would take the others' memory for its own.
        "kv_cache_memory_bytes": 1 << 30,
    }


def how(ranks: int) -> str:
    """Say in words where the ranks of a rehearsal run."""
    kind = find_device()[0]
    if ranks == 1:
        return f"one rank on the {kind.upper() if kind == 'cpu' else 'GPU'}"
    if kind == "cpu":
        return f"{ranks} processes on the CPU, over gloo"
    if placement(ranks).get("worker_cls"):
        return f"{ranks} processes sharing one GPU, over gloo"
    return f"{ranks} GPUs, over NCCL"
