"""Tensor-parallel ranks by fork: each starts with everything imported, the port's class included.

vLLM's CPU platform insists on spawning its ranks, so that an LD_PRELOAD takes effect; each would
then import vLLM for 10 s and know nothing of the class that the job registered. A fork is safe as
long as no native thread has to survive it, which `forked_ranks` makes sure of.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from portkit.errors import PortkitError
from portkit.live.device import find_device
from portkit.live.processes import thread_count

_PAUSE_HARD = 2  # omp_pause_hard of OpenMP 5.0: give the threads back


@contextmanager
def forked_ranks() -> Iterator[None]:
    """Inside the block, vLLM's multiprocessing executor forks its ranks from this process.

    Enter it before the LLM is made. Raises PortkitError if CUDA is initialised here, or if on the
    CPU native threads run that cannot be ended: a forked rank would wait for them for ever.
    """
    import torch
    import vllm.v1.executor.multiproc_executor as executor

    if torch.cuda.is_initialized():
        raise PortkitError(
            "Ranks cannot be forked: this process has initialised CUDA.",
            "portkit.live.ranks",
            "Start the tensor-parallel engine in a job of its own, before anything uses CUDA.",
        )
    end_openmp_threads()
    native = thread_count() - threading.active_count()
    # A CUDA build's libraries keep threads of their own that the ranks do without (vLLM forks its
    # ranks there by default); on the CPU a native thread is one of OpenMP's, and would be missed.
    if native > 0 and find_device()[0] == "cpu":
        raise PortkitError(
            f"Ranks cannot be forked: {native} native threads run in this process.",
            "portkit.live.ranks",
            "Start the tensor-parallel engine in a job of its own, or first thing in it.",
        )
    spawning = executor.get_mp_context
    executor.get_mp_context = lambda: multiprocessing.get_context("fork")
    try:
        yield
    finally:
        executor.get_mp_context = spawning


def end_openmp_threads() -> None:
    """Give back the threads that OpenMP keeps between operations; the next one starts new ones."""
    maps = Path("/proc/self/maps").read_text()
    for library in sorted(set(re.findall(r"/\S*/lib(?:gomp|iomp5|omp)[^/\s]*\.so\S*", maps))):
        pause = getattr(ctypes.CDLL(library), "omp_pause_resource_all", None)
        if pause is not None:
            pause(_PAUSE_HARD)
