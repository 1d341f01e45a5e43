"""Models with gated delta nets, whose kernels in vLLM take half precision only, checked."""

from __future__ import annotations

import pytest
from seeds import words

from portkit.checks.runner import run_checks
from portkit.create import new_port
from portkit.draft.pipeline import apply_draft
from portkit.live.client import live_for
from portkit.port import Port

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(420)]

SKIPPED = {
    "rehearsal_tp4": "the 2 heads of its linear attention (linear_num_key_heads)",
    "lora": "experts beside adapters",
}


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Port:
    made = new_port("tiny", architecture="Qwen3NextForCausalLM", root=tmp_path_factory.mktemp("p"))
    for step in ("copy", "forward", "parallel", "weights"):
        outcome = apply_draft(made, step)
        assert outcome.status == "success", outcome.reason
    return made


def checked(port: Port, step: str, *only: str) -> dict:
    with live_for(port):
        return {v.check: v for v in run_checks(port, step, only=list(only) or None)}


def test_forward_is_compared_in_float32(port):
    found = checked(port, "forward")
    assert {v.status for v in found.values()} == {"passed"}, "\n".join(map(words, found.values()))
    assert "gated delta rule by its definition" in found["starts"].what


def test_parallel_says_what_cannot_be_tried(port):
    found = checked(port, "parallel")
    for check, verdict in found.items():
        if check in SKIPPED:
            assert verdict.status == "skipped" and SKIPPED[check] in verdict.what, words(verdict)
        else:
            assert verdict.status == "passed", words(verdict)


def test_users_run_vllms_own_kernel(port):
    """Experts and bfloat16: rounding leads routers elsewhere, on both sides."""
    found = checked(port, "prove", "as_users_run_it", "half_precision", "speed")
    assert {v.status for v in found.values()} == {"passed"}, "\n".join(map(words, found.values()))
    users = found["as_users_run_it"]
    assert "in float32 and in bfloat16" in users.what
    assert "routers to other experts" in users.tables[1].note
    assert "bfloat16" in found["speed"].tables[0].title


@pytest.mark.parametrize(
    ("edits", "place", "cause"),
    [
        (
            [("gqa_interleaved_layout=True", "# as Qwen3.5's")],
            "self.linear_attn = QwenGatedDeltaNetAttention(",
            "vLLM's own QwenGatedDeltaNetAttention",
        ),
        (
            [
                ("layernorm import GemmaRMSNorm", "layernorm import GemmaRMSNorm, RMSNorm"),
                ("self.q_norm = GemmaRMSNorm(", "self.q_norm = RMSNorm("),
            ],
            "self.q_norm = RMSNorm(",
            "multiplies by (1 + weight)",
        ),
        ([("torch.sigmoid(gate)", "F.silu(gate)")], "self.o_proj(", "by silu(gate) where"),
        (
            [(".unflatten(-1, (-1, self.head_dim * 2)).chunk(2, dim=-1)", ".chunk(2, dim=-1)")],
            "self.q_norm(",
            "other columns of model.layers.2.self_attn.q_proj",
        ),
    ],
)
def test_what_is_wrong_is_found_and_explained(port, edits, place, cause):
    before = port.source
    try:
        text = before
        for old, new in edits:
            assert old in text
            text = text.replace(old, new)
        if "head_dim * 2" in edits[0][0]:
            text = text.replace("x.flatten(-2)\n", "x\n")
        port.modeling.write_text(text)
        found = checked(port, "forward", "prefill_parity")["prefill_parity"]
        assert found.status == "failed" and place in found.where, words(found)
        assert cause in " ".join(found.causes), words(found)
    finally:
        port.modeling.write_text(before)
