"""What a model is made of, in plain words and a picture; drawn from facts and config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from portkit.analysis.facts import ModelFacts
from portkit.analysis.recurrent import PLAIN
from portkit.report.blocks import Block, Heading, Line, Log, Pairs, Report

RESIDUAL = {
    "pre": "norm before attention and before the MLP",
    "sandwich": "norms before and after attention and the MLP",
    "post": "norm after attention and after the MLP",
    "parallel": "attention and MLP side by side, from one norm",
    "other": "in an order of its own",
}
MLP = {
    "gated": "gate and up as two linears, their product to down",
    "gated_fused": "gate and up in one linear, their product to down",
    "plain": "up, activation, down",
    "unknown": "of a kind that the facts do not tell",
}
NORM = {
    "rms": "RMSNorm as vLLM has it: scaled in float32, cast back, then weighted",
    "rms_fp32_weight": "RMSNorm, weighted in float32 before it is cast back",
    "rms_one_plus_weight": "RMSNorm weighted by 1 + w, as in Gemma",
    "rms_no_weight": "RMSNorm without a weight",
    "layernorm": "LayerNorm: a mean is subtracted",
    "unknown": "a formula that the facts do not know",
}


def model_report(facts: ModelFacts, config: Mapping[str, Any], title: str) -> Report:
    """Return the parts of a model, a picture of it, and what could not be told."""
    blocks: list[Block] = [Heading(title), Log(picture(facts, config)), Pairs(_rows(facts, config))]
    for unknown in facts.unknown:
        where = f"line {unknown.line}" if unknown.line else ""
        blocks.append(
            Line(unknown.what, "warning", label=f"not clear: {unknown.about}", aside=where)
        )
    return Report(tuple(blocks), values=(facts,))


def _value(expression: str, config: Mapping[str, Any]) -> str:
    """Return what an expression such as "config.hidden_size" is in this checkpoint."""
    name = expression.removeprefix("self.").removeprefix("config.")
    value = config.get(name)
    return str(value) if isinstance(value, (int, float, str)) else expression


def _heads(facts: ModelFacts, config: Mapping[str, Any]) -> str:
    attention = facts.attention
    if attention is None:
        return "attention"
    heads, kv = _value(attention.num_heads, config), _value(attention.num_kv_heads, config)
    kind = "multi-head" if heads == kv else "multi-query" if kv == "1" else "grouped-query"
    return f"{kind} attention, {heads} heads, {kv} for keys and values"


def _positions(facts: ModelFacts) -> str:
    if facts.rotary is None:
        return "no rotary embedding in this file"
    layout = {
        "half": "half-split, as in GPT-NeoX and Llama (is_neox_style=True)",
        "neighbours": "interleaved, as in GPT-J (is_neox_style=False)",
    }.get(facts.rotary.layout, str(facts.rotary.layout))
    return f"rotary, {layout}{', on a part of each head' if facts.rotary.partial else ''}"


def _rows(facts: ModelFacts, config: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    rows = [
        (
            "attention",
            f"{_heads(facts, config)} (`{facts.attention.cls}`)"
            if facts.attention
            else "none"
            if facts.recurrent
            else "not found",
        )
    ]
    for mixer in facts.recurrent:
        rows.append(("state", f"{PLAIN[mixer.kind][0]} (`{mixer.cls}`)"))
    rows.append(("positions", _positions(facts)))
    if facts.attention and facts.attention.sliding_window:
        rows.append(("window", _value(facts.attention.sliding_window, config)))
    for mlp in facts.mlp:
        rows.append(("MLP", f"{MLP[mlp.kind]} (`{mlp.cls}`)"))
    for norm in facts.norm_classes:
        rows.append(("norm", f"{NORM[norm.formula]} (`{norm.name}`)"))
    if facts.layer:
        rows.append(("layer", f"{RESIDUAL[facts.layer.residual]} (`{facts.layer.cls}`)"))
    if facts.head:
        tied = config.get("tie_word_embeddings")
        head = "may be tied to the embedding" if facts.head.can_tie else "never tied"
        rows.append(
            (
                "head",
                f"`{facts.head.attr}`, {head}; in this checkpoint {'tied' if tied else 'untied'}",
            )
        )
    rows.append(
        ("reads from the config", ", ".join(name for name, _ in facts.config_fields) or "nothing")
    )
    return tuple(rows)


def picture(facts: ModelFacts, config: Mapping[str, Any]) -> str:
    """Return the model as a drawing in text, from token ids up to logits."""
    layers = config.get("num_hidden_layers", "n")
    hidden, vocab = config.get("hidden_size", "hidden"), config.get("vocab_size", "vocabulary")
    mlp = facts.mlp[0] if facts.mlp else None
    inner = config.get("intermediate_size", "")
    inside = [PLAIN[mixer.kind][0] for mixer in facts.recurrent]
    if facts.attention or not inside:
        inside += [_heads(facts, config), f"  {_positions(facts)}"]
    inside += [
        f"MLP: {MLP[mlp.kind]}{f', {inner} wide' if inner else ''}" if mlp else "MLP",
        f"residual: {RESIDUAL[facts.layer.residual]}" if facts.layer else "",
    ]
    inside = [line for line in inside if line]
    title = f" {layers} × {facts.layer.cls if facts.layer else 'layer'} "
    width = max(len(line) for line in (*inside, title)) + 2
    box = [
        f"┌{title:─^{width}}┐",
        *(f"│ {line:<{width - 2}} │" for line in inside),
        f"└{'─' * width}┘",
    ]
    stem = "        │"
    lines = [
        "  token ids  [num_tokens]",
        stem,
        f"  embedding  {vocab} × {hidden}",
        stem,
        *box,
        stem,
        f"  {facts.final_norm or 'norm'}",
        stem,
        f"  {facts.head.attr if facts.head else 'head'}  {hidden} × {vocab}   →  logits",
    ]
    return "\n".join(lines)
