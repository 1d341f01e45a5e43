"""Drafts of mixture-of-experts models: routing rules, experts, the checkpoint's names."""

from __future__ import annotations

import importlib

import pytest

from portkit.analysis.classes import view_module
from portkit.analysis.experts import read_experts
from portkit.analysis.moe_facts import ExpertsFacts
from portkit.architectures import find_architecture
from portkit.draft.source_draft import draft_source_outcome
from portkit.steps.copy.extract import extract
from portkit.steps.copy.places import InTransformers

STEPS = ("forward", "parallel", "weights")


def drafted(model: str, changed: tuple[str, str] = ("", "")) -> dict[str, str]:
    """Step -> source of its draft, from Transformers' file after one change of its text."""
    found = find_architecture(model)
    text = found.file.read_text(encoding="utf-8")
    assert changed[0] in text
    text = text.replace(*changed) if changed[0] else text
    source = extract(text, found.name, found.file.name, InTransformers(found.module)).code
    sources = {}
    for step in STEPS:
        drafting = importlib.import_module(f"portkit.steps.{step}.draft").draft_source
        outcome = draft_source_outcome(source, found.name, step, "m.py", drafting)
        assert outcome.status == "success", outcome.reason
        ((_, source),) = outcome.files
        sources[step] = source
    return sources


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            "mixtral",
            ("renormalize=True", 'ckpt_names=("w1", "w2", "w3")', '".block_sparse_moe.": ".mlp."'),
        ),
        ("qwen3_moe", ("renormalize=config.norm_topk_prob", '".mlp.gate_proj": (')),
        (
            "dots1",
            (
                "num_expert_group=config.n_group",
                'scoring_func="sigmoid"',
                "routed_scaling_factor=config.routed_scaling_factor",
                "e_score_correction_bias=self.gate.e_score_correction_bias",
                "out_dtype=torch.float32",
            ),
        ),
        ("aria_text", ("is_fused_checkpoint_transposed=True", '"mlp.experts.fc1.weight"')),
        # No argument of vLLM's says this rule: the author's arithmetic, as a method.
        ("cohere2_moe", ("def route(", "custom_routing_function=self.gate.route")),
    ],
)
def test_experts_are_fused(model: str, words: tuple[str, ...]) -> None:
    sources = drafted(model)
    assert "index_add_" in sources["forward"]
    assert "FusedMoEFactory(" in sources["weights"]
    assert "index_add_" not in sources["weights"]
    for word in words:
        assert word in sources["weights"]


def test_a_rule_of_its_own_is_not_taken_for_vllms() -> None:
    """One changed operation, and the routing is the author's again."""
    seed = (
        "router_top_value /= router_top_value.sum(dim=-1, keepdim=True)",
        "router_top_value /= router_top_value.max(dim=-1, keepdim=True)[0]",
    )
    source = drafted("mixtral", seed)["weights"]
    assert "router_top_value.max(" in source
    assert "custom_routing_function=self.gate.route" in source


def test_shared_experts_of_a_branch_are_quantised_too() -> None:
    source = drafted("cohere2_moe")["weights"]
    made = source.split("self.shared_experts = Cohere2MoeMLP(")[1].split("\n            )")[0]
    assert "quant_config=quant_config" in made


def test_alternating_gate_and_up_are_swigluoai() -> None:
    sources = drafted("gpt_oss")
    assert "hidden_states, _ = self.mlp" not in sources["forward"]
    source = sources["weights"]
    for word in (
        'activation="swigluoai"',
        "has_bias=True",
        "routed_experts_cls=GptOssExperts",
        "class GptOssExperts(RoutedExperts)",
        "if (config.swiglu_alpha, config.swiglu_limit) != (1.702, 7.0):",
    ):
        assert word in source


@pytest.mark.parametrize(
    "seed",
    [
        ("gate_up[..., ::2], gate_up[..., 1::2]", "gate_up[..., 1::2], gate_up[..., ::2]"),
        ("(up + 1) * glu", "(up + 2) * glu"),
        ("up.clamp(min=-self.limit", "up.clamp(min=-self.alpha"),
        ("torch.sigmoid(gate * self.alpha)", "torch.sigmoid(up * self.alpha)"),
        ("gate.clamp(min=None,", "gate.clamp(min=-self.limit,"),
    ],
)
def test_another_gate_is_not_taken_for_swigluoai(seed: tuple[str, str]) -> None:
    text = find_architecture("gpt_oss").file.read_text(encoding="utf-8")
    assert seed[0] in text

    def read(source: str) -> ExpertsFacts:
        return read_experts(view_module(source).classes["GptOssExperts"])

    assert read(text).clamp == ("config.swiglu_alpha", "config.swiglu_limit")
    assert "a gate that vLLM has not" in read(text.replace(*seed)).why


def test_experts_in_parts_and_a_config_inside_the_config() -> None:
    """DBRX: rows of all experts under each other, a router of two classes, two residual streams."""
    sources = drafted("dbrx")
    assert "resid_states, hidden_states = self.norm_attn_norm(" in sources["forward"]
    source = sources["weights"]
    for word in (
        "num_experts=config.ffn_config.moe_num_experts",
        'activation=config.ffn_config.ffn_act_fn.get("name", "silu")',
        "custom_routing_function=self.router.route",
        '"v1": ("w13_weight", "w3")',
        '".experts.mlp.": ".experts."',
        "return residual_states, hidden_states",
    ):
        assert word in source


@pytest.mark.parametrize(
    "seed",
    [
        ("up_proj = x.matmul(expert_v1.T)", "up_proj = x.matmul(expert_v1)"),
        ("intermediate_states = gate_proj * up_proj", "intermediate_states = gate_proj + up_proj"),
        ("(-1, self.ffn_hidden_size, self.hidden_size)", "(-1, self.hidden_size, 7)"),
    ],
)
def test_other_experts_in_parts_are_refused(seed: tuple[str, str]) -> None:
    with pytest.raises(AssertionError, match=r"DbrxExperts: (its experts are|cannot follow)"):
        drafted("dbrx", seed)


def test_experts_that_hand_tokens_on_and_lists_in_a_layer() -> None:
    source = drafted("longcat_flash")["weights"]
    for word in (
        "self.num_real_experts = config.n_routed_experts",
        "self.experts(hidden_states, router_logits) + handed_on",
        "custom_routing_function=self.route,",
        'prefix=f"{prefix}.self_attn.{i}"',
        '".mlps.1.gate_proj": (".mlps.1.gate_up_proj", 0)',
    ):
        assert word in source


def test_a_branch_between_experts_of_another_kind_is_refused() -> None:
    seed = ("self.identity_expert(current_state)", "-current_state")
    with pytest.raises(AssertionError, match="cannot follow `if expert_idx >="):
        drafted("longcat_flash", seed)
