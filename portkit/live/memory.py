"""The most memory that a block of code used beyond what was in use when it began."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Peak:
    """Filled when the block ends."""

    bytes: int = 0
    how: str = ""
    """What was measured."""


@contextmanager
def peak_of(device: str) -> Iterator[Peak]:
    """Measure the block: this process's resident memory, on a GPU also what torch allocated there.

    Memory-mapped files count as far as they were read: they are what streaming keeps small.
    """
    import torch

    peak = Peak()
    before = _status("VmRSS")
    # 5 resets the high-water mark (proc(5), clear_refs).
    Path("/proc/self/clear_refs").write_text("5")
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
    try:
        yield peak
    finally:
        peak.bytes = max(0, _status("VmHWM") - before)
        peak.how = "resident memory of the process"
        if device == "cuda":
            peak.bytes += torch.cuda.max_memory_allocated() - allocated
            peak.how += " and allocations on the GPU"


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0
