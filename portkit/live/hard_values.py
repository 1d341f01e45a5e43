"""Values of a small config that make mistakes show: no default, no one, no zero, no infinity."""

from __future__ import annotations

import re
from typing import Any

from portkit.analysis.conversion import Merge, conversions_of

HARD: dict[str, Any] = {
    "head_dim": 64,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-2,
    "layer_norm_eps": 1e-2,
    "layer_norm_epsilon": 1e-2,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 3.0,
    "attention_bias": True,
    "mlp_bias": True,
    "qk_layernorm": True,
    "use_qk_norm": True,
    "clip_qkv": 1.5,
    "sliding_window": 24,
    "attention_multiplier": 0.1,
    "layer_rope_theta": [20000.0, 0.0, 30000.0],
    "routed_scaling_factor": 1.5,
    "router_scaling_factor": 1.5,
    "route_scale": 1.5,
    "scale_attn_by_inverse_layer_idx": True,
    "apply_residual_connection_post_layernorm": True,
}
"""Values that make mistakes show; dropped one by one if the class refuses them."""
EPS, HARD_EPS = re.compile(r"(^|_)eps(ilon)?$"), 1e-2
"""An eps that can be told from the default, under any name."""
SCALE, HARD_SCALE = re.compile(r"_multiplier$|scal(e|ing)(_factor)?$"), 0.75
"""A factor that is 1 by default hides that nobody applies it."""
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "mscale": 0.8,
    "mscale_all_dim": 0.6,
}
"""Rotary scaling of latent attention, whose softmax scale depends on it."""


def hard_values(
    default: Any, fields: dict[str, Any], sizes: dict[str, int], rotated_part: int
) -> dict[str, Any]:
    """Return the fields' values that make mistakes show: known names first, then kinds of names.

    `default` is the config as its class makes it, `fields` what it has, `sizes` the wished small
    ones by name, `rotated_part` how many dimensions of a head latent attention rotates.
    """
    hard = _multipliers(fields)
    hard |= {k: v for k, v in HARD.items() if k in fields}
    hard |= _windows(fields, sizes) | _hybrid(default, fields) | _older(fields)
    hard |= _equal_parts(default, sizes)
    if "kv_lora_rank" in fields:  # latent attention: every head has its key, a part of it rotated
        hard["head_dim"] = rotated_part
        hard.pop("num_key_value_heads", None)
    for name, value in fields.items():
        if isinstance(value, float) and EPS.search(name) and value < HARD_EPS:
            hard.setdefault(name, HARD_EPS)
    rope = fields.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        part = {"partial_rotary_factor": 0.5} if rope.get("partial_rotary_factor") == 1.0 else {}
        if "kv_lora_rank" in fields:  # what rotates is a part already, and scaled as DeepSeek does
            part = YARN
        hard["rope_parameters"] = {**rope, "rope_theta": 20000.0, **_near(rope), **part}
    elif "rope_theta" in fields:
        hard["rope_theta"] = 20000.0
    elif isinstance(rope, dict):
        size = hard.get("head_dim") or fields.get("head_dim")
        hard["rope_parameters"] = {kind: _in_pairs(of, size) for kind, of in rope.items()}
    return hard


def _hybrid(default: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """Give a model with recurrent layers both kinds where its default has only one."""
    if "conv_L_cache" in fields:
        return {"layer_types": ["conv", "full_attention", "conv"]}
    kinds = getattr(default, "layer_types", None) or getattr(default, "layers_block_type", None)
    if not hasattr(default, "num_attention_heads") or set(kinds or ()) != {"linear_attention"}:
        return {}
    if hasattr(default, "attn_layer_indices"):
        return {"attn_layer_indices": [1]}
    mixed = ["linear_attention", "full_attention", "linear_attention"]
    return {name: mixed for name in ("layer_types", "layers_block_type") if name in fields}


def _equal_parts(default: Any, sizes: dict[str, int]) -> dict[str, Any]:
    """Make keys as wide as values where the checkpoint has the convolution in parts.

    Transformers cuts what it had concatenated into equal parts when it saves.
    """
    concatenated = [
        c
        for c in conversions_of(default.model_type)
        if isinstance(c, Merge) and c.operations == ("Concatenate",)
    ]
    if any("conv1d" in c.target for c in concatenated):
        return {"linear_num_key_heads": sizes["linear_num_value_heads"]}
    return {}


def _older(fields: dict[str, Any]) -> dict[str, Any]:
    """Give configs of an older form the same: kinds of attention for three layers, clipping."""
    found: dict[str, Any] = {}
    kinds = fields.get("attention_types")
    if isinstance(kinds, list) and kinds and isinstance(kinds[0], list):
        found["attention_types"] = [[[*kinds[0][0], *kinds[0][0]][:3], 1]]
    inner = fields.get("attn_config")
    if isinstance(inner, dict) and "clip_qkv" in inner:
        found["attn_config"] = {**inner, "clip_qkv": 1.5}
    return found


def _multipliers(fields: dict[str, Any]) -> dict[str, Any]:
    """Make factors that are one by default something else: a forgotten one must show."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if name in HARD:
            continue
        if isinstance(value, float) and SCALE.search(name) and value == 1.0:
            found[name] = HARD_SCALE
        elif name.endswith("_multipliers") and isinstance(value, list) and set(value) == {1.0}:
            found[name] = [0.75 + 0.125 * i for i in range(len(value))]
    return found


def _in_pairs(rope: Any, head_dim: Any) -> Any:
    """Rotate half of a head where the model's own part of a small head is an odd number.

    What is rotated is pairs: vLLM's kernel for CPUs reads past the queries else.
    """
    part = rope.get("partial_rotary_factor") if isinstance(rope, dict) else None
    odd = part and isinstance(head_dim, int) and int(head_dim * part) % 2
    return {**rope, "partial_rotary_factor": 0.5} if odd else rope


def _near(rope: dict[str, Any]) -> dict[str, Any]:
    """A short original length, so that the prompts reach beyond it."""
    given = rope.get("original_max_position_embeddings")
    return {"original_max_position_embeddings": 32} if given else {}


def _windows(fields: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
    """Switch on sliding windows that are off by default, on one of three layers if it has kinds."""
    if "use_sliding_window" not in fields:
        return {}
    found = {"use_sliding_window": True, "sliding_window": sizes["sliding_window"]}
    if set(fields.get("layer_types") or ()) == {"full_attention"}:
        found["layer_types"] = ["full_attention", "sliding_attention", "full_attention"]
    return found
