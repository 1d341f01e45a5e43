"""Follow every checkpoint tensor through a port's load_weights into the parameters it fills.

A dispatch mode sees each operation: a tensor that comes out of another inherits the names of the
checkpoint tensors in it, so cuts, transposes, stacks and casts are followed, and each write into a
parameter is known by its region and its sources. It does not matter how the port loads. Nothing is
computed twice and, with tensors on the meta device, nothing is read: headers are enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from portkit.live.checkpoint import TensorInfo
from portkit.live.loader import DERIVED, loadable

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class Write:
    """One write into a parameter."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    """In elements, from the parameter's first."""
    sources: frozenset[str]
    """Names of checkpoint tensors; empty for a constant, such as the zeros of a padding."""

    @property
    def count(self) -> int:
        return math.prod(self.size)

    @property
    def span(self) -> int:
        """Elements from the first to the last, those between included."""
        return (
            1 + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))
            if self.count
            else 0
        )

    @property
    def block(self) -> bool:
        """Whether it is one piece without gaps."""
        return self.count == self.span


@dataclass
class Filled:
    """What became of one parameter."""

    shape: tuple[int, ...]
    elements: int
    written: int = 0
    """Elements that were written, from the checkpoint or by a constant."""
    constant: int = 0
    """Of these, those only written by a constant."""
    twice: int = 0
    """Elements that were written from the checkpoint more than once."""
    sources: list[str] = field(default_factory=list)
    doubles: list[str] = field(default_factory=list)
    """The tensors that wrote over what was written already."""
    required: bool = True
    """False for a buffer: it may be computed and not stored."""

    @property
    def full(self) -> bool:
        return self.written == self.elements and (
            self.constant < self.elements or not self.elements
        )


@dataclass
class Coverage:
    """What a load did."""

    parameters: dict[str, Filled]
    tensors: dict[str, int]
    """Elements of each checkpoint tensor that reached a parameter, in the order of the stream."""
    sizes: dict[str, int]
    """Elements of each checkpoint tensor."""
    returned: list[str] | None
    """The names that load_weights returned, sorted; None if it returned none."""
    error: dict[str, str] = field(default_factory=dict)
    """What, where and next of what load_weights raised."""

    @property
    def unwritten(self) -> dict[str, Filled]:
        return {n: f for n, f in self.parameters.items() if f.required and not f.full}

    @property
    def unconsumed(self) -> list[str]:
        return [n for n, count in self.tensors.items() if not count and not n.endswith(DERIVED)]

    @property
    def cut(self) -> list[str]:
        """Tensors of which a part went nowhere (one rank: on several, each takes its part)."""
        return [n for n, count in self.tensors.items() if 0 < count < self.sizes[n]]

    @property
    def twice(self) -> dict[str, Filled]:
        return {n: f for n, f in self.parameters.items() if f.twice}

    def to_dict(self) -> dict[str, Any]:
        return {
            "parameters": {n: {**asdict(f), "full": f.full} for n, f in self.parameters.items()},
            "tensors": self.tensors,
            "sizes": self.sizes,
            "returned": self.returned,
            "error": self.error,
            "unwritten": list(self.unwritten),
            "unconsumed": self.unconsumed,
            "twice": list(self.twice),
            "cut": self.cut,
        }


