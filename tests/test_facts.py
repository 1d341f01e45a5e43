"""Facts of modeling files: what the code computes, not how it is spelt."""

import subprocess
import sys

import pytest

from portkit.analysis.facts import ModelFacts, facts_of
from portkit.architectures import find_architecture


def original(architecture: str) -> str:
    return find_architecture(architecture).file.read_text(encoding="utf-8")


def facts(architecture: str, *edits: tuple[str, str]) -> ModelFacts:
    source = original(architecture)
    for old, new in edits:
        assert old in source, f"the seed {old!r} does not apply"
        source = source.replace(old, new)
    return facts_of(source, architecture)


FAMILIES = {
    # residual, rotary (layout, partial), norm formula, feed-forward, q/k/v bias, o bias
    "HeliumForCausalLM": (
        "pre",
        ("neighbours", False),
        "rms_fp32_weight",
        "gated",
        "config.attention_bias",
        "False",
    ),
    "LlamaForCausalLM": (
        "pre",
        ("half", False),
        "rms",
        "gated",
        "config.attention_bias",
        "config.attention_bias",
    ),
    "Qwen2ForCausalLM": ("pre", ("half", False), "rms", "gated", "True", "False"),
    "Gemma2ForCausalLM": (
        "sandwich",
        ("half", False),
        "rms_one_plus_weight",
        "gated",
        "config.attention_bias",
        "config.attention_bias",
    ),
    "Olmo2ForCausalLM": (
        "post",
        ("half", False),
        "rms_fp32_weight",
        "gated",
        "config.attention_bias",
        "config.attention_bias",
    ),
    "Glm4ForCausalLM": (
        "sandwich",
        ("neighbours", True),
        "rms",
        "gated_fused",
        "config.attention_bias",
        "False",
    ),
    "CohereForCausalLM": (
        "parallel",
        ("neighbours", False),
        "layernorm",
        "gated",
        "config.attention_bias",
        "config.attention_bias",
    ),
    "Starcoder2ForCausalLM": (
        "pre",
        ("half", False),
        None,
        "plain",
        "config.use_bias",
        "config.use_bias",
    ),
}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_family(architecture: str) -> None:
    residual, (layout, partial), formula, mlp, qkv_bias, o_bias = FAMILIES[architecture]
    found = facts(architecture)
    assert found.state == "copy"
    assert found.unknown == ()
    assert found.layer.residual == residual
    assert (found.rotary.layout, found.rotary.partial) == (layout, partial)
    assert [n.formula for n in found.norm_classes] == ([formula] if formula else [])
    assert [m.kind for m in found.mlp] == [mlp]
    attention = found.attention
    assert {attention.q.bias, attention.k.bias, attention.v.bias} == {qkv_bias}
    assert attention.o.bias == o_bias
    assert attention.num_heads == "config.num_attention_heads"
    assert attention.num_kv_heads == "config.num_key_value_heads"


def test_lines_point_into_the_source() -> None:
    found, lines = facts("HeliumForCausalLM"), original("HeliumForCausalLM").splitlines()
    assert "self.q_proj" in lines[found.attention.q.line - 1]
    assert "self.lm_head" in lines[found.head.line - 1]
    assert "def apply_rotary_pos_emb" in lines[found.rotary.line - 1]
    assert "class HeliumMLP" in lines[found.mlp[0].line - 1]
    assert all(
        f".{name}" in lines[line - 1] or name in lines[line - 1]
        for name, line in found.config_fields
    )


def test_what_attention_is_given() -> None:
    gemma = facts("Gemma2ForCausalLM")
    assert gemma.attention.soft_cap == "self.attn_logit_softcapping"
    assert gemma.attention.sliding_window == "self.sliding_window"
    assert gemma.head.soft_cap == "config.final_logit_softcapping"
    assert gemma.embedding.scale == "self.config.hidden_size ** 0.5"
    assert facts("Qwen3ForCausalLM").attention.per_head_norm is True
    assert facts("Olmo2ForCausalLM").attention.per_head_norm is False
    assert facts("GraniteForCausalLM").head.scale == "1 / config.logits_scaling"
    phi = facts("Phi3ForCausalLM").attention
    assert (phi.q, phi.qkv.attr) == (None, "qkv_proj")


