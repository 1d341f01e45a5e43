"""Drafts of older decoders: learned positions, ALiBi, attention by hand, Conv1D, nested models."""

import pytest
from drafting import assert_done, copied, drafted, states

MODELS = (
    "opt",
    "mpt",
    "gpt2",
    "moshi",
    "openai-gpt",
    "falcon",
    "gptj",
    "codegen",
    "gpt_neox_japanese",
)
WRITTEN = [
    ("opt", "forward", "super().forward(positions + self.offset)"),
    ("opt", "forward", "self.model.decoder.embed_tokens.weight"),
    ("opt", "weights", "hidden_states, _ = self.fc1(hidden_states)"),
    ("opt", "weights", "self.fc2 = RowParallelLinear("),
    ("opt", "weights", "self.project_in = ReplicatedLinear("),
    ("mpt", "forward", "context_states = self.attn(query_states, key_states, value_states)"),
    ("mpt", "forward", ".clamp(min=-self.clip_qkv, max=self.clip_qkv)"),
    ("mpt", "forward", "alibi_slopes = get_alibi_slopes("),
    ("mpt", "weights", "alibi_slopes[first_head : first_head + self.num_heads]"),
    ("gpt2", "forward", "nn.Linear(self.embed_dim, 3 * self.embed_dim)"),
    ("gpt2", "weights", 'transposed_weights = ("c_attn", "c_proj", "c_fc")'),
    ("gpt2", "weights", "self.c_attn = QKVParallelLinear("),
    ("gpt2", "weights", "self.scaling /= float(layer_idx + 1)"),
    # Linears in a module of their own, angles made by the attention, a window that is not applied.
    ("moshi", "forward", "self.q_proj = nn.Linear("),
    ("moshi", "weights", '".q_proj.linear": ".q_proj",'),
    ("moshi", "weights", "[ffn_dim // 2] * 2"),
    ("moshi", "weights", "self.rotary_emb = get_rope("),
    ("moshi", "weights", "cache_config.sliding_window = None"),
    ("moshi", "weights", "config.vocab_size + 1,"),
    ("openai-gpt", "forward", "SelfAttention(\n            config, cache_config=cache_config,"),
    (
        "openai-gpt",
        "weights",
        "self.head_dim = self.split_size // self.total_num_heads\n\n        tp",
    ),
    # Three layouts of one projection: each is a group per KV head. ALiBi by config is refused.
    ("falcon", "forward", "qkv.unflatten(-1, (self.num_kv_heads, -1)).split("),
    ("falcon", "weights", "self.query_key_value = QKVParallelLinear("),
    ("falcon", "weights", "fused = weight.unflatten(dim, (self.total_num_kv_heads, -1))"),
    ("falcon", "weights", '"config.alibi is not ported: the original puts the ALiBi bias into'),
    # A table of sines that attention looks up; q, v, k in four blocks.
    ("gptj", "weights", "query, key = self.rotary_emb(positions, query, key)"),
    ("gptj", "weights", '"rope_dim": config.rotary_dim'),
    ("codegen", "weights", "qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)"),
    ("codegen", "weights", "fused = weight.unflatten(dim, (4, -1))"),
    ("codegen", "weights", "q, v, k = ("),
    # A bias that attention hands to its layer: attention adds it, where all ranks have the sum.
    (
        "gpt_neox_japanese",
        "weights",
        "self.dense(attn_output)\n        if self.dense_bias is not None:",
    ),
    ("openai-gpt", "weights", "1.0 / math.sqrt((self.split_size // self.total_num_heads)),"),
]


@pytest.mark.parametrize("model", MODELS)
def test_drafts_satisfy_the_rules_and_are_done(model: str) -> None:
    assert_done(model)


@pytest.mark.parametrize(("model", "step", "text"), WRITTEN)
def test_what_older_files_compute_is_kept(model: str, step: str, text: str) -> None:
    assert text in states(model)[step]


def test_a_total_that_the_original_computes_late_does_not_undo_the_ranks_share() -> None:
    """Falcon counts its KV heads below the projection, by its layout: that is the total."""
    source = states("falcon")["weights"]
    assert source.count("self.num_kv_heads = ") == 1
    assert "self.num_kv_heads = max(1, self.total_num_kv_heads // tp_size)" in source


def test_scores_that_are_changed_in_an_unknown_way_are_not_dropped() -> None:
    """A term that is neither mask nor ALiBi must stop the draft, not vanish with the core."""
    architecture, source = copied("mpt")
    line = "attention_scores = attention_scores + position_bias\n"
    assert line in source
    source = source.replace(line, line + "            attention_scores = attention_scores.exp()\n")
    assert drafted(source, architecture, "forward").status == "failed"


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("xlnet", "scores positions relative to each other beside its keys (rel_shift)"),
        ("cpmant", "`score = score + position_bias`. vLLM's Attention adds nothing to scores but"),
    ],
)
def test_where_an_attention_by_hand_is_lost_is_named_with_its_line(model: str, words: str) -> None:
    architecture, source = copied(model)
    outcome = drafted(source, architecture, "forward")
    assert outcome.status == "failed"
    assert words in outcome.reason
    line = int(outcome.reason.split("line ")[1].split(":")[0])
    quoted = outcome.reason.split("`")[1:2] or ["def rel_"]
    assert quoted[0] in source.splitlines()[line - 1]
