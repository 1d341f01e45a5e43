"""What a checkpoint folder holds, from config.json and the safetensors headers alone.

No tensor is read, so a terabyte takes as long as a megabyte: a shard's header gives each tensor's
dtype, shape and byte range, and the last range must end where the file ends.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from portkit.errors import PortkitError

INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors format."""


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a shard, without its data."""

    name: str
    dtype: str
    """As safetensors writes it: "F32", "BF16", ..."""
    shape: tuple[int, ...]
    shard: str
    """Name of the file it lies in."""
    bytes: int


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint folder."""

    folder: Path
    config: dict[str, Any]
    architecture: str
    tensors: tuple[TensorHeader, ...]
    """Empty if the weights are pickles, which cannot be looked into without running them."""
    pickles: tuple[str, ...] = field(default=())

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors)


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a checkpoint; PortkitError if there is none or it is no JSON object."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise PortkitError(
            f"There is no folder {str(folder)!r}.",
            "--checkpoint",
            "Give the folder of a downloaded checkpoint; portkit downloads nothing by itself.",
        )
    if not path.is_file():
        raise PortkitError(
            "The checkpoint has no config.json.",
            str(path),
            "Copy config.json of the model beside the weights: it names the architecture.",
        )
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, OSError) as error:
        raise PortkitError(
            f"config.json cannot be read: {error}.", str(path), "Correct it, or download it again."
        ) from error
    if not isinstance(config, dict):
        raise PortkitError(
            f"config.json holds a {type(config).__name__}, not an object.", str(path), "Correct it."
        )
    return config


def read_checkpoint(folder: Path, *, allow_pickle: bool = False) -> Checkpoint:
    """Check a checkpoint folder and return what it holds; each fault is its own PortkitError."""
    config = read_config(folder)
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise PortkitError(
            'config.json does not say which class the weights are of: no "architectures".',
            str(folder / "config.json"),
            'Add it, e.g. "architectures": ["HeliumForCausalLM"]; vLLM chooses the class by it.',
        )
    shards = shards_of(folder)
    if shards:
        tensors = tuple(tensor for path in shards for tensor in read_header(path))
        _check_index(folder, tensors)
        return Checkpoint(folder, config, names[0], tensors)
    pickles = tuple(sorted(path.name for kind in PICKLES for path in folder.glob(kind)))
    if not pickles:
        raise PortkitError(
            "The checkpoint has no weights: no *.safetensors file.",
            str(folder),
            "Download the whole checkpoint, or save it with `save_pretrained`.",
        )
    if not allow_pickle:
        raise PortkitError(
            f"The checkpoint is pickled ({pickles[0]}); reading a pickle runs the code in it.",
            str(folder / pickles[0]),
            "Convert it to safetensors (load it in a sandbox and `save_pretrained`), or, if you "
            "trust its author, say so: --allow-pickle.",
        )
    return Checkpoint(folder, config, names[0], (), pickles)


def shards_of(folder: Path) -> tuple[Path, ...]:
    """Return the safetensors files of a checkpoint: those the index names, else all of them."""
    weight_map = _weight_map(folder)
    if not weight_map:
        return tuple(sorted(folder.glob("*.safetensors")))
    paths = tuple(folder / name for name in sorted(set(weight_map.values())))
    for path in paths:
        if not path.is_file():
            count = sum(1 for shard in weight_map.values() if shard == path.name)
            raise PortkitError(
                f"A shard is missing: {path.name}, which the index names for {count} tensors.",
                str(folder / INDEX),
                "Download that file again, or correct the index.",
            )
    return paths


def _weight_map(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    if not path.is_file():
        return {}
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        return {str(name): str(shard) for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PortkitError(
            f"The index of the shards cannot be read: {error!r}.", str(path), "Download it again."
        ) from error


def read_header(path: Path) -> tuple[TensorHeader, ...]:
    """Return the tensors of one safetensors file; PortkitError if it is cut short or corrupt."""
    again = "Download that file again (and compare its size or sha256)."
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= MAX_HEADER:
            raise PortkitError(
                f"{path.name} is no safetensors file: it does not start with a header.",
                str(path),
                again,
            )
        raw = stream.read(length)
    if len(raw) < length:
        raise PortkitError(
            f"{path.name} is cut short: its header has {length} bytes, the file ends after "
            f"{len(raw)} of them.",
            str(path),
            again,
        )
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = tuple(
            TensorHeader(
                name,
                row["dtype"],
                tuple(row["shape"]),
                path.name,
                row["data_offsets"][1] - row["data_offsets"][0],
            )
            for name, row in header.items()
        )
        end = max((row["data_offsets"][1] for row in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise PortkitError(
            f"The header of {path.name} is corrupt: {error!r}.", str(path), again
        ) from error
    wanted = 8 + length + end
    if size != wanted:
        how = "is cut short" if size < wanted else "has bytes left over"
        raise PortkitError(
            f"{path.name} {how}: its header asks for {wanted:,} bytes, the file has {size:,}.",
            str(path),
            again,
        )
    return tensors


def _check_index(folder: Path, tensors: tuple[TensorHeader, ...]) -> None:
    """Compare the index with the headers, both ways."""
    found: dict[str, str] = {}
    for tensor in tensors:
        if tensor.name in found:
            raise PortkitError(
                f"{tensor.name} is in two shards: {found[tensor.name]} and {tensor.shard}.",
                str(folder),
                "Delete the file that does not belong to this checkpoint.",
            )
        found[tensor.name] = tensor.shard
    weight_map = _weight_map(folder)
    for name, shard in weight_map.items():
        if found.get(name) != shard:
            raise PortkitError(
                f"The index says that {name} is in {shard}, but it is not there.",
                str(folder / INDEX),
                "Download the index and that shard again.",
            )
