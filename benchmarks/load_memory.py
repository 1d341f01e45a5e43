"""Memory of loading: what load_weights holds beside the model, on a checkpoint of many shards.

    python benchmarks/load_memory.py [--layers N] [--shards N]

A drafted Helium on random weights. Streaming means: beside the model's own bytes no more than one
shard. Prints a table; nothing is asserted, memory depends on the machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file

from portkit.create import new_port
from portkit.draft.pipeline import apply_draft
from portkit.live.client import live_for

SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 16384,
}
MIB = 1 << 20


def main(argv: list[str] | None = None) -> int:
    """Make checkpoint and port, load once, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--shards", type=int, default=8)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="portkit-load-") as folder:
        checkpoint = Path(folder) / "checkpoint"
        made = live_for(None).run(
            "sized_checkpoint",
            model_type="helium",
            config=SIZES | {"num_hidden_layers": args.layers},
            out=str(checkpoint),
        )
        if not made.ok:
            print(made.what, file=sys.stderr)
            return 1
        shard(checkpoint, args.shards)
        port = new_port("helium", architecture="helium", checkpoint=checkpoint, root=folder)
        for step in ("copy", "forward", "parallel", "weights"):
            apply_draft(port, step)
        job = live_for(port).run("load", variant="")
        live_for(port).close()
    if not job.ok:
        print(job.what, file=sys.stderr)
        return 1
    found = job.value["memory"]
    for name, value in (
        ("the model, float32", found["model"]),
        ("the checkpoint, bfloat16", found["checkpoint"]),
        (f"its largest shard, of {found['shards']}", found["largest_shard"]),
        ("used while loading, beyond the start", found["peak"]),
        ("tensors of the checkpoint held at once", found["held"]),
    ):
        print(f"| {name} | {value / MIB:,.0f} MiB |")
    print(f"measured by {found['how']}")
    return 0


def shard(checkpoint: Path, count: int) -> None:
    """Cut the checkpoint's one file into `count`, with an index."""
    whole = checkpoint / "model.safetensors"
    tensors = list(load_file(whole).items())
    weight_map = {}
    for number in range(count):
        part = dict(tensors[number::count])
        name = f"model-{number + 1:05}-of-{count:05}.safetensors"
        save_file(part, checkpoint / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    whole.unlink()
    index = {"metadata": {}, "weight_map": weight_map}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


if __name__ == "__main__":
    sys.exit(main())
