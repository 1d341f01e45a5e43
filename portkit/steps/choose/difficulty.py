"""What makes a port of this model easy or hard, from its facts and its config.

Each row names a property of the model, how it is here, and what goes wrong if a port overlooks it.
Rows come from facts alone; a property that the facts cannot tell is not guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from portkit.analysis.facts import ModelFacts
from portkit.analysis.recurrent import PLAIN


@dataclass(frozen=True)
class Row:
    """One property that a port has to get right."""

    what: str
    here: str
    """How it is in this model."""
    why: str
    """What happens if a port gets it wrong."""
    hard: bool = False
    """Does it go wrong often, or silently?"""


def difficulties(facts: ModelFacts, config: Mapping[str, Any]) -> tuple[Row, ...]:
    """Return the properties of the model, in the order of the steps that deal with them."""
    found = (
        *_rotary(facts),
        *_attention(facts, config),
        *_recurrent(facts),
        *_norms(facts),
        *_layer(facts),
        *_mlp(facts),
        *_ends(facts, config),
    )
    return tuple(row for row in found if row is not None)


def _rotary(facts: ModelFacts) -> list[Row]:
    rotary = facts.rotary
    if rotary is None and facts.attention is None and facts.recurrent:
        return []  # the state knows the order of the tokens
    if rotary is None:
        return [Row("positions", "no rotary embedding found", "See how positions enter.", True)]
    rows = []
    if rotary.layout == "half":
        why = "get_rope(..., is_neox_style=True)."
        rows.append(Row("rotary layout", "half-split (NeoX)", why))
    elif rotary.layout == "neighbours":
        why = "get_rope needs is_neox_style=False; with the other one text starts well and drifts."
        rows.append(Row("rotary layout", "interleaved (GPT-J)", why, True))
    else:
        rows.append(
            Row("rotary layout", f"not clear: {rotary.why}", "Compare with the source.", True)
        )
    if rotary.partial:
        why = "Without partial_rotary_factor the rest of each head is rotated too."
        rows.append(Row("rotary part", "only a part of each head", why, True))
    return rows


def _attention(facts: ModelFacts, config: Mapping[str, Any]) -> list[Row]:
    attention = facts.attention
    if attention is None and facts.recurrent:
        return []
    if attention is None:
        return [Row("attention", "not recognised", "It may not be one that vLLM has.", True)]
    rows = []
    heads, kv = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(kv, int) and kv != heads:
        why = f"With more than {kv} ranks the KV heads are copied, not split."
        rows.append(Row("grouped-query attention", f"{heads} query heads, {kv} KV heads", why))
    if attention.qkv is not None:
        why = "How q, k and v lie in it decides how it is loaded; the shapes do not tell."
        rows.append(Row("fused q/k/v", attention.qkv.attr, why, True))
    if attention.norms:
        over = "each head" if attention.per_head_norm else "all heads together"
        why = "Over all heads together a rank does not have what it needs: gather first."
        rows.append(Row("norm on q and k", f"over {over}", why, not attention.per_head_norm))
    if attention.sliding_window:
        why = "Only a prompt longer than the window shows that it is missing."
        rows.append(Row("sliding window", attention.sliding_window, why, True))
    if attention.soft_cap:
        why = "Dropped, greedy tokens stay the same and log-probabilities do not."
        rows.append(Row("soft cap in attention", attention.soft_cap, why, True))
    biases = sorted(
        {
            x.attr
            for x in (attention.q, attention.k, attention.v, attention.o)
            if x and x.bias != "False"
        }
    )
    if biases:
        why = "A layer built without bias loads without an error: vLLM skips unexpected biases."
        rows.append(Row("biases in attention", ", ".join(biases), why))
    return rows


def _recurrent(facts: ModelFacts) -> list[Row]:
    rows = []
    for mixer in facts.recurrent:
        name, why = PLAIN[mixer.kind]
        if mixer.why:
            why = f"{mixer.why}. Start from vLLM's {mixer.start}."
        rows.append(Row(name, f"{mixer.cls} keeps a state from token to token", why, True))
    if facts.recurrent and facts.attention is not None:
        why = "vLLM has to know that the model is hybrid (IsHybrid): its cache holds both."
        rows.append(Row("layers of two kinds", "attention in some, a state in others", why, True))
    return rows


_FORMULAS = {
    "rms": ("RMSNorm, as vLLM has it", "vLLM's RMSNorm.", False),
    "rms_fp32_weight": (
        "RMSNorm, weighted in float32",
        "As vLLM's but for rounding in bf16.",
        False,
    ),
    "rms_one_plus_weight": (
        "RMSNorm times 1 + w",
        "vLLM's GemmaRMSNorm; RMSNorm gives garbage.",
        True,
    ),
    "rms_no_weight": ("RMSNorm without weight", "vLLM's RMSNorm(has_weight=False).", False),
    "layernorm": ("LayerNorm", "No fused add-norm: write the residual out.", False),
}


def _norms(facts: ModelFacts) -> list[Row]:
    rows = []
    for norm in facts.norm_classes:
        here, why, hard = _FORMULAS.get(
            norm.formula, (f"not recognised: {norm.why}", "Keep the class as it is.", True)
        )
        rows.append(Row(norm.name, here, why, hard))
    return rows


def _layer(facts: ModelFacts) -> list[Row]:
    layer = facts.layer
    if layer is None or layer.residual == "pre":
        return []
    here = {
        "sandwich": "norms before and after attention and MLP",
        "post": "norms after attention and MLP",
        "parallel": "attention and MLP side by side",
        "other": "in an order of its own",
    }[layer.residual]
    return [Row("residual", here, "The usual fused add-norm computes another sum.", True)]


def _mlp(facts: ModelFacts) -> list[Row]:
    rows = []
    for mlp in facts.mlp:
        if mlp.kind == "gated":
            why = "One fused linear in vLLM; gate first, up second."
            rows.append(Row(mlp.cls, f"gate and up, {mlp.activation}", why))
        elif mlp.kind == "gated_fused":
            why = "Gate and up are fused in the checkpoint; see which half comes first."
            rows.append(Row(mlp.cls, f"fused gate and up, {mlp.activation}", why, True))
        elif mlp.kind == "plain":
            rows.append(Row(mlp.cls, f"up, {mlp.activation}, down", "Column- and row-parallel."))
        else:
            rows.append(
                Row(mlp.cls, f"not recognised: {mlp.why}", "Maybe experts; no draft.", True)
            )
    return rows


def _ends(facts: ModelFacts, config: Mapping[str, Any]) -> list[Row]:
    rows = []
    if facts.embedding is not None and facts.embedding.scale:
        why = "Left out, every layer sees another input."
        rows.append(Row("scaled embeddings", facts.embedding.scale, why, True))
    head = facts.head
    if head is None:
        return rows
    tied = bool(config.get("tie_word_embeddings"))
    if head.can_tie:
        why = "Tied: lm_head is not in the checkpoint. Untied: tying it discards real weights."
        rows.append(Row("head", "tied to the embeddings" if tied else "of its own", why))
    if head.scale or head.soft_cap:
        why = "It goes to LogitsProcessor; dropped, greedy tokens stay the same."
        rows.append(Row("logits", head.scale or f"soft cap {head.soft_cap}", why, True))
    return rows
