"""What is wrong with an attention whose original computes it inline.

Transformers' older models (GPT-J, Bloom, MPT) call no attention function: of them only what goes
into the output projection can be compared. Here the port's own queries, keys and values, or the
projection's, are put through an attention by hand with other slopes, another scale, another rotary
embedding, or another order of the fused rows; what then gives the original's numbers is named.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

from portkit.live.comparing import Evidence, rotate
from portkit.live.walk import fuses


@dataclass(frozen=True)
class _Heads:
    """One prompt's attention, from position 0 on."""

    q: torch.Tensor
    """float32 [tokens, heads * head_size]"""
    k: torch.Tensor
    """float32 [tokens, kv_heads * head_size]"""
    v: torch.Tensor
    heads: int
    size: int
    scale: float
    slopes: torch.Tensor | None
    window: int | None

    def attend(self) -> torch.Tensor:
        """Return float32 [tokens, heads * head_size]."""
        tokens = len(self.q)
        q = self.q.view(tokens, self.heads, self.size)
        k, v = (
            part.view(tokens, -1, self.size).repeat_interleave(
                self.heads * self.size // part.shape[1], 1
            )
            for part in (self.k, self.v)
        )
        scores = torch.einsum("qhd,khd->hqk", q, k) * self.scale
        places = torch.arange(tokens)
        back = places[:, None] - places
        if self.slopes is not None:
            scores = scores - self.slopes[:, None, None] * back
        hidden = back < 0 if self.window is None else (back < 0) | (back >= self.window)
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v).reshape(tokens, -1)


class WithInlineAttention(Evidence):
    """Evidence that can tell what an attention does with its queries, keys and values."""

    def _inline_attention(self) -> None:
        """Add causes if what differs is an attention's result, and nothing after it."""
        parent, given = self.at.path.rpartition(".")[0], self._ours()
        result = self.ours.values.get((parent, "attn"))
        if result is None or (parent, "attn") in self.theirs.values:
            return
        path, attention = self._attention_in(parent)
        if attention is None or not self._near(result, given):
            return
        ours = self._as_it_is(attention, parent)
        if ours is not None and self._near(ours.attend(), result):
            self._tried(ours, path, attention, parent)
        slopes = "ALiBi slopes, " if _slopes(attention) is not None else ""
        rotary = "the rotary embedding, " if self._rotary_in(parent)[1] is not None else ""
        if not self.at.first_ok:
            self.possible.append(
                "It is the attention's result, wrong already at position 0, which sees only its "
                "own value: the values are other rows than the original's (q, k and v split or "
                "re-ordered in another way: one after the other, or interleaved by head), or which "
                "KV head serves which query head."
            )
        else:
            self.possible.append(
                f"It is the attention's result, and right at position 0, which sees only itself: "
                f"what a token sees of the others differs: {slopes}{rotary}the scale, the window, "
                f"or the order of queries and keys."
            )

    # ---- what is tried --------------------------------------------------------------------------

    def _tried(self, ours: _Heads, path: str, attention: Attention, parent: str) -> None:
        target = self.theirs.values[self.at.path, self.at.role]
        for other, cause in self._ways(ours, attention):
            if self._near(other.attend(), target):
                self.found.append(f"{cause} (tried on this prompt).")
                self.blamed = path
                return
        rotary_path, rotary = self._rotary_in(parent)
        if isinstance(rotary, RotaryEmbedding):
            for other, cause in self._rotations(ours, rotary, parent):
                if self._near(other.attend(), target):
                    self.found.append(f"{cause} (tried on this prompt).")
                    self.blamed = rotary_path
                    return
        self._other_order(ours, parent, target)

    def _ways(self, ours: _Heads, attention: Attention) -> Iterator[tuple[_Heads, str]]:
        options = getattr(self.original.config, "attn_config", None)
        largest = float(getattr(options, "alibi_bias_max", 8) or 8)
        usual = alibi_slopes(ours.heads, largest)
        if ours.slopes is None:
            yield (
                replace(ours, slopes=usual),
                "With ALiBi the numbers agree: pass alibi_slopes= to Attention",
            )
        else:
            shown = ", ".join(f"{v:.4g}" for v in usual[:4].tolist())
            yield (
                replace(ours, slopes=usual),
                f"With the ALiBi slopes {shown}{', …' if ours.heads > 4 else ''} for these heads "
                "the numbers agree: those given to Attention differ",
            )
            yield (
                replace(ours, slopes=None),
                "Without ALiBi the numbers agree: the original has no slopes in this layer",
            )
        for scale in (ours.size**-0.5, 1.0, 1 / ours.size, (ours.heads * ours.size) ** -0.5):
            yield (
                replace(ours, scale=scale),
                f"With {scale:.6g} as Attention's scale the numbers agree: it is given "
                f"{ours.scale:.6g}",
            )
        if ours.window is not None:
            yield replace(ours, window=None), "Without a sliding window the numbers agree"
        window = getattr(self.original.config, "window_size", None)
        if ours.window is None and isinstance(window, int):
            yield (
                replace(ours, window=window),
                f"With a sliding window of {window} the numbers agree: per_layer_sliding_window=",
            )

    def _rotations(
        self, ours: _Heads, rotary: RotaryEmbedding, parent: str
    ) -> Iterator[tuple[_Heads, str]]:
        q, k = (self._get(self._projection(role, parent), "out") for role in "qk")
        if q is None or k is None or q.shape != ours.q.shape or k.shape != ours.k.shape:
            return
        positions = torch.arange(len(q))
        for base, dim, style, changed in rotary_ways(rotary, self.original.config):
            turned = [
                rotate(part, positions, rotary.head_size, dim, base, style) for part in (q, k)
            ]
            yield (
                replace(ours, q=turned[0], k=turned[1]),
                "With " + " and ".join(changed) + " in get_rope(...) the numbers agree",
            )

    def _other_order(self, ours: _Heads, parent: str, target: torch.Tensor) -> None:
        """Try the fused projection's rows one after the other, and interleaved by head."""
        for (path, role), whole in self.theirs.values.items():
            wide = whole.shape[1] == 3 * ours.q.shape[1] and ours.k.shape == ours.q.shape
            if role != "out" or not wide or path.rpartition(".")[0] != parent:
                continue
            heads = whole.unflatten(1, (ours.heads, 3, ours.size))
            orders = {
                "one after the other": whole.chunk(3, 1),
                "interleaved by head": [heads[:, :, n].flatten(1) for n in range(3)],
            }
            for order, (q, k, v) in orders.items():
                if self._near(replace(ours, q=q, k=k, v=v).attend(), target):
                    name = path.rpartition(".")[2]
                    self.found.append(
                        f"The original takes q, k and v out of {name}'s rows {order} (tried on "
                        "this prompt); the port's are other rows: they are re-ordered while "
                        "loading, or split, in another way."
                    )
                    if fuses(self._module(path)):
                        self.blamed = path
                    return

    # ---- what is there --------------------------------------------------------------------------

    def _attention_in(self, parent: str) -> tuple[str, Attention | None]:
        block = self._module(parent)
        for name, module in block.named_children() if block is not None else ():
            if isinstance(module, Attention):
                return f"{parent}.{name}", module
        return "", None

    def _rotary_in(self, parent: str) -> tuple[str, object]:
        block = self._module(parent)
        for name, module in block.named_children() if block is not None else ():
            if isinstance(module, RotaryEmbedding):
                return f"{parent}.{name}", module
        return "", None

    def _as_it_is(self, attention: Attention, parent: str) -> _Heads | None:
        """Return the port's attention; None if this prompt was not computed in one piece."""
        parts = [self.ours.values.get((parent, role)) for role in "qkv"]
        positions = self.ours.extra.get("positions", [])
        if any(p is None for p in parts) or positions != list(range(len(positions))):
            return None
        q, k, v = (part[: len(positions)] for part in parts if part is not None)
        fits = q.shape[1] == attention.num_heads * attention.head_size and k.shape == v.shape
        if not fits or len(q) != len(k) or k.shape[1] % attention.head_size:
            return None
        return _Heads(
            q, k, v, attention.num_heads, attention.head_size,
            float(getattr(attention.impl, "scale", 0.0)), _slopes(attention),
            getattr(attention, "sliding_window", None),
        )  # fmt: skip


