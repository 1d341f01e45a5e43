"""Configs that switch what a block computes: each is drafted anew and run like a row of its own.

A draft keeps the branches of the config that Transformers has, so one checkpoint runs one way
through it. These are the other ways that published checkpoints take.
"""

from __future__ import annotations

import json
from typing import Any

_GROUPED = {"new_decoder_architecture": True, "num_kv_heads": 2}
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("FalconForCausalLM", {**_GROUPED, "num_ln_in_parallel_attn": 2}),
    ("FalconForCausalLM", {**_GROUPED, "num_ln_in_parallel_attn": 1}),
    ("FalconForCausalLM", {**_GROUPED, "bias": True}),
    ("FalconForCausalLM", {"multi_query": False}),
    ("FalconForCausalLM", {"multi_query": False, "alibi": True}),
    ("FalconForCausalLM", {"parallel_attn": False, "bias": True}),
    ("GPTBigCodeForCausalLM", {"multi_query": False}),
    ("GPTNeoXForCausalLM", {"use_parallel_residual": False}),
    ("OPTForCausalLM", {"do_layer_norm_before": False}),
    ("OPTForCausalLM", {"word_embed_proj_dim": 64}),
    ("OPTForCausalLM", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    ("StableLmForCausalLM", {"use_parallel_residual": True}),
    ("StableLmForCausalLM", {"qk_layernorm": False, "use_qkv_bias": True}),
    ("BloomForCausalLM", {"apply_residual_connection_post_layernorm": False}),
    ("CohereForCausalLM", {"use_qk_norm": False}),
    ("OlmoForCausalLM", {"clip_qkv": None}),
    ("PhiForCausalLM", {"qk_layernorm": False}),
    ("PersimmonForCausalLM", {"qk_layernorm": False}),
    ("Starcoder2ForCausalLM", {"use_bias": False}),
    ("MptForCausalLM", {"attn_config": {"clip_qkv": None}}),
    ("DeepseekV2ForCausalLM", {"q_lora_rank": None}),
    ("DeepseekV3ForCausalLM", {"q_lora_rank": None}),
    ("DeepseekV3ForCausalLM", {"rope_interleave": False}),
    ("Glm4MoeForCausalLM", {"use_qk_norm": False}),
    ("GPT2LMHeadModel", {"scale_attn_weights": False}),
    (
        "GPT2LMHeadModel",
        {"scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": True},
    ),
    (
        "LlamaForCausalLM",
        {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True},
    ),
    ("Qwen2ForCausalLM", {"use_sliding_window": False}),
    ("Qwen2MoeForCausalLM", {"mlp_only_layers": [0]}),
    ("MixtralForCausalLM", {"sliding_window": None}),
    ("GPTNeoXForCausalLM", {"attention_bias": False, "tie_word_embeddings": True}),
    ("Gemma2ForCausalLM", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ("DeepseekV3ForCausalLM", {"first_k_dense_replace": 0, "norm_topk_prob": False}),
    (
        "DeepseekV2ForCausalLM",
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    ),
    ("OlmoeForCausalLM", {"clip_qkv": None, "norm_topk_prob": True}),
    ("GraniteMoeSharedForCausalLM", {"shared_intermediate_size": 0}),
    ("Ernie4_5_MoeForCausalLM", {"use_bias": True, "moe_layer_interval": 2}),
)


def text_of(config: dict[str, Any]) -> str:
    """Return the one spelling of a config that rows are kept under; "" for no fields."""
    return json.dumps(config) if config else ""
