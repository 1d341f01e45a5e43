"""A vLLM worker for several tensor-parallel ranks on one GPU.

NCCL refuses two ranks on one device, gloo does not: every rank takes device 0 and talks through
gloo. Slow, and right for what a rehearsal asks: does each rank hold and compute its share?
Named as `worker_cls` by rehearsal.py; imported in the ranks only.
"""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker


class SharedGPUWorker(Worker):
    """vLLM's GPU worker, with all ranks on the first device."""

    def init_device(self) -> None:
        from vllm.platforms import current_platform

        self.local_rank = 0
        type(current_platform).dist_backend = "gloo"
        super().init_device()
