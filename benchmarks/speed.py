"""Tokens per second of what the drafts write, beside vLLM's native class and Transformers backend.

    python benchmarks/speed.py [--models llama,helium] [--batches 1,32,512] [--tokens 128,256]
                               [--repeats 5] [--seconds 10] [--size 1.2b|8b|tiny] [--write FILE]
                               [--ways port,native,transformers_backend] [--turns]

For an NVIDIA GPU: bfloat16, torch.compile and CUDA graphs. A checkpoint with random weights is
written in the model's own configuration at the asked size, the port is drafted, and each way runs
in a process of its own, one after the other, on that checkpoint; ratios come from one run of this
script. Beside each rate stands what the GPU computes for one step (all its kernels, by
torch.profiler): rates hold vLLM's own work on the CPU too, which is the same for every way, is most
of a step of so small a model, and changes from run to run. Llama has a native class in vLLM; Helium
has none. With --turns all ways are up at the same time and take turns, run by run, so that the
machine's moods meet them alike; --repeats runs each. On a machine without a GPU the same runs
eagerly in float32: good for trying the script, not for its numbers.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from measure import Failed, machine, number

from portkit.create import new_port
from portkit.draft.pipeline import apply_draft
from portkit.live.client import live_for
from portkit.port import Port

STEPS = ("copy", "forward", "parallel", "weights")
WAYS = ("port", "native", "transformers_backend")
SIZES: dict[str, dict[str, Any]] = {
    "1.2b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 4096,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 4096,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 512,
        "max_position_embeddings": 1024,
    },
}
"""Llama 3.2's 1.2 billion parameters, Llama 3.1's 8, and a size to try the script with."""
START_SECONDS = 280.0
Rows = dict[int, dict[str, Any]]
"""Batch → a row of job tokens_per_second: rates, step_ms."""


def main(argv: list[str] | None = None) -> int:
    """Measure each model, print the tables, and write them if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="llama,helium", help="model types, comma separated")
    parser.add_argument("--batches", default="1,32,512")
    parser.add_argument("--tokens", default="128,256", help="tokens in, tokens out")
    parser.add_argument("--repeats", type=int, default=5, help="of each batch, at least")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each batch, at least")
    parser.add_argument("--size", default="1.2b", choices=SIZES)
    parser.add_argument("--ways", default=",".join(WAYS), help="in the order in which they run")
    parser.add_argument("--turns", action="store_true", help="all ways up at once, run by run")
    parser.add_argument("--write", type=Path)
    args = parser.parse_args(argv)
    batches = [int(n) for n in args.batches.split(",")]
    tokens_in, tokens_out = (int(n) for n in args.tokens.split(","))
    lines = _head(args, tokens_in, tokens_out)
    with tempfile.TemporaryDirectory(prefix="portkit-speed-") as folder:
        for model in args.models.split(","):
            try:
                rates = _measure(model, Path(folder), batches, tokens_in, tokens_out, args)
            except Failed as error:
                print(f"{model}: {error}", file=sys.stderr)
                return 1
            lines += _table(model, batches, rates)
            print("\n".join(lines), flush=True)
            if args.write:  # after each model: a run that is cut off keeps what it has
                args.write.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


