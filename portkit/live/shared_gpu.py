"""A vLLM worker for several ranks on one GPU, tensor-parallel ones and pipeline stages.

NCCL refuses two ranks on one device, gloo does not: every rank takes device 0 and talks through
gloo. Slow, and right for what a rehearsal asks: does each rank hold and compute its share?
Named as `worker_cls` by rehearsal.py; imported in the ranks only.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed import get_pp_group
from vllm.distributed.parallel_state import GroupCoordinator
from vllm.model_executor.layers.minimax_rms_norm import rms_norm_tp
from vllm.v1.worker.gpu_worker import Worker


class SharedGPUWorker(Worker):
    """vLLM's GPU worker, with all ranks on the first device."""

    def init_device(self) -> None:
        from vllm.platforms import current_platform

        self.local_rank = 0
        type(current_platform).dist_backend = "gloo"
        # MiniMax-M2's kernel for the norms of queries and keys sums over ranks by itself, in its
        # peers' memory. In float32 on one GPU it went wrong (not tried on two GPUs, nor in 16 bits,
        # which it may ask for). Without it vLLM has the group sum.
        rms_norm_tp._MINIMAX_FUSED_AR_RMS_QK = None
        super().init_device()
        if get_pp_group().world_size > 1:
            _hand_on_over_the_cpu(get_pp_group())


def _hand_on_over_the_cpu(group: GroupCoordinator) -> None:
    """Let stages of a pipeline exchange their tensors as copies on the CPU.

    gloo reduces and gathers tensors of a GPU, but sends none from one rank to another: the receiver
    sees its peer go, and the scheduler an answer that belongs to no step.
    """
    send, receive = group.isend_tensor_dict, group.irecv_tensor_dict

    def isend(tensors: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return send(_moved(tensors, "cpu"), *args, **{**kwargs, "all_gather_group": None})

    def irecv(*args: Any, **kwargs: Any) -> Any:
        tensors, handles, after = receive(*args, **{**kwargs, "all_gather_group": None})
        for handle in handles:
            handle.wait()
        return _moved(tensors or {}, group.device), [], after

    group.isend_tensor_dict, group.irecv_tensor_dict = isend, irecv


def _moved(tensors: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in tensors.items()
    }
