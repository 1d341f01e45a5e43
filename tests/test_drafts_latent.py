"""Multi-head latent attention: its facts, and drafts that expand the latent to every head."""

import pytest
from drafting import assert_done, copied, drafted, states

from portkit.analysis.facts import facts_of

WRITTEN = [
    # A part that is rotated, a part that all heads share, values of another size than keys.
    ("forward", "q_rot, k_rot = self.rotary_emb(positions, q_rot.flatten(1), k_rot)"),
    ("forward", "k_rot.unsqueeze(1).expand(-1, self.num_heads, -1)"),
    ("forward", "value_states, (0, self.qk_head_dim - self.v_head_dim)"),
    ("forward", "is_neox_style=not config.rope_interleave"),
    ("forward", "        if self.q_lora_rank is None:\n            self.q_proj = nn.Linear("),
    ("parallel", "self.q_b_proj = ColumnParallelLinear("),
    ("parallel", "self.kv_a_proj_with_mqa = ReplicatedLinear("),
    ("parallel", "self.total_num_heads * (self.qk_nope_head_dim + self.v_head_dim)"),
    ("parallel", "self.q_a_layernorm(self.q_a_proj(hidden_states)[0])"),
]


def test_facts_name_the_latents_and_what_expands_them() -> None:
    architecture, source = copied("youtu")
    facts = facts_of(source, architecture)
    latent = facts.attention.latent
    assert [linear.attr for linear in latent.queries] == ["q_proj", "q_b_proj"]
    assert [linear.attr for linear in latent.query_latents] == ["q_a_proj"]
    assert (latent.kv_latent.attr, latent.kv_heads.attr) == ("kv_a_proj_with_mqa", "kv_b_proj")
    assert (latent.head_dim, latent.value_dim) == ("self.qk_head_dim", "self.v_head_dim")
    assert dict(facts.rotary.layouts) == {
        "apply_rotary_pos_emb": "half",
        "apply_rotary_pos_emb_interleave": "neighbours",
    }
    after = facts_of(states("youtu")["weights"], architecture).attention.latent
    assert [linear.cls for linear in after.queries] == ["ColumnParallelLinear"] * 2


def test_complex_numbers_rotate_neighbours() -> None:
    architecture, source = copied("deepseek_v2")
    assert facts_of(source, architecture).rotary.layout == "neighbours"


@pytest.mark.parametrize(("step", "text"), WRITTEN)
def test_what_the_draft_writes(step: str, text: str) -> None:
    assert text in states("youtu")[step]


@pytest.mark.parametrize("model", ["youtu", "minicpm3"])
def test_drafts_satisfy_the_rules_and_are_done(model: str) -> None:
    assert_done(model)


def test_an_indexer_is_a_blocker_with_a_class_to_start_from() -> None:
    architecture, source = copied("deepseek_v32")
    outcome = drafted(source, architecture, "forward")
    assert outcome.status == "failed"
    assert "an indexer selects" in outcome.reason
    assert "DeepseekV2MLAAttention" in outcome.reason
