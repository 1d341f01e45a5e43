"""Tensor-parallel ranks by fork: each starts with everything imported, the port's class included.

vLLM's CPU platform insists on spawning its ranks, so that an LD_PRELOAD takes effect; each would
then import vLLM for 10 s and know nothing of the class that the job registered. A fork is safe as
long as no native thread has to survive it, which `forked_ranks` makes sure of.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import cloudpickle

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
    spawning, executing = executor.get_mp_context, executor.WorkerProc._execute_worker_rpc
    executor.get_mp_context = lambda: multiprocessing.get_context("fork")
    executor.WorkerProc._execute_worker_rpc = _leaving_on_errors(executing)
    try:
        yield
    finally:
        executor.get_mp_context = spawning
        executor.WorkerProc._execute_worker_rpc = executing


@contextmanager
def imports_without_cuda() -> Iterator[None]:
    """Inside the block, who asks torch or Triton which GPU there is hears it from NVML.

    vLLM's Triton kernels of linear attention ask while they are imported
    (third_party/flash_linear_attention/ops/utils.py). That would initialise CUDA, and no rank can
    be forked from a process that has.
    """
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from vllm.platforms import current_platform

    found = current_platform.get_device_capability()
    target = GPUTarget("cuda", found.to_int(), 32)
    name = current_platform.get_device_name()
    with (
        mock.patch.object(torch.cuda, "get_device_name", lambda *_: name),
        mock.patch.object(torch.cuda, "get_device_capability", lambda *_: tuple(found)),
        mock.patch.object(driver.active, "get_current_target", lambda: target),
    ):
        yield


def _leaving_on_errors(executing: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """Have a rank leave when it raises, as none hears of it: the others wait in a collective.

    vLLM's executor listens to one rank alone, and logs what others raise.
    """

    def execute(rank: Any, request: tuple[str | bytes, Any, Any, int | None]) -> None:
        method, args, kwargs, listened_to = request
        if listened_to is None or rank.rank == listened_to:
            return executing(rank, request)
        function = (
            getattr(rank.worker, method)
            if isinstance(method, str)
            else partial(cloudpickle.loads(method), rank.worker)
        )
        try:
            function(*args, **kwargs)
        except Exception:
            logging.getLogger("vllm").exception("WorkerProc hit an exception.")
            sys.stderr.flush()
            os._exit(1)
        return None

    return execute


def end_openmp_threads() -> None:
    """Give back the threads that OpenMP keeps between operations; the next one starts new ones."""
    maps = Path("/proc/self/maps").read_text()
    for library in sorted(set(re.findall(r"/\S*/lib(?:gomp|iomp5|omp)[^/\s]*\.so\S*", maps))):
        pause = getattr(ctypes.CDLL(library), "omp_pause_resource_all", None)
        if pause is not None:
            pause(_PAUSE_HARD)
