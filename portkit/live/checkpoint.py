"""A checkpoint folder, read safely: config.json and the headers of its safetensors shards.

Only headers are read (a terabyte takes as long as a megabyte); no tensor, no pickle, no network.
Everything that can be wrong with the files is said here, before an engine starts, because an
engine's own message comes late and from another process. Imports neither torch nor vLLM.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portkit.errors import PortkitError

DTYPE_BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a shard's header."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """safetensors' name, e.g. "F32"."""
    shard: str
    """File name of its shard."""
    bytes: int


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint folder."""

    root: Path
    config: dict[str, Any]
    tensors: tuple[TensorInfo, ...]
    """In the order of shards and of the tensors' places in them: the order they are streamed in."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(tensor.name for tensor in self.tensors)

    @property
    def shards(self) -> tuple[Path, ...]:
        return tuple(self.root / name for name in dict.fromkeys(t.shard for t in self.tensors))

    @property
    def fingerprint(self) -> str:
        """A short hash of config, headers, sizes and times of the files: changes if they do."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for shard in self.shards:
            stat = shard.stat()
            digest.update(f"{shard.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        for tensor in self.tensors:
            digest.update(f"{tensor.name} {tensor.shape} {tensor.dtype}\n".encode())
        return digest.hexdigest()[:16]


def open_checkpoint(root: Path) -> Checkpoint:
    """Read config.json and every shard's header; raise PortkitError for anything amiss."""
    root = Path(root)
    config = _config(root)
    tensors: dict[str, TensorInfo] = {}
    for shard in _shards(root):
        for tensor in read_header(shard):
            if tensor.name in tensors:
                raise PortkitError(
                    f"The tensor {tensor.name!r} is in two shards.",
                    f"{tensors[tensor.name].shard} and {shard.name} in {root}",
                    "Save the checkpoint again with `save_pretrained`, or delete the stale shard.",
                )
            tensors[tensor.name] = tensor
    if not tensors:
        raise PortkitError(
            "The checkpoint's shards hold no tensor.", str(root), "Save the checkpoint again."
        )
    _compare_with_index(root, tensors)
    return Checkpoint(root, config, tuple(tensors.values()))


def read_header(shard: Path) -> list[TensorInfo]:
    """Return the tensors that a safetensors file announces, by place; reads no tensor.

    The format: 8 bytes little-endian length, that many bytes of JSON, then the data
    (huggingface/safetensors, README, "Format").
    """
    remedy = "Download or save this shard again (compare its size with the original's)."
    size = shard.stat().st_size
    with shard.open("rb") as stream:
        first = stream.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise PortkitError(
                f"{shard.name} is not a whole safetensors file: its header would be {length} bytes "
                f"long, the file has {size}.",
                str(shard),
                remedy,
            )
        text = stream.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        rows = [
            (int(entry["data_offsets"][0]), int(entry["data_offsets"][1]), name, entry)
            for name, entry in header.items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise PortkitError(
            f"The header of {shard.name} is corrupt: {error}.", str(shard), remedy
        ) from error
    tensors = []
    end = 0
    for start, stop, name, entry in sorted(rows, key=lambda row: row[:3]):
        shape = tuple(int(n) for n in entry["shape"])
        count = 1
        for extent in shape:
            count *= extent
        width = DTYPE_BYTES.get(entry["dtype"])
        if start != end or stop < start or (width and (stop - start) != count * width):
            raise PortkitError(
                f"The header of {shard.name} is corrupt: {name} of shape {list(shape)} and "
                f"{entry['dtype']} cannot lie at bytes {start} to {stop}.",
                str(shard),
                remedy,
            )
        end = stop
        tensors.append(TensorInfo(name, shape, entry["dtype"], shard.name, stop - start))
    if 8 + length + end != size:
        word = "truncated" if size < 8 + length + end else "longer than it says"
        raise PortkitError(
            f"{shard.name} is {word}: it announces {8 + length + end} bytes and has {size}.",
            str(shard),
            remedy,
        )
    return tensors


def _config(root: Path) -> dict[str, Any]:
    path = root / "config.json"
    if not root.is_dir():
        raise PortkitError(
            "There is no checkpoint folder.",
            str(root),
            "Put the checkpoint there, or make the port with --checkpoint DIR.",
        )
    if not path.is_file():
        raise PortkitError(
            "The checkpoint has no config.json.",
            str(root),
            "Copy config.json beside the shards; vLLM reads the architecture from it.",
        )
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise PortkitError(
            f"config.json cannot be read: {error}.", str(path), "Restore it from the original."
        ) from error
    if not isinstance(config, dict) or not config.get("architectures"):
        raise PortkitError(
            'config.json names no "architectures".',
            str(path),
            'Add e.g. "architectures": ["HeliumForCausalLM"]: vLLM chooses the class by it.',
        )
    return config


def _shards(root: Path) -> list[Path]:
    index = root / INDEX
    if index.is_file():
        names = sorted(set(_weight_map(index).values()))
        absent = [name for name in names if not (root / name).is_file()]
        if absent:
            raise PortkitError(
                f"{len(absent)} of the {len(names)} shards that the index names "
                f"{'is' if len(absent) == 1 else 'are'} absent: {', '.join(absent[:4])}.",
                str(index),
                "Download the absent shards into that folder.",
            )
        return [root / name for name in names]
    shards = sorted(root.glob("*.safetensors"))
    if shards:
        return shards
    pickles = sorted(path.name for pattern in PICKLES for path in root.glob(pattern))
    if pickles:
        raise PortkitError(
            f"The checkpoint is a pickle ({', '.join(pickles[:3])}); loading one runs whatever "
            "code is in it, so portkit does not.",
            str(root),
            "Convert it where you trust it: "
            "`AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW, "
            "safe_serialization=True)`.",
        )
    raise PortkitError(
        "The checkpoint has no *.safetensors file.", str(root), "Copy its shards into that folder."
    )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = 'it has no "weight_map"' if isinstance(error, KeyError) else str(error)
        raise PortkitError(
            f"{index.name} cannot be read: {reason}.", str(index), "Restore it from the original."
        ) from error


def _compare_with_index(root: Path, tensors: dict[str, TensorInfo]) -> None:
    index = root / INDEX
    if not index.is_file():
        return
    said = _weight_map(index)
    astray = [name for name, shard in said.items() if name not in tensors]
    if astray:
        raise PortkitError(
            f"The index says that {astray[0]!r} is in {said[astray[0]]}, but no shard holds it.",
            str(index),
            "Index and shards are of different checkpoints: download them together again.",
        )
    moved = {(shard, tensors[name].shard): name for name, shard in said.items()}
    for (there, here), name in moved.items():
        if there == here:
            continue
        swapped = (here, there) in moved and (there, there) not in moved
        raise PortkitError(
            f"{there} and {here} are swapped: each holds what the index says of the other "
            f"({name!r}, for one)."
            if swapped
            else f"The index says that {name!r} is in {there}, but it is in {here}.",
            str(index),
            "Give the two files each other's name."
            if swapped
            else "Index and shards are of different checkpoints: download them together again.",
        )
