"""Failures that are no mistake of the port: this build of vLLM lacks a kernel of its layers.

vLLM's CPU build has neither its CUDA operators nor Triton, and some of its layers have no other way
(selective scan, lightning attention), or one that takes half precision alone (gated delta nets, on
processors with AMX latent attention), or float32 alone (Mamba's mixer: in half precision vLLM packs
the weight of its convolution, which the mixer then reads as if it had not).
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator

_OPERATOR = re.compile(r"'_OpNamespace' '\w+' object has no attribute '(?P<name>\w+)'")
_TRITON = re.compile(r"module 'triton\S*' has no attribute '(?P<name>\w+)'")
_LAUNCH = re.compile(r"(?P<name>\w+)\[[^]]*\]\(")
_PRECISION = re.compile(r"expect \w+ to be (bfloat16|float16|half)|does not support float32")
_CHECK = re.compile(r"cpu_\w+\.[ch]pp:\d+\] Check failed")
EXPERTS = "MoE backend supports the deployment configuration"
"""What vLLM says where it has no kernel for a rank's part of the experts."""
_ON_CPU = re.compile(r"/ops/cpu/|/router/cpu_router\.py$")
NEXT = "Nothing to mend here: run it where vLLM has this kernel, on a GPU."


def missing_kernel(error: BaseException) -> str:
    """Say which kernel this build of vLLM lacks; "" if the error is about something else."""
    text = str(error)
    frames = [f for f in _frames(error) if "/vllm/" in f.filename]
    if not frames:
        return ""
    last = frames[-1]
    place = f"vllm/{last.filename.rsplit('/vllm/', 1)[1]}, in {last.name}"
    if isinstance(error, AttributeError) and (found := _OPERATOR.search(text)):
        return f"This build of vLLM has no kernel {found['name']} ({place})"
    if isinstance(error, AttributeError) and (found := _TRITON.search(text)):
        return f"This build of vLLM has no Triton, which {place} needs ({found['name']})"
    launched = _LAUNCH.search(last.line or "")
    if isinstance(error, TypeError) and "not subscriptable" in text and launched:
        return f"This build of vLLM has no Triton for the kernel {launched['name']} ({place})"
    if isinstance(error, AssertionError) and _ON_CPU.search(last.filename):
        return f"The kernel {last.name} of vLLM's CPU build does not take this ({place})"
    if isinstance(error, RuntimeError) and _CHECK.search(text):
        return f"The kernel {last.name} of vLLM's CPU build does not take this ({place})"
    if isinstance(error, NotImplementedError) and EXPERTS in text:
        return f"This build of vLLM has no kernel for experts of this size ({place})"
    if isinstance(error, IndexError) and any(
        f.filename.endswith("/mamba/mamba_mixer.py") and "conv1d.weight" in (f.line or "")
        for f in frames
    ):
        return "vLLM's CPU build runs MambaMixer in float32 only"
    if isinstance(error, RuntimeError | AssertionError) and _PRECISION.search(text):
        return f"A kernel of this build of vLLM takes no float32 ({place})"
    return ""


def _frames(error: BaseException) -> Iterator[traceback.FrameSummary]:
    """Frames down to where it was raised, torch's dispatch of operators left out."""
    for frame in traceback.extract_tb(error.__traceback__):
        if "/torch/" not in frame.filename:
            yield frame
