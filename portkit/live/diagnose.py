"""From the first diverging module to its likely causes, most likely first.

Where a cause can be tried it is tried: the same numbers are put through the other rotary layout,
the other order, a missing bias or scale, and what then agrees is named as found and not as
possible. Works from what the two models hold; knows no architecture by name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

from portkit.live.activations import WithActivations
from portkit.live.comparing import NEAR, rotate
from portkit.live.gates import WithGates
from portkit.live.inline_attention import WithInlineAttention, rotary_ways
from portkit.live.sums import WithSums

EXPERTS = (
    "The experts' weights stand in each other's places: ckpt_names gives gate, down and up, in "
    "this order.",
    "The routing differs: renormalize, the scoring function, top_k, groups, or a bias of the "
    "router; compare with the original's router.",
    "The routed answer is scaled twice or not at all (routed_scaling_factor), or shared experts "
    "are left out or summed twice.",
)
"""What makes a block of experts wrong whose input is right."""


class Diagnosis(WithInlineAttention, WithActivations, WithGates, WithSums):
    """Collects causes about one divergence."""

    def run(self) -> tuple[str, ...]:
        """Return the causes, those that were proven before those that are only likely."""
        at = self.at
        if at.kind == "never called":
            self._never_called()
        elif at.kind == "shape":
            self.possible.append(
                f"{at.path} ({at.role}) is {at.shape_ours} in vLLM and {at.shape_theirs} in "
                "Transformers, as [tokens, width]: compare the sizes given to it with the config's."
            )
        elif at.kind == "logits":
            self._logits()
        elif at.role in "qk":
            self._other_rows()
            self._rotary()
        elif at.role == "v":
            self._other_rows()
            self._matches()
            self.possible.append(
                "q, k and v are split in another order, or with other sizes, than they were "
                "projected."
            )
        elif at.role == "attn":
            self._attention()
        elif at.role == "in":
            self._input()
        else:
            self._output()
        return tuple(dict.fromkeys(self.found + self.possible))

    # ---- by kind --------------------------------------------------------------------------------

    def _never_called(self) -> None:
        at = self.at
        if isinstance(self._module(at.path), Attention):
            self.found.append(
                f"The port makes {at.path} but its forward never calls it: keys and values do "
                f"not reach "
                "vLLM's paged cache, and no later chunk or decode step can see them."
            )
            return
        what = self.uncalled_around(at.path) or at.path
        self.found.append(
            f"The port makes {what} and loads its weights, but its forward never calls it."
        )
        parent = at.path.rpartition(".")[0]
        for path in self.ours.extra.get("called again", ()):
            if path.rpartition(".")[0] == parent:
                self.found.append(f"{path} is called twice instead.")

    def uncalled_around(self, path: str) -> str:
        """Return the outermost module around `path` of which nothing is called; "" if none."""
        parts = path.split(".")
        for depth in range(1, len(parts)):
            around = ".".join(parts[:depth])
            called = any(f"{seen}.".startswith(f"{around}.") for seen, _ in self.ours.values)
            if not called and self._module(around) is not None:
                return around
        return ""

    def _rotary(self) -> None:
        rotary = self._rotary_module()
        if rotary is not None:
            self.call = self._name_of(rotary)
        given = self._get(self._projection(self.at.role), "out")
        target = self.theirs.values[self.at.path, self.at.role]
        if self.ours.extra.get("rotary misread"):
            self.at_call = True
            self.found.append(
                "The rotary embedding is given queries of [tokens, heads, head_dim], of which "
                "vLLM's kernel for CPUs turns wrong rows; its kernel for GPUs takes both forms. "
                "Hand on [tokens, heads * head_dim]: q.flatten(1)."
            )
            return
        used = self._rotary_positions()
        table = getattr(rotary, "cos_sin_cache", None)
        if used and table is not None and max(used) >= len(table):
            self.found.append(
                f"The rotary embedding's table has {len(table)} rows and is read at position "
                f"{max(used)}, beyond its end: max_position= of get_rope is "
                "config.max_position_embeddings."
            )
        passed = self.ours.extra.get("positions", [])
        if used and passed and used != passed[: len(used)]:
            wrong = next(i for i, (a, b) in enumerate(zip(used, passed, strict=False)) if a != b)
            self.at_call = True
            self.found.append(
                f"The rotary embedding is given position {used[wrong]} for the token at position "
                f"{passed[wrong]}: positions are recomputed. Hand on the `positions` that forward "
                "gets; in a batch, a chunk or a decode step they do not start at 0."
            )
        elif given is not None and self._near(self._ours(), given):
            self.found.append(
                f"{self.at.role} reaches the attention just as the projection left it: the rotary "
                "embedding is not applied. Call `q, k = self.rotary_emb(positions, q, k)`."
            )
        elif rotary is not None and given is not None and isinstance(rotary, RotaryEmbedding):
            self._try_rotary(rotary, given, target)
        if not self.found and self._turned_otherwise(target):
            self.found.append(
                f"At position 0, which no rotation turns, {self.at.role} has the original's values "
                "in another order; at later ones it has other values: other pairs of a head's "
                "dimensions are turned together than in the original, halves or neighbours "
                "(is_neox_style of get_rope)."
            )
        self._scaled(f"{self.at.role} before the attention")
        other = self._matches()
        if other and not other.startswith(self._projection(self.at.role)):
            attention = self._attention_module()
            self.call, self.at_call = (
                self._name_of(attention) if attention is not None else "",
                True,
            )
        if self.at.first_ok:
            self.possible.append(
                "Position 0 is right and later ones are not, which only a rotation can do: "
                "is_neox_style, rope_parameters (theta, scaling) or the rotated part of the head "
                "in get_rope(...) differ from the original."
            )
        else:
            self.possible.append(
                f"Something between the projection and the attention changes {self.at.role}: a "
                "norm of queries and keys left out, a scale, or a split with other sizes."
            )

    def _turned_otherwise(self, target: torch.Tensor) -> bool:
        """Whether the first token has the original's values, in another order, and others not."""
        ours = self._ours()
        rows = min(len(ours), len(target))
        if rows < 2 or ours.shape[1] != target.shape[1]:
            return False
        mine, theirs = (t[:rows].sort(1).values for t in (ours, target))
        return self._near(mine[:1], theirs[:1]) and not self._near(mine[1:], theirs[1:])

    def _try_rotary(
        self, rotary: RotaryEmbedding, given: torch.Tensor, target: torch.Tensor
    ) -> None:
        positions = torch.tensor(self.ours.extra["positions"][: len(given)])
        for base, dim, style, changed in rotary_ways(rotary, self.original.config):
            if self._near(rotate(given, positions, rotary.head_size, dim, base, style), target):
                self.found.append(
                    "With " + " and ".join(changed) + " the numbers agree (tried on this "
                    "prompt). Change that in get_rope(...)."
                )
                return

    def _attention(self) -> None:
        attention = self._attention_module()
        options = self.theirs.extra.get(f"{self.at.path} attention", {})
        self.call = self._name_of(attention) if attention is not None else ""
        if attention is not None:
            impl = attention.impl
            scale, wanted = float(getattr(impl, "scale", 0.0)), options.get("scaling")
            if wanted and scale and abs(scale / wanted - 1) > 1e-5:
                self.found.append(
                    f"Attention's scale is {scale:.6g}, the original's is {wanted:.6g}: "
                    f"{scale / wanted:.4g} times it."
                )
            if attention.num_kv_heads != options.get("kv_heads", attention.num_kv_heads):
                self.found.append(
                    f"Attention was given {attention.num_kv_heads} KV heads, the original has "
                    f"{options['kv_heads']}: pass num_kv_heads=."
                )
            window = options.get("sliding_window")
            ours = getattr(attention, "sliding_window", None)
            if (window or None) != (ours or None) and (window or ours):
                self.found.append(
                    f"The sliding window is {ours} in vLLM and {window} in the original: "
                    "per_layer_sliding_window=."
                )
            cap = options.get("softcap")
            ours_cap = getattr(impl, "logits_soft_cap", None) or getattr(impl, "soft_cap", None)
            if (cap or 0) != (ours_cap or 0):
                self.found.append(
                    f"Attention logits are capped at {cap} in the original: logits_soft_cap=."
                )
        self._matches()
        if self.at.first_ok:
            self.possible.append(
                f"q, k and v agree and so do the first {self.at.first_ok} positions; what a token "
                "may see, or how sharply, differs: scale, sliding window, ALiBi, soft-cap."
            )
        else:
            self.possible.append(
                "q, k and v agree, but position 0 (which sees only itself) does not: head counts, "
                "or which KV head serves which query head."
            )

    def _input(self) -> None:
        self._matches("What it is given is")
        name = self.at.path.rpartition(".")[2]
        parent = self.at.path.rpartition(".")[0]
        self._activation(parent, product=True)
        self._gate(parent)
        self._scaled(f"the input of {name}")
        self._inline_attention()
        if not self.found:
            self._other_columns(parent)
        self._terms()
        self.possible.append(
            f"Everything computed before agrees, so the port's forward hands {name} another tensor "
            "than the original does: a norm, a residual, an activation or a scale in between."
        )

    def _output(self) -> None:
        path = self.at.path
        ours, theirs = self._ours(), self.theirs.values[path, "out"][: len(self._ours())]
        module, original = self._module(path), self._original(path)
        weight, wanted = getattr(module, "weight", None), getattr(original, "weight", None)
        if wanted is not None and wanted.dim() == 1:
            self._norm(module, original, ours, theirs)
        elif isinstance(original, nn.Embedding):
            self._scaled("The embedding")
            self._tied(module)
            self.possible.append(
                "The embedding's rows differ: was its weight loaded, and tied as the config says?"
            )
        elif wanted is not None:
            self._bias(module, original, ours, theirs)
            self._swapped(path, ours)
            self._transposed(original, ours, theirs)
            if (
                weight is not None
                and weight.shape == wanted.shape
                and not self._near(weight.detach().float().cpu(), wanted.detach().float().cpu())
            ):
                self.found.append(
                    f"The weight itself differs from the checkpoint's: {path} was not loaded as "
                    f"it should be."
                )
            self.possible.append(
                "Its input agrees, its output does not: weight, bias, or the order inside a "
                "fused layer."
            )
        elif original is not None and not any(True for _ in original.children()):
            self._activation(path.rpartition(".")[0], product=False)
            self._matches("What it returns is")
            self.possible.append(
                f"{path} is {type(original).__name__} in the original and "
                f"{type(module).__name__} in the port, "
                "or it is called on another tensor."
            )
        else:
            self._scaled(f"What {path} returns")
            self._matches("What it returns is")
            if hasattr(original, "experts") and hasattr(module, "experts"):
                # Both sides work on a flat list of tokens inside: nothing was compared there.
                self.call = "experts"
                self.possible += EXPERTS
                return
            self._terms()
            self.possible.append(
                "All modules inside agree: what its forward does between them differs, a residual "
                "added or left out, a multiplier, an order."
            )

    def _tied(self, embedding: Any) -> None:
        """Say so if the port's head is the embedding, and the original's is not."""
        own = self.original.get_output_embeddings()
        apart = own is not None and own.weight is not self.original.get_input_embeddings().weight
        for path, module in self.port.named_modules():
            tied = getattr(module, "weight", None) is embedding.weight
            if tied and apart and module is not embedding:
                self.blamed = path
                self.found.append(
                    f"The port ties {path} to the embedding, the original has weights of its own "
                    "for it: loaded last, they stand in the embedding."
                )

    def _norm(self, module: Any, original: Any, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        eps = [
            next((float(getattr(m, n)) for n in ("variance_epsilon", "eps") if hasattr(m, n)), None)
            for m in (module, original)
        ]
        if None not in eps and eps[0] != eps[1]:
            self.found.append(f"Its eps is {eps[0]:g}, the original's is {eps[1]:g}.")
        weight = original.weight.detach().float().cpu()
        rows, size = ours, len(weight)
        if ours.shape[1] % size == 0:  # a norm of each head alone
            rows, theirs = ours.reshape(-1, size), theirs.reshape(-1, size)
        if self._near(rows * weight, theirs):
            self.found.append("The norm's weight is not applied.")
        elif self._near(rows * (1 + weight) / weight, theirs):
            self.found.append("The original multiplies by (1 + weight): use GemmaRMSNorm.")
        elif self._near((rows - rows.mean(-1, keepdim=True)), theirs):
            self.found.append("The original subtracts the mean: it is a LayerNorm.")
        self._matches("What it returns is")
        self.possible.append(
            "Its input agrees: its formula differs (mean, eps, 1 + weight), or its weight is "
            "another norm's."
        )

    def _bias(self, module: Any, original: Any, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        difference = theirs - ours
        bias = getattr(original, "bias", None)
        if bias is not None and self._near(
            difference, bias.detach().float().cpu().expand_as(difference)
        ):
            self.found.append(
                "Exactly its bias is missing: build the layer with bias= as the config says."
            )
        elif len(difference) > 1 and self._near(difference, difference[:1].expand_as(difference)):
            self.found.append("The difference is the same for every token: a bias is wrong.")

    def _transposed(self, original: Any, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        """Say so if a square weight stands transposed: its shape cannot tell."""
        given = self._get(self.at.path, "in")
        weight = original.weight.detach().float().cpu()
        if given is None or weight.shape != (given.shape[1],) * 2:
            return
        before = self.theirs.values[self.at.path, "in"]

        def gives(answer: torch.Tensor, states: torch.Tensor, way: torch.Tensor) -> bool:
            off = answer - states[: len(answer)] @ way  # a bias is the same for every token
            return bool((off - off[:1]).abs().max() <= NEAR * answer.abs().max())

        for way in (weight, weight.t()):
            if gives(ours, given, way) and not gives(theirs, before, way):
                self.found.append(
                    "Its square weight stands transposed: a Conv1D checkpoint stores [in, out], "
                    "and each such weight is transposed while loading, square ones too."
                )

    def _swapped(self, path: str, ours: torch.Tensor) -> None:
        parent, _, name = path.rpartition(".")
        for members in self.packed.values():
            if name in members:
                for other in members:
                    value = self.theirs.values.get((f"{parent}.{other}", "out"))
                    if other != name and value is not None and self._near(ours, value):
                        self.found.append(
                            f"In the place of {name} stands {other}: the fused layer's parts "
                            f"are in another order."
                        )

    def _logits(self) -> None:
        ours, theirs = self.ours.extra["logits"], self.theirs.extra["logits"]
        ratio = float((ours * theirs).sum() / (ours * ours).sum())
        if self._near(ours * ratio, theirs):
            self.found.append(
                f"The logits are the original's divided by {ratio:.6g}: a logit scale is left out "
                "or applied twice (greedy tokens do not show it)."
            )
        head = self.original.get_output_embeddings()
        bias = getattr(head, "bias", None)
        if bias is not None and self._near(theirs - ours, bias.detach().float().cpu() + 0 * ours):
            self.found.append(
                "Exactly the head's bias is missing: ParallelLMHead(bias=True) only holds it; "
                "self.logits_processor(self.lm_head, hidden_states, self.lm_head.bias) adds it."
            )
        cap = getattr(self.original.config, "final_logit_softcapping", None)
        if cap and self._near(cap * torch.tanh(ours / cap), theirs):
            self.found.append(
                f"The original caps its logits at {cap}: soft_cap= of LogitsProcessor."
            )
        self.possible.append(
            "The hidden states agree, compute_logits does not: head not tied as the config says, "
            "its weight not loaded, a scale or a cap left out."
        )