def _measure(
    model: str,
    folder: Path,
    batches: list[int],
    tokens_in: int,
    tokens_out: int,
    args: argparse.Namespace,
) -> dict[str, Rows | str]:
    """Return way → batch → what the job found, or why there is nothing."""
    ways = args.ways.split(",")
    settings: dict[str, Any] = {
        "batches": batches,
        "tokens_in": tokens_in,
        "tokens_out": tokens_out,
        "repeats": args.repeats,
        "seconds": args.seconds,
        "kv_cache_gib": _cache_gib(SIZES[args.size], max(batches), tokens_in + tokens_out),
    }
    checkpoint = folder / f"{model}-checkpoint"
    made = live_for(None).run(
        "sized_checkpoint",
        timeout=300.0,
        model_type=model,
        config=SIZES[args.size],
        out=str(checkpoint),
    )
    if not made.ok:
        raise Failed(f"no checkpoint: {made.what}")
    if args.turns:
        turns = folder / f"{model}-turns"
        settings |= {"turns": str(turns), "ways": ways}
        turns.mkdir()

    def measured(way: str, port: Port) -> Rows | str:
        with live_for(port) as live:
            result = live.run(
                "tokens_per_second",
                timeout=START_SECONDS + (60.0 + args.seconds + args.repeats) * len(batches),
                progress=lambda text: print(f"  … {text}", file=sys.stderr, flush=True),
                way=way,
                **settings,
            )
        if not result.ok:
            if args.turns:  # or the others would wait for it
                (turns / f"{way}-out").touch()
            return result.what
        return {row["batch"]: row for row in result.value["rows"]}

    if not args.turns:
        port = _port(model, checkpoint, folder)
        return {way: measured(way, port) for way in ways}
    # A worker does one job at a time: each way has a port, and so a worker, of its own.
    ports = {way: _port(model, checkpoint, folder / way) for way in ways}
    with ThreadPoolExecutor(len(ways)) as pool:
        running = {way: pool.submit(measured, way, port) for way, port in ports.items()}
        return {way: one.result() for way, one in running.items()}


def _cache_gib(sizes: dict[str, Any], batch: int, tokens: int) -> int:
    """Return twice what keys and values take in bfloat16, in GiB; 1 at least."""
    token = 2 * 2 * sizes["num_hidden_layers"] * sizes["num_key_value_heads"] * sizes["head_dim"]
    return 1 + (2 * token * batch * tokens >> 30)


def _port(model: str, checkpoint: Path, folder: Path) -> Port:
    """Draft a port of this checkpoint's model."""
    port = new_port(model, checkpoint=checkpoint, root=folder / "ports")
    for step in STEPS:
        outcome = apply_draft(port, step)
        if outcome.status != "success":
            raise Failed(f"the draft of {step} failed: {outcome.reason}")
    return port


def _head(args: argparse.Namespace, tokens_in: int, tokens_out: int) -> list[str]:
    here = machine()
    versions = ", ".join(f"{name} {version}" for name, version in here.versions)
    runs = f"the runs that {args.seconds:.0f} s hold after a warm-up, {args.repeats} at least"
    if args.turns:
        runs = f"{args.repeats} runs after a warm-up, the ways up at the same time and in turn"
    return [
        "# Speed of what the drafts write",
        "",
        f"Generated tokens per second, {tokens_in} tokens in and {tokens_out} out; median (minimum "
        f"to maximum) of {runs}, all in one session; size {args.size}, random weights. GPU: "
        "milliseconds of kernels per step, prompts included; ratios above 1 are the port's favour. "
        f"{here.date}, {here.device}; {versions}. `python benchmarks/speed.py` measures it again.",
    ]


def _table(model: str, batches: list[int], rates: dict[str, Rows | str]) -> list[str]:
    """Return a model's table; ratios are of the port's median and kernels to that way's."""
    heads = [f"batch {batch} | port / way | GPU | way / port" for batch in batches]
    lines = ["", f"## {model}", "", f"| way | {' | '.join(heads)} |"]
    lines.append("|---" * (1 + 4 * len(batches)) + "|")
    own = rates.get("port", "not measured")
    for way, found in rates.items():
        cells = [way.replace("_", " ")]
        for batch in batches:
            if isinstance(found, str):
                cells += [found.split(". ")[0].replace("|", "\\|")[:80], "", "", ""]
                continue
            ours = {} if isinstance(own, str) else own[batch]
            cells += _cells(found[batch], ours)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _cells(row: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Return a way's rate, its ratio, its kernels' milliseconds and their ratio."""
    median = statistics.median(row["rates"])
    spread = f"({number(min(row['rates']))}-{number(max(row['rates']))})"
    rate = f"{statistics.median(ours['rates']) / median:.2f}" if ours else ""
    if row["step_ms"] is None:
        return [f"{number(median)} {spread}", rate, "", ""]
    kernels = f"{row['step_ms'] / ours['step_ms']:.2f}" if ours else ""
    return [f"{number(median)} {spread}", rate, f"{row['step_ms']:.2f} ms", kernels]


if __name__ == "__main__":
    sys.exit(main())
