"""What a diagnosis works with: both sides' captures and models, and ways to compare them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding, RotaryEmbeddingBase

from portkit.live.fused import fused_parts
from portkit.live.trace import Captures
from portkit.live.walk import Divergence, fuses, paired

NEAR = 1e-4
"""Relative to the largest value: how near float32 leaves two ways to compute the same."""


class Evidence:
    """One divergence, what is around it, and the causes collected so far."""

    def __init__(
        self,
        divergence: Divergence,
        ours: Captures,
        theirs: Captures,
        port: nn.Module,
        original: nn.Module,
    ) -> None:
        self.at = divergence
        self.ours = ours
        self.theirs = theirs
        self.port = port
        self.original = original
        self.packed = fused_parts(port)
        self.found: list[str] = []
        self.possible: list[str] = []
        self.call = ""
        """The attribute to be looked at, if it is not the module itself."""
        self.blamed = ""
        """The path of the module to be looked at, if it is another one than where it shows."""
        self.at_call = False
        """Whether the fault is in what is handed over and not in how the module is made."""

    def _matches(self, what: str = "vLLM's value is") -> str:
        """Say so if our tensor is another one of the original's; return that one's path."""
        ours, target = self._ours(), self.theirs.values[self.at.path, self.at.role]
        for (path, role), value in self.theirs.values.items():
            if (
                value.shape == ours.shape
                and self._near(ours, value)
                and not self._near(target, value)
            ):
                word = {"in": "the input of ", "out": "the output of "}.get(role, f"{role} of ")
                self.found.append(
                    f"{what} exactly what the original has as {word}{path}: what should come "
                    f"between is left out, "
                    "or the wrong variable is used."
                )
                return path
        return ""

    def _other_rows(self) -> None:
        """Say so if the tensor holds other rows of a fused projection than the original's.

        Told at position 0, which no rotary embedding turns.
        """
        prefix = f"{self.at.path}."
        for path, module in self.port.named_modules():
            whole = self.theirs.values.get((path, "out"))
            if not path.startswith(prefix) or whole is None or not fuses(module):
                continue
            ours, target = self._ours()[:1], self.theirs.values[self.at.path, self.at.role][:1]
            nearest = (ours.reshape(-1, 1) - whole[:1]).abs().amin(dim=1)
            inside = bool(nearest.max() <= NEAR * float(whole[0].abs().max()))
            if inside and not self._near(ours, target):
                self.found.append(
                    f"The {self.at.role} of the attention are other rows of {path} than in the "
                    "original: the checkpoint keeps q, k and v in another order in it (one after "
                    "the other, or interleaved by head) than loading and split take them in."
                )

    def _scaled(self, what: str) -> None:
        ours, theirs = self._ours(), self.theirs.values[self.at.path, self.at.role]
        rows = min(len(ours), len(theirs))
        ours, theirs = ours[:rows], theirs[:rows]
        energy = float((ours * ours).sum())
        ratio = float((ours * theirs).sum()) / energy if energy else 0.0
        if ratio and abs(ratio - 1) > 1e-3 and self._near(ours * ratio, theirs):
            hidden = getattr(self.original.config, "hidden_size", 0)
            root = (
                " (the root of hidden_size)"
                if hidden and abs(ratio - hidden**0.5) < 0.05 * ratio
                else ""
            )
            self.found.append(
                f"{what[0].upper()}{what[1:]} is {ratio:.6g} times as large in the original{root}."
            )

    def _near(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        rows = min(len(a), len(b))
        if a.shape[1:] != b.shape[1:] or not rows:
            return False
        scale = float(b[:rows].abs().max()) or 1.0
        return bool((a[:rows] - b[:rows]).abs().max() <= NEAR * scale)

    def _nearest(self, tried: dict[Any, torch.Tensor], target: torch.Tensor) -> Any:
        """Return the key of what is nearest to the target, if it is near at all."""
        near = {key: value for key, value in tried.items() if self._near(value, target)}
        rows = len(target)
        return min(
            near, key=lambda key: float((near[key][:rows] - target).abs().max()), default=None
        )

    def _ours(self) -> torch.Tensor:
        value = self._get(self.at.path, self.at.role)
        return value if value is not None else torch.zeros(0, 0)

    def _get(self, path: str, role: str) -> torch.Tensor | None:
        return paired(self.ours, self.theirs, self.packed, path, role) if path else None

    def _module(self, path: str) -> Any:
        return dict(self.port.named_modules(remove_duplicate=False)).get(path)

    def _original(self, path: str) -> Any:
        return dict(self.original.named_modules(remove_duplicate=False)).get(path)

    def _block(self) -> nn.Module | None:
        return self._module(self.at.path)

    def _rotary_module(self) -> RotaryEmbeddingBase | None:
        for root in (self._block(), self.port):
            for module in root.modules() if root is not None else ():
                if isinstance(module, RotaryEmbeddingBase):
                    return module
        return None

    def _attention_module(self) -> Attention | None:
        block = self._block()
        return (
            next((m for m in block.modules() if isinstance(m, Attention)), None) if block else None
        )

    def _name_of(self, module: nn.Module) -> str:
        block = self._block()
        return next((n for n, m in block.named_children() if m is module), "") if block else ""

    def _rotary_positions(self) -> list[int]:
        return next(iter(self.ours.extra.get("rotary positions", {}).values()), [])

    def _projection(self, role: str, block: str = "") -> str:
        """Return the path of the original's projection (or norm) that made q or k, in `block` or
        where the divergence is."""
        prefix = f"{block or self.at.path}."
        names = [p for p, r in self.theirs.values if r == "out" and p.startswith(prefix)]
        named = [p for p in names if p.removeprefix(prefix).startswith((f"{role}_", f"{role}."))]
        return named[-1] if named else ""


def rotate(
    states: torch.Tensor,
    positions: torch.Tensor,
    head_size: int,
    dim: int,
    base: float,
    style: bool,
) -> torch.Tensor:
    """Apply vLLM's own rotary formula to [tokens, heads * head_size] with other settings."""
    frequencies = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    angles = torch.outer(torch.arange(int(positions.max()) + 1, dtype=torch.float32), frequencies)
    cache = torch.cat((angles.cos(), angles.sin()), dim=-1)
    rotated, _ = RotaryEmbedding.forward_static(
        positions, states.clone(), None, head_size, dim, cache, style
    )
    return rotated
