"""Attentions computed inline: what is wrong is tried out, and named with its numbers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from portkit.checks.base import CheckContext
from portkit.checks.runner import checks_of
from portkit.create import new_port
from portkit.draft.pipeline import apply_draft
from portkit.live.client import live_for
from portkit.port import Port

pytestmark = pytest.mark.vllm

SLOPES = "self.num_heads,\n            self.head_dim,\n            self.softmax_scale,"
SPLIT = """qkv.split(
            [self.q_size, self.kv_size, self.kv_size], dim=-1
        )"""
SEEDS = {
    "slopes": (
        "get_alibi_slopes(self.total_num_heads)",
        "get_alibi_slopes(self.total_num_heads).flip(0)",
        ("With the ALiBi slopes 0.25, 0.0625,", "the numbers agree"),
        "self.attn = Attention(",
    ),
    "no slopes": (
        "            alibi_slopes=alibi_slopes.tolist(),\n",
        "",
        ("With ALiBi the numbers agree: pass alibi_slopes=",),
        "self.attn = Attention(",
    ),
    "scale": (
        SLOPES,
        SLOPES.replace("self.softmax_scale", "1.0"),
        ("as Attention's scale the numbers agree: it is given 1",),
        "self.attn = Attention(",
    ),
    "order": (
        SPLIT,
        "(\n            part.flatten(-2) for part in "
        "qkv.unflatten(-1, (self.num_heads, 3, -1)).unbind(-2)\n        )",
        ("out of Wqkv's rows one after the other (tried on this prompt)",),
        "self.Wqkv = QKVParallelLinear(",
    ),
    "residual": (
        "        # Get residual\n        residual = hidden_states",
        "        # Get residual\n        residual = layernorm_output",
        (
            "The port adds what transformer.blocks.0.norm_2 returns where the original adds what "
            "goes into transformer.blocks.0.norm_2",
        ),
        "return output",
    ),
}


@pytest.fixture(scope="module")
def port(tmp_path_factory) -> Iterator[Port]:
    port = new_port("mpt", architecture="MptForCausalLM", root=tmp_path_factory.mktemp("inline"))
    for step in ("copy", "forward", "parallel", "weights"):
        assert apply_draft(port, step).status == "success"
    yield port
    live_for(port).close()


@pytest.mark.parametrize("name", SEEDS)
def test_what_gives_the_originals_numbers_is_named(port: Port, name: str) -> None:
    right, wrong, said, where = SEEDS[name]
    correct = port.source
    assert correct.count(right) == 1
    check = next(check for check in checks_of("forward") if check.id == "prefill_parity")
    try:
        port.modeling.write_text(correct.replace(right, wrong))
        verdict = check().run(CheckContext(port, live_for(port)))
    finally:
        port.modeling.write_text(correct)
    assert verdict.status == "failed"
    missing = [text for text in said if text not in verdict.causes[0]]
    assert not missing, verdict.causes
    assert where in verdict.where


@pytest.mark.parametrize("heads", [4, 6, 12])
def test_slopes_are_those_of_transformers(heads: int) -> None:
    from portkit.live.inline_attention import alibi_slopes

    ours = alibi_slopes(heads)
    two = torch.ones(1, 2, dtype=torch.int64)
    bloom = build_alibi_tensor(two, heads, torch.float32)  # [heads, 1, 2], slope * position
    mpt = build_mpt_alibi_tensor(heads, 2)  # [heads, 1, 2], slope * (position - 1)
    torch.testing.assert_close(ours, bloom[:, 0, 1])
    torch.testing.assert_close(ours, -mpt[:, 0, 0])
