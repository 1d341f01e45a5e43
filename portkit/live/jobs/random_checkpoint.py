"""Make a tiny checkpoint with random weights for an architecture that none is bundled for.

A tiny model as Transformers initialises it is a bad oracle: unit norms, zero biases and flat
attention hide most mistakes. This one is hardened: norm weights and biases are random, attention is
sharp, KV heads are fewer than heads, head_dim is no quotient (but one that vLLM's kernels have),
eps and rope_theta are not the defaults, soft caps and windows are small, multipliers are not 1.
Sizes are set where the config has the field; a config that refuses some of them keeps its own.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig

from portkit.errors import PortkitError
from portkit.live.device import find_device
from portkit.live.hard_values import hard_values
from portkit.live.hardening import ACTIVATIONS, SEED, harden
from portkit.live.job import JobRequest
from portkit.live.small_config import (
    build,
    inner_sizes,
    is_derived,
    refused_by_name,
    shared_layers,
    sizes_of,
    without_options,
    without_ungated_experts,
)

MAX_PARAMETERS = 20_000_000

SIZES: dict[str, int] = {
    "vocab_size": 509,
    "vocab_size_per_layer_input": 509,
    "hidden_size_per_layer_input": 16,
    "hidden_size": 128,
    "n_embd": 128,
    "d_model": 128,
    "embed_dim": 128,
    "intermediate_size": 192,
    "ffn_dim": 192,
    "n_inner": 192,
    "ffn_hidden_size": 192,
    "num_hidden_layers": 3,
    "n_layer": 3,
    "n_layers": 3,
    "num_layers": 3,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "n_positions": 512,
    "n_ctx": 512,
    "max_seq_len": 512,
    "rotary_dim": 16,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 48,
    "kv_lora_rank": 40,
    "q_lora_rank": 56,
    # Experts: enough of them that a choice of two in two of four groups is one.
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_top_k": 2,
    "moe_k": 2,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_layer_start_index": 1,
    "num_dense_layers": 1,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 96,
    "expert_ffn_hidden_size": 96,
    "zero_expert_num": 4,
    "router_hidden_size": 32,
    "shared_expert_intermediate_size": 96,
    "sliding_window": 24,
    "window_size": 24,
    "attention_heads": 4,
    "dff": 192,
    # State-space layers: heads * head size = expansion * hidden size, more than one group.
    "expand": 2,
    "mamba_expand": 2,
    "mamba_d_ssm": 256,
    "mamba_n_heads": 4,
    "n_mamba_heads": 4,
    "mamba_num_heads": 4,
    "mamba_d_head": 64,
    "mamba_head_dim": 64,
    "state_size": 16,
    "ssm_state_size": 16,
    "mamba_d_state": 16,
    "n_groups": 2,
    "mamba_n_groups": 2,
    "mamba_ngroups": 2,
    "shared_intermediate_size": 96,
    "moe_shared_expert_intermediate_size": 96,
    # Gated delta nets: the kernels want head sizes that are powers of two.
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_num_heads": 4,
    "linear_head_dim": 64,
    # Attention to tokens that an indexer picks.
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 32,
    "indexer_budget": 32,
    "indexer_compress_ratio": 4,
    "ngram_vocab_size_base": 509,
    "split_ngram_parts": 4,
    "kv_n_heads": 2,
    "encoder_hash_byte_group_vocab": 512,
    "hidden_size_global": 128,
    "conv_dim": 128,
    "block_dim": 128,
    # Hybrids by period: each of three layers is of another kind.
    "attn_layer_period": 3,
    "attn_layer_offset": 2,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
}
"""Field → value, where a config has the field (and does not leave it None)."""
OPTIONAL = (
    *("head_dim", "num_key_value_heads", "num_experts_per_tok"),
    *("clip_qkv", "sliding_window", "layer_rope_theta"),
    *("n_routed_experts", "n_shared_experts"),
    *("indexer_n_heads", "indexer_kv_heads", "indexer_head_dim"),
    *("indexer_budget", "indexer_compress_ratio"),
)
"""Fields that are set even where the config's default is None."""
NO_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")


