"""Prove that torch and vLLM import, agree with each other, and that their device computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
import vllm
from vllm.platforms import current_platform

from portkit.live.device import find_device
from portkit.live.job import JobRequest


def run(request: JobRequest, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the imported versions, vLLM's platform, and the device after a small product on it."""
    kind, reason = find_device()
    square = torch.full((16, 16), 0.5, device=kind)
    total = float((square @ square).sum())
    return {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": type(current_platform).__name__,
        "dtypes": [str(d).removeprefix("torch.") for d in current_platform.supported_dtypes],
        "device": kind,
        "reason": reason,
        "product": total,
        "expected": 16 * 16 * 16 * 0.25,
    }