def _slopes(attention: Attention) -> torch.Tensor | None:
    found = getattr(attention.impl, "alibi_slopes", None)
    return None if found is None else torch.as_tensor(found).float().cpu()


def alibi_slopes(heads: int, largest: float = 8.0) -> torch.Tensor:
    """Return float32 [heads]: the slopes of the paper (Press et al. 2022), as Transformers has
    them; of a number that is no power of two first the next smaller power's, then every other one
    of the next power's."""
    power = 2 ** math.ceil(math.log2(heads))
    slopes = 2.0 ** (-largest / power * torch.arange(1, power + 1))
    return slopes if power == heads else torch.cat([slopes[1::2], slopes[::2]])[:heads]


def rotary_ways(
    rotary: RotaryEmbedding, config: object
) -> Iterator[tuple[float, int, bool, list[str]]]:
    """Yield (base, rotated values of a head, is_neox_style, what is changed) for what may be meant
    instead of a port's rotary embedding."""
    rope = getattr(config, "rope_parameters", None) or {}
    theta = rope.get("rope_theta") if isinstance(rope.get("rope_theta"), int | float) else None
    part, own = rope.get("partial_rotary_factor"), getattr(config, "rotary_dim", None)
    dims = [rotary.rotary_dim, rotary.head_size]
    dims += [int(rotary.head_size * part)] if isinstance(part, int | float) else []
    dims += [own] if isinstance(own, int) and 0 < own <= rotary.head_size else []
    for base in dict.fromkeys([float(rotary.base)] + ([float(theta)] if theta else [])):
        for dim in dict.fromkeys(dims):
            for style in (rotary.is_neox_style, not rotary.is_neox_style):
                if changed := _differences(rotary, base, dim, style):
                    yield base, dim, style, changed


def _differences(rotary: RotaryEmbedding, base: float, dim: int, style: bool) -> list[str]:
    changed = []
    if style != rotary.is_neox_style:
        layout = "halves" if style else "interleaved pairs"
        changed.append(f"is_neox_style={style} (the original rotates {layout})")
    if base != rotary.base:
        changed.append(
            f"rope_theta {base:g} instead of {rotary.base:g} (pass "
            f"rope_parameters=config.rope_parameters)"
        )
    if dim != rotary.rotary_dim:
        changed.append(
            f"{dim} instead of {rotary.rotary_dim} of a head's {rotary.head_size} values rotated"
        )
    return changed
