"""A tiny tensor of numbers that remember where they came from.

To learn where a fused projection keeps queries, keys and values, its output is numbered and the
author's own view, permute, split and index statements are carried out on the numbers. Only what
moves elements is here: nothing is computed with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any


@dataclass(frozen=True)
class IndexArray:
    """Numbers in row-major order."""

    shape: tuple[int, ...]
    data: tuple[int, ...]
    touched: bool = False
    """Was an element-wise operation applied on the way?"""

    @classmethod
    def numbered(cls, shape: tuple[int, ...]) -> IndexArray:
        return cls(shape, tuple(range(math.prod(shape))))

    def made(self, shape: Sequence[int], data: Sequence[int]) -> IndexArray:
        return IndexArray(tuple(shape), tuple(data), self.touched)

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(math.prod(self.shape[i + 1 :]) for i in range(len(self.shape)))

    def axis(self, axis: int) -> int:
        """A non-negative axis; ValueError if there is none."""
        if not -len(self.shape) <= axis < len(self.shape):
            raise ValueError(f"no axis {axis} in {self.shape}")
        return axis % len(self.shape)

    def reshape(self, shape: Sequence[int]) -> IndexArray:
        sizes = list(shape)
        if sizes.count(-1) == 1:
            rest = math.prod(s for s in sizes if s != -1)
            sizes[sizes.index(-1)] = len(self.data) // rest if rest else 0
        if math.prod(sizes) != len(self.data):
            raise ValueError(f"{self.shape} does not fit {sizes}")
        return self.made(sizes, self.data)

    def permute(self, axes: Sequence[int]) -> IndexArray:
        order = [self.axis(a) for a in axes]
        if sorted(order) != list(range(len(self.shape))):
            raise ValueError(f"{axes} is no permutation")
        shape = [self.shape[a] for a in order]
        steps = [self.strides[a] for a in order]
        return self.made(
            shape,
            [
                self.data[sum(i * s for i, s in zip(place, steps, strict=True))]
                for place in product(*(range(n) for n in shape))
            ],
        )

    def transpose(self, first: int, second: int) -> IndexArray:
        axes = list(range(len(self.shape)))
        a, b = self.axis(first), self.axis(second)
        axes[a], axes[b] = b, a
        return self.permute(axes)

    def take(self, axis: int, places: Sequence[int]) -> IndexArray:
        """Elements at `places` of one axis."""
        axis = self.axis(axis)
        shape = [*self.shape[:axis], len(places), *self.shape[axis + 1 :]]
        data = []
        for place in product(*(range(n) for n in shape)):
            source = [*place[:axis], places[place[axis]], *place[axis + 1 :]]
            data.append(self.data[sum(i * s for i, s in zip(source, self.strides, strict=True))])
        return self.made(shape, data)

    def split(self, sizes: int | Sequence[int], axis: int) -> tuple[IndexArray, ...]:
        axis = self.axis(axis)
        length = self.shape[axis]
        if isinstance(sizes, int):
            sizes = [min(sizes, length - i) for i in range(0, length, sizes)]
        if sum(sizes) != length:
            raise ValueError(f"{sizes} does not sum to {length}")
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return tuple(
            self.take(axis, range(start, start + size))
            for start, size in zip(starts, sizes, strict=True)
        )

    def chunk(self, count: int, axis: int) -> tuple[IndexArray, ...]:
        return self.split(math.ceil(self.shape[self.axis(axis)] / count), axis)

    def unbind(self, axis: int) -> tuple[IndexArray, ...]:
        return tuple(part.squeeze(axis) for part in self.split(1, axis))

    def squeeze(self, axis: int) -> IndexArray:
        axis = self.axis(axis)
        if self.shape[axis] != 1:
            return self
        return self.made([*self.shape[:axis], *self.shape[axis + 1 :]], self.data)

    def unsqueeze(self, axis: int) -> IndexArray:
        axis = axis % (len(self.shape) + 1)
        return self.made([*self.shape[:axis], 1, *self.shape[axis:]], self.data)

    def flatten(self, start: int = 0, end: int = -1) -> IndexArray:
        first, last = self.axis(start), self.axis(end)
        middle = math.prod(self.shape[first : last + 1])
        return self.made([*self.shape[:first], middle, *self.shape[last + 1 :]], self.data)

    def unflatten(self, axis: int, sizes: Sequence[int]) -> IndexArray:
        axis = self.axis(axis)
        parts = list(sizes)
        if -1 in parts:
            rest = math.prod(s for s in parts if s != -1)
            parts[parts.index(-1)] = self.shape[axis] // rest
        return self.reshape([*self.shape[:axis], *parts, *self.shape[axis + 1 :]])

    def expand(self, shape: Sequence[int]) -> IndexArray:
        """Repeat axes of length one; as many axes as before."""
        if len(shape) != len(self.shape):
            raise ValueError(f"cannot expand {self.shape} to {shape}")
        found = self
        for axis, size in enumerate(shape):
            if size != -1 and found.shape[axis] != size:
                if found.shape[axis] != 1:
                    raise ValueError(f"cannot expand {self.shape} to {shape}")
                found = found.take(axis, [0] * size)
        return found

    def index(self, key: Any) -> IndexArray:
        """x[key] for integers, slices, lists, None and an ellipsis."""
        keys = list(key) if isinstance(key, tuple) else [key]
        used = sum(1 for k in keys if k is not None and k is not Ellipsis)
        if Ellipsis not in keys:
            keys.append(Ellipsis)
        at = keys.index(Ellipsis)
        keys[at : at + 1] = [slice(None)] * (len(self.shape) - used)
        found, axis = self, 0
        for k in keys:
            if k is None:
                found = found.unsqueeze(axis)
            elif isinstance(k, slice):
                found = found.take(axis, range(*k.indices(found.shape[axis])))
            elif isinstance(k, int):
                found = found.take(axis, [k % found.shape[axis]]).squeeze(axis)
                continue
            elif isinstance(k, list):
                found = found.take(axis, [i % found.shape[axis] for i in k])
            else:
                raise ValueError(f"cannot index by {k!r}")
            axis += 1
        return found
