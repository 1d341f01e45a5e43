"""What needs no vLLM: the import, findings after an edit, the headers of a terabyte."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ports
from measure import Failed, Row, Say, repeated

from portkit.curriculum import step as step_of
from portkit.lint.engine import findings
from portkit.live.checkpoint import INDEX, open_checkpoint

IMPORT = """
import sys, time
start = time.perf_counter()
{statement}
seconds = time.perf_counter() - start
print(seconds, *(name for name in ("torch", "vllm", "transformers") if name in sys.modules))
"""
TERABYTE = 10**12
SHARDS = 2000
TENSORS = 46
"""Per shard: 92 000 in all, as many as the largest open mixtures of experts have."""


def import_portkit(repeats: int, say: Say) -> list[Row]:
    """A fresh interpreter each time; the interpreter's own start is not counted."""
    rows = []
    for statement, budget, note in (
        ("import portkit", 0.5, "in a fresh interpreter; loads neither torch nor vLLM"),
        ("from portkit import begin", None, "a notebook's first line; neither torch nor vLLM"),
    ):
        say(statement)
        heavy: set[str] = set()

        def once(_: int, statement: str = statement, heavy: set[str] = heavy) -> float:
            code = IMPORT.format(statement=statement)
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            if done.returncode:
                raise Failed(f"{statement}: {done.stderr.strip().splitlines()[-1]}")
            seconds, *names = done.stdout.split()
            heavy.update({"torch", "vllm"}.intersection(names))
            return float(seconds)

        values = repeated(once, repeats)
        problem = f"imports {', '.join(sorted(heavy))}" if heavy else ""
        rows.append(Row(f"`{statement}`", "s", values, budget, note, problem))
    return rows


def findings_after_edit(repeats: int, say: Say) -> list[Row]:
    """The kernel is warm: the rules' modules are imported by the first call, shown in the note."""
    rows = []
    with ports.folder() as root:
        port = ports.at(root, "copy", say)
        for step in ("forward", "parallel"):
            say(f"findings of step {step}")
            first, found = _timed_findings(port, step, -1)

            def once(number: int, step: str = step) -> float:
                return _timed_findings(port, step, number)[0]

            note = (
                f"from the write to the list of {found} findings of step {step_of(step).number} in "
                f"{len(port.source.splitlines())} lines; the first call of a kernel took "
                f"{first:.2f} s"
            )
            rows.append(
                Row(f"findings after an edit, {step}", "s", repeated(once, repeats), 0.5, note)
            )
    return rows


def _timed_findings(port: ports.Port, step: str, number: int) -> tuple[float, int]:
    start = time.perf_counter()
    ports.edit(port, number)
    found = findings(port, step)
    return time.perf_counter() - start, len(found)


def headers_of_a_terabyte(repeats: int, say: Say) -> list[Row]:
    """Sparse files: their headers are real, their tensors are holes that would read as zeros."""
    with tempfile.TemporaryDirectory(prefix="portkit-terabyte-") as folder:
        say(f"writing the headers of {SHARDS} shards")
        total = write_terabyte(Path(folder))
        read = []

        def once(_: int) -> float:
            before = _bytes_read()
            start = time.perf_counter()
            checkpoint = open_checkpoint(Path(folder))
            seconds = time.perf_counter() - start
            read.append(_bytes_read() - before)
            if sum(tensor.bytes for tensor in checkpoint.tensors) != total:
                raise Failed("open_checkpoint lost tensors")
            return seconds

        say("reading them")
        values = repeated(once, repeats)
    note = (
        f"`open_checkpoint`: config, index and headers of {SHARDS * TENSORS} tensors in {SHARDS} "
        f"shards, {total / 1e12:.2f} TB in all; {read[-1] / 1e6:.0f} MB read, no tensor"
    )
    problem = "" if read[-1] < total / 1000 else f"{read[-1]} bytes were read"
    return [
        Row("tensors of a 1 TB checkpoint, listed and verified", "s", values, 2.0, note, problem)
    ]


def write_terabyte(folder: Path) -> int:
    """Write a checkpoint of sparse shards with an index; return the bytes of its tensors."""
    width = TERABYTE // (SHARDS * TENSORS) // 2 // 4096 * 4096
    weight_map = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        entries = {}
        for place in range(TENSORS):
            name = f"model.layers.{shard // 32}.mlp.experts.{shard % 32}.{place}.weight"
            weight_map[name] = file
            offsets = [place * width * 2, (place + 1) * width * 2]
            entries[name] = {
                "dtype": "BF16",
                "shape": [width // 4096, 4096],
                "data_offsets": offsets,
            }
        header = json.dumps(entries).encode()
        with (folder / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(header)) + header)
            stream.truncate(8 + len(header) + TENSORS * width * 2)
    total = SHARDS * TENSORS * width * 2
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    (folder / "config.json").write_text('{"architectures": ["TerabyteForCausalLM"]}')
    return total


def _bytes_read() -> int:
    """What this process has asked the kernel to read so far, cached or not."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("rchar:"):
            return int(line.split()[1])
    raise Failed(f"{os.uname().release}: /proc/self/io has no rchar")
