"""Drafts of attention's variations: clamps, gates, sinks, norms of heads, scales by position."""

import pytest
from drafting import assert_done, copied, drafted, states

MODELS = ("olmo", "cohere", "ministral3", "diffllama", "mimo_v2_flash")
WRITTEN = [
    # Values narrower than keys, by a number of heads that depends on the layer.
    ("mimo_v2_flash", "forward", "(0, self.head_dim - self.v_head_dim)"),
    ("mimo_v2_flash", "forward", "num_kv_heads=num_key_value_heads,"),
    ("mimo_v2_flash", "weights", "[..., : self.v_head_dim]"),
    ("mimo_v2_flash", "weights", "v_head_size=config.v_head_dim,"),
    ("mimo_v2_flash", "weights", "[self.q_size, self.kv_size, self.v_size]"),
    ("olmo", "forward", "query_states = query_states.clamp("),
    ("cohere", "weights", "hidden_size=(self.num_heads, self.head_dim)"),
    ("cohere", "weights", "set_weight_attrs(self.q_norm.weight"),
    ("cohere", "weights", '"head_copies": self.num_kv_head_copies'),
    ("diffllama", "forward", "value_states1 = value_states1.repeat(1, 2)"),
    ("diffllama", "forward", 'prefix=f"{prefix}.attn_2"'),
    ("diffllama", "weights", "self.o_proj = ColumnParallelLinear("),
    ("Qwen3_5ForCausalLM", "weights", "self.total_num_heads * 2,"),
    ("Qwen3_5ForCausalLM", "weights", "[2 * self.q_size, self.kv_size, self.kv_size]"),
    ("bitnet", "weights", "self.attn_sub_norm, attn_output, 1\n"),
    ("ministral3", "forward", "return scaling[:, None]\n"),
    ("ministral3", "forward", "query_states * get_llama_4_attn_scale(\n            positions,"),
]


@pytest.mark.parametrize("model", MODELS)
def test_drafts_satisfy_the_rules_and_are_done(model: str) -> None:
    assert_done(model)


@pytest.mark.parametrize(("model", "step", "text"), WRITTEN)
def test_what_attention_computes_is_kept(model: str, step: str, text: str) -> None:
    assert text in states(model)[step]


def test_a_branch_that_decides_whether_to_rotate_is_not_dropped() -> None:
    architecture, source = copied("granite_swa")
    ((_, text),) = drafted(source, architecture, "forward").files
    assert "if self.rotary_emb is not None:" in text
    assert "rope_theta = config.layer_rope_theta[layer_idx]" in text
    seeded = source.replace("[theta] if theta else None", "[theta] if layer_idx else None")
    outcome = drafted(seeded, architecture, "forward")
    assert outcome.status == "failed"
    assert "rotates only `if position_embeddings is not None`" in outcome.reason


@pytest.mark.parametrize(
    ("model", "what"),
    [
        ("zaya", "(ZayaCCAProjection), which is no linear"),
        ("jetmoe", "`self.experts.map(hidden_states)` (JetMoeMoA), which is no linear"),
    ],
)
def test_queries_from_elsewhere_are_refused_with_their_source(model: str, what: str) -> None:
    architecture, source = copied(model)
    outcome = drafted(source, architecture, "forward")
    assert outcome.status == "failed"
    assert what in outcome.reason