class Tracer(TorchDispatchMode):
    """Records the writes into a model's parameters and buffers while it is active."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.targets: dict[str, torch.Tensor] = {}
        self.names: dict[int, str] = {}
        for name, tensor in loadable(model).items():
            if _key(tensor) not in self.names:
                self.names[_key(tensor)] = name
                self.targets[name] = tensor
        self.before = {name: _key(tensor) for name, tensor in self.targets.items()}
        self.writes: dict[str, list[Write]] = {name: [] for name in self.targets}
        self.sources: dict[int, frozenset[str]] = {}
        self.sizes: dict[str, int] = {}
        self.bytes: dict[str, int] = {}
        self.alive: dict[str, StorageWeakRef] = {}
        self.last: tuple[str, tuple[int, ...]] | None = None
        """Name and shape of the tensor that was asked for last."""
        self.held_peak = 0
        """The most bytes of checkpoint tensors that were alive at once."""
        self.held_then: list[str] = []
        """Their names at that moment."""

    def watch(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Pass a stream of checkpoint tensors on, knowing each by its name from here on."""
        for name, tensor in weights:
            self.sources[_key(tensor)] = frozenset({name})
            self.sizes[name] = tensor.numel()
            self.bytes[name] = tensor.numel() * tensor.element_size()
            self.alive[name] = StorageWeakRef(tensor.untyped_storage())
            self.alive = {n: ref for n, ref in self.alive.items() if not ref.expired()}
            held = sum(self.bytes[n] for n in self.alive)
            if held > self.held_peak:
                self.held_peak, self.held_then = held, list(self.alive)
            self.last = name, tuple(tensor.shape)
            yield name, tensor
            del tensor

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        mutated = _mutated(function, args, kwargs)
        skip = function is torch.ops.aten.copy_.default and args[1].is_meta and not args[0].is_meta
        out = args[0] if skip else function(*args, **kwargs)
        changed = {id(t) for t in mutated}
        sources = frozenset().union(
            *(self.sources.get(_key(t), frozenset()) for t in given if id(t) not in changed)
        )
        for tensor in mutated:
            key = _key(tensor)
            if key in self.names:
                self._note(self.names[key], tensor, sources)
            else:
                self.sources[key] = self.sources.get(key, frozenset()) | sources
        if not mutated:
            inputs = {_key(t) for t in given}
            for tensor in tree_leaves(out):
                # A view shares its storage, and so its sources, with what it is of.
                if isinstance(tensor, torch.Tensor) and _key(tensor) not in inputs:
                    self.sources[_key(tensor)] = sources
        return out

    def _note(self, name: str, tensor: torch.Tensor, sources: frozenset[str]) -> None:
        offset = tensor.storage_offset() - self.targets[name].storage_offset()
        self.writes[name].append(
            Write(tuple(tensor.shape), tuple(tensor.stride()), offset, sources)
        )

    def coverage(self, returned: Any) -> Coverage:
        """Return what was done, once the load is over."""
        reached = dict.fromkeys(self.sizes, 0)
        parameters = {}
        now = loadable(self.model)
        required = dict(self.model.named_parameters(remove_duplicate=False))
        for name, writes in self.writes.items():
            tensor = now.get(name, self.targets[name])
            if _key(tensor) != self.before[name]:
                # `param.data = ...` puts another storage there without an operation.
                whole = Write(
                    tuple(tensor.shape),
                    tuple(tensor.stride()),
                    0,
                    self.sources.get(_key(tensor), frozenset()),
                )
                writes = [whole]
            parameters[name] = _filled(tensor, writes, reached)
            parameters[name].required = name in required
        names = None if returned is None else sorted(str(n) for n in returned)
        return Coverage(parameters, reached, dict(self.sizes), names)


def _filled(tensor: torch.Tensor, writes: list[Write], reached: dict[str, int]) -> Filled:
    """Add up the writes into one parameter; `reached` counts for the tensors they came from."""
    found = Filled(tuple(tensor.shape), tensor.numel())
    seen: list[Write] = []
    for write in writes:
        if not write.count or not write.sources:
            continue
        if any(_may_overlap(write, other) for other in seen):
            found.doubles += [s for s in sorted(write.sources) if s not in found.doubles]
        seen.append(write)
        for source in sorted(write.sources):
            reached[source] += write.count
            if source not in found.sources:
                found.sources.append(source)
    constants = [w for w in writes if w.count and not w.sources]
    whole = Write(tuple(tensor.shape), tuple(tensor.stride()), 0, frozenset())
    add_up = _by_intervals if all(w.block for w in (whole, *seen, *constants)) else _by_counting
    once, twice, constant = add_up(whole, seen, constants)
    found.written, found.twice, found.constant = once + constant, twice, constant
    if not twice:
        found.doubles.clear()
    return found


def _may_overlap(one: Write, other: Write) -> bool:
    return one.offset < other.offset + other.span and other.offset < one.offset + one.span


def _by_intervals(
    whole: Write, writes: list[Write], constants: list[Write]
) -> tuple[int, int, int]:
    """Return elements written, written more than once, and only by constants: contiguous writes."""
    events: list[tuple[int, int, int]] = []
    for group, members in enumerate((writes, constants)):
        for write in members:
            start, end = max(0, write.offset), min(whole.count, write.offset + write.count)
            if start < end:
                events += [(start, 1, group), (end, -1, group)]
    once = twice = constant = last = 0
    depth = [0, 0]
    for place, step, group in sorted(events):
        length = place - last
        once += length * (depth[0] > 0)
        twice += length * (depth[0] > 1)
        constant += length * (depth[0] == 0 and depth[1] > 0)
        depth[group] += step
        last = place
    return once, twice, constant


def _by_counting(whole: Write, writes: list[Write], constants: list[Write]) -> tuple[int, int, int]:
    """The same for writes of any shape: count for every element."""
    times = torch.zeros(whole.span, dtype=torch.uint8)
    marked = torch.zeros(whole.span, dtype=torch.bool)
    for write in writes:
        times.as_strided(write.size, write.stride, write.offset).add_(1)
    for write in constants:
        marked.as_strided(write.size, write.stride, write.offset).fill_(True)
    own = times.as_strided(whole.size, whole.stride, 0)
    only = marked.as_strided(whole.size, whole.stride, 0)
    return int((own > 0).sum()), int((own > 1).sum()), int((only & (own == 0)).sum())


def from_headers(tensors: Iterable[TensorInfo]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors of the right shapes and dtypes without any value."""
    for info in tensors:
        yield (
            info.name,
            torch.empty(info.shape, dtype=DTYPES.get(info.dtype, torch.float32), device="meta"),
        )


def _key(tensor: torch.Tensor) -> int:
    """Return what tensors that share memory have in common, also on the meta device."""
    return tensor.untyped_storage()._cdata


def _mutated(function: Any, args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    found = []
    for position, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            found += [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)]
    return found