@pytest.mark.parametrize(
    ("edit", "layout"),
    [
        # the same pairing, spelt in another way
        (
            (
                "x1 = x[..., 0::2]\n    x2 = x[..., 1::2]\n"
                "    return torch.stack((-x2, x1), dim=-1).flatten(-2)",
                "first, second = x[..., 0::2], x[..., 1::2]\n"
                "    return torch.stack([-second, first], dim=-1).flatten(-2)",
            ),
            "neighbours",
        ),
        # the spelling of Transformers before 5.18: a matrix product, a device that means nothing
        (
            (
                "freqs = position_ids[..., None].float() * "
                "self.inv_freq.to(device=x.device, dtype=torch.float)",
                "inv_freq_expanded = self.inv_freq[None, :, None].float()"
                ".expand(position_ids.shape[0], -1, 1)\n"
                "        position_ids_expanded = position_ids[:, None, :].float()\n"
                '        device_type = x.device.type if x.device.type != "mps" else "cpu"\n'
                "        freqs = (inv_freq_expanded @ position_ids_expanded).transpose(1, 2)",
            ),
            "neighbours",
        ),
        # a sign, a frequency order and a pairing that are none of vLLM's
        (("torch.stack((-x2, x1), dim=-1)", "torch.stack((x2, x1), dim=-1)"), "unknown"),
        (("cos.shape[-1] // 2].repeat_interleave(2, dim=-1)", "cos.shape[-1]]"), "unknown"),
        (("x2 = x[..., 1::2]", "x2 = x[..., 0::2]"), "unknown"),
        # code that cannot be followed is said to be unknown, not guessed
        (("return torch.stack((-x2, x1), dim=-1).flatten(-2)", "return turn(x1, x2)"), "unknown"),
    ],
)
def test_rotary_is_computed_not_recognised(edit: tuple[str, str], layout: str) -> None:
    found = facts("HeliumForCausalLM", edit)
    assert found.rotary.layout == layout
    if layout == "unknown":
        (unknown,) = found.unknown
        assert unknown.about == "rotary"
        assert unknown.line > 0


WEIGHTED = "self.weight.to(torch.float32) * hidden_states"
GATED = "self.act_fn(self.gate_proj(x)) * self.up_proj(x)"
SQUARES = "variance = hidden_states.pow(2)"
CENTRED = "variance = (hidden_states - hidden_states.mean(-1, keepdim=True)).pow(2)"


@pytest.mark.parametrize(
    ("edit", "formula"),
    [
        ((WEIGHTED, "hidden_states * self.weight.float()"), "rms_fp32_weight"),
        (("variance + self.variance_epsilon)", "variance) + self.variance_epsilon"), "unknown"),
        ((WEIGHTED, f"(1 + {WEIGHTED.split()[0]}) * hidden_states"), "rms_one_plus_weight"),
        ((".pow(2).mean(-1, keepdim=True)", ".pow(2).mean(0, keepdim=True)"), "unknown"),
        ((SQUARES, CENTRED), "layernorm"),
    ],
)  # fmt: skip
def test_norm_formula_is_computed_not_recognised(edit: tuple[str, str], formula: str) -> None:
    (norm,) = facts("HeliumForCausalLM", edit).norm_classes
    assert norm.formula == formula


@pytest.mark.parametrize(
    ("edit", "kind"),
    [
        ((GATED, "self.up_proj(x) * self.act_fn(self.gate_proj(x))"), "gated"),
        ((GATED, "self.act_fn(self.gate_proj(x)) + self.up_proj(x)"), "unknown"),
    ],
)  # fmt: skip
def test_feed_forward_is_computed_not_recognised(edit: tuple[str, str], kind: str) -> None:
    (mlp,) = facts("HeliumForCausalLM", edit).mlp
    assert mlp.kind == kind


def test_gate_and_up_are_told_by_what_they_do_not_by_name() -> None:
    swapped = (
        "self.act_fn(self.gate_proj(x)) * self.up_proj(x)",
        "self.act_fn(self.up_proj(x)) * self.gate_proj(x)",
    )
    (mlp,) = facts("HeliumForCausalLM", swapped).mlp
    assert (mlp.gate.attr, mlp.up.attr) == ("up_proj", "gate_proj")


def test_a_missing_class_is_said() -> None:
    (unknown,) = facts_of(original("HeliumForCausalLM"), "HelumForCausalLM").unknown
    assert "HelumForCausalLM" in unknown.what


def test_reading_imports_neither_torch_nor_the_model() -> None:
    code = (
        "import sys; from portkit.analysis.facts import facts_of; "
        "from portkit.architectures import find_architecture as f; "
        "facts_of(f('helium').file.read_text(), 'HeliumForCausalLM'); "
        "print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