def run(request: JobRequest, say: Callable[[str], None]) -> dict[str, Any]:
    """Write the checkpoint of `args["architecture"]` (`args["model_type"]`) to `args["out"]`.

    args: "set", config fields with values of one's own; "activations", how large the hidden states
    are ("small", "usual" or "large"); "hard", False for what Transformers initialises, the bad
    oracle that many tests use; "options", "default" to leave switches, caps and factors at the
    config class's defaults, as published checkpoints mostly do, with weights as hard as ever.
    """
    own, hard = dict(request.args.get("set") or {}), bool(request.args.get("hard", True))
    usual = request.args.get("options") == "default"
    architecture = str(request.args["architecture"])
    out = Path(str(request.args["out"]))
    cls = getattr(transformers, architecture)
    torch.manual_seed(SEED)
    model_type = str(request.args["model_type"])
    model, kept = _smallest_that_works(cls, model_type, own, hard, usual, say)
    size = sum(p.numel() for p in model.parameters())
    if size > MAX_PARAMETERS:
        raise PortkitError(
            f"{architecture} could not be made small: {size:,} parameters.",
            "config of " + architecture,
            "Give a small checkpoint of your own: `--checkpoint DIR`.",
        )
    if hard:
        harden(model, ACTIVATIONS[str(request.args.get("activations", "usual"))])
    model.save_pretrained(out, max_shard_size=max(size * 4 // 3, 1))
    config = json.loads((out / "config.json").read_text())
    config["architectures"] = [architecture]
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return {"parameters": size, "set": kept}


def _smallest_that_works(
    cls: type,
    model_type: str,
    own: dict[str, Any],
    hardened: bool,
    usual: bool,
    say: Callable[[str], None],
) -> tuple[torch.nn.Module, list[str]]:
    """Return a model that computes, with as many of the wished values as it takes."""
    config_class = cls.config_class or type(AutoConfig.for_model(model_type))
    default = config_class()
    fields = {k: v for k, v in default.to_dict().items() if v is not None or k in OPTIONAL}
    sizes = sizes_of(default, fields, SIZES)
    rotated = sizes.get("qk_rope_head_dim", 32)
    hard = hard_values(default, fields, SIZES, rotated) if hardened else {}
    if usual:
        hard = without_options(default, hard)
        sizes = {k: v for k, v in sizes.items() if not is_derived(default, fields, k)}
    problem: Exception | None = None
    refused: set[str] = set()
    tries = [(dropped, kept) for kept in (True, False) for dropped in _fewer(list(hard))]
    for dropped, kept in tries:
        if not (kept or refused):
            break
        values = {**sizes, **{k: v for k, v in hard.items() if k not in dropped}}
        if "head_dim" in (dropped if hardened else fields):
            # A default for a large model rarely fits the small sizes.
            values["head_dim"] = SIZES["hidden_size"] // SIZES["num_attention_heads"]
        values = {
            **values,
            **_lists(default, {**fields, **hard}, sizes.get("num_hidden_layers", 3)),
            **shared_layers(default, SIZES),
            **inner_sizes(default, SIZES, values),
            **own,
        }
        for name in NO_TOKENS:
            if isinstance(fields.get(name), int) and fields[name] >= SIZES["vocab_size"]:
                values[name] = 1
        if not kept:  # the config's own values where it says that it refuses ours
            values = {k: v for k, v in values.items() if k in own or k not in refused}
        try:
            model = build(cls, config_class, values)
            fewer = without_ungated_experts(model, values)
            if fewer and find_device()[0] == "cpu":
                say("Leaving out layers of experts without a gate: vLLM runs none on a CPU.")
                values |= fewer
                model = build(cls, config_class, values)
            return model, sorted(values)
        except Exception as error:
            problem = error
            refused |= refused_by_name(error, sizes)
            say(f"Trying with less: {type(error).__name__}")
    raise PortkitError(
        f"{cls.__name__} could not be made small: {problem}",
        f"config of model type {model_type}",
        "Give a small checkpoint of your own: `--checkpoint DIR`.",
    )


def _fewer(names: list[str]) -> Iterable[set[str]]:
    """Yield which wishes to drop: none, each alone, any two, then all."""
    for count in (0, 1, 2):
        yield from map(set, itertools.combinations(names, count))
    yield set(names)


def _lists(default: Any, fields: dict[str, Any], layers: int) -> dict[str, Any]:
    """Cut lists with one entry per layer ("layer_types") to the new number of layers."""
    count = getattr(default, "num_hidden_layers", None)
    found = {}
    for name, value in fields.items():
        simple = isinstance(value, list) and all(isinstance(v, (str, int)) for v in value)
        if simple and count and len(value) == count:
            # The first layers as they are, but every kind of layer keeps a place.
            kinds = list(dict.fromkeys(value))
            missing = [v for v in kinds if v not in value[:layers]]
            found[name] = [*value[: layers - len(missing)], *missing][:layers]
            if found[name].count("hybrid") == 1:  # these share modules: one alone shares nothing
                found[name] = [kinds[0], *["hybrid"] * (layers - 1)]
            if len(kinds) > layers and isinstance(value[0], str):
                found |= {name: kinds, "num_hidden_layers": len(kinds)}
    return found
