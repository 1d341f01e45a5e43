"""Checks of step forward: green on a correct Helium, red on each seeded bug, which they name.

    pytest tests/test_forward_checks.py

Every seed is one text edit of tests/ports/helium/forward.py and must apply. One worker serves all.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from portkit.checks.base import CheckContext
from portkit.checks.verdict import Verdict
from portkit.create import new_port
from portkit.live.client import live_for
from portkit.port import Port, write_atomically
from portkit.steps.forward.checks import CHECKS

pytestmark = pytest.mark.vllm
GOLDEN = (Path(__file__).parent / "ports" / "helium" / "forward.py").read_text()


@dataclass(frozen=True)
class Seed:
    """One edit that breaks the correct port."""

    old: str
    new: str
    red: str
    """The first check that must fail."""
    green: tuple[str, ...]
    """Checks that must still pass."""
    says: tuple[str, ...]
    """Words that the verdict must have, in what, where, next or causes."""


ONLY_LATER = ("interface", "starts", "prefill_parity")
STARTS = ("interface", "starts")
SEEDS = {
    "rotary halves instead of pairs": Seed(
        "is_neox_style=False",
        "is_neox_style=True",
        "prefill_parity",
        (*STARTS, "ragged_batch"),
        ("model.layers.0.self_attn", "queries", "With is_neox_style=False", "get_rope"),
    ),
    "rope parameters not passed": Seed(
        "rope_parameters=config.rope_parameters",
        "rope_parameters=None",
        "prefill_parity",
        STARTS,
        ("rope_theta 20000 instead of 10000",),
    ),
    "rotary embedding not applied": Seed(
        "        q, k = self.rotary_emb(positions, q, k)\n",
        "",
        "prefill_parity",
        STARTS,
        ("the rotary embedding is not applied",),
    ),
    "positions recomputed": Seed(
        "        q, k = self.rotary_emb(positions, q, k)",
        "        q, k = self.rotary_emb(torch.arange(len(q)), q, k)",
        "chunked_prefill",
        ONLY_LATER,
        ("position 0 for the token at position 56", "self.rotary_emb(torch.arange"),
    ),
    "attention by hand, without the cache": Seed(
        "        attn_output = self.attn(q, k, v)\n",
        "        n, groups = len(q), self.num_heads // self.num_kv_heads\n"
        "        q = q.view(n, -1, self.head_dim).transpose(0, 1)\n"
        "        k, v = (\n"
        "            t.view(n, -1, self.head_dim).transpose(0, 1).repeat_interleave(groups, 0) "
        "for t in (k, v)\n"
        "        )\n"
        "        attn_output = nn.functional.scaled_dot_product_attention(q, k, v, "
        "is_causal=True)\n"
        "        attn_output = attn_output.transpose(0, 1).reshape(n, -1)\n",
        "chunked_prefill",
        ONLY_LATER,
        ("model.layers.0.self_attn.attn", "never calls it", "paged cache"),
    ),
    "attention that sees later tokens": Seed(
        "layers.attention import Attention\n",
        "layers.attention import PrefillPrefixLMAttention as Attention\n",
        "starts",
        ("interface",),
        ("chunked prefill off", "not causal", "use Attention where"),
    ),
    "forward run while vLLM starts, as it is on GPUs": Seed(
        'prefix=f"{prefix}.attn",\n        )\n',
        'prefix=f"{prefix}.attn",\n        )\n'
        "        self.forward(torch.zeros(1, 1), torch.zeros(1, 7))\n",
        "starts",
        ("interface",),
        ("in forward", "Tensors are flat in vLLM", "num_kv_heads="),
    ),
    "one norm in the place of two": Seed(
        "        hidden_states = self.post_attention_layernorm(hidden_states)\n",
        "        hidden_states = self.input_layernorm(hidden_states)\n",
        "prefill_parity",
        STARTS,
        ("never calls it", "model.layers.0.input_layernorm is called twice instead"),
    ),
    "the MLP given another tensor": Seed(
        "        hidden_states = self.mlp(hidden_states)\n",
        "        hidden_states = self.mlp(residual)\n",
        "prefill_parity",
        STARTS,
        ("the input of model.layers.0.mlp", ": hidden_states = self.mlp(residual)"),
    ),
    "the last layer left out": Seed(
        "        for layer in self.layers:",
        "        for layer in self.layers[:-1]:",
        "prefill_parity",
        STARTS,
        ("makes model.layers.2 and loads", ": hidden_states = layer(positions, hidden_states)"),
    ),
    "kept between calls": Seed(
        "        for layer in self.layers:",
        "        self.seen = getattr(self, 'seen', hidden_states.mean(0))\n"
        "        hidden_states = hidden_states + hidden_states.mean(0) - self.seen\n"
        "        for layer in self.layers:",
        "prefill_parity",
        STARTS,
        ("forward sets self.seen (line", ": hidden_states = layer(positions, hidden_states)"),
    ),
    "tied, although the head has weights of its own": Seed(
        "        if config.tie_word_embeddings:",
        "        if True:",
        "prefill_parity",
        STARTS,
        ("The port ties lm_head to the embedding", "self.lm_head = nn.Linear("),
    ),
    "attention scale": Seed(
        "self.head_dim**-0.5",
        "self.head_dim**-1.0",
        "prefill_parity",
        STARTS,
        ("Attention's scale is 0.03125, the original's is 0.176777", "self.attn = Attention"),
    ),
    "keys and values exchanged": Seed(
        "self.attn(q, k, v)",
        "self.attn(q, v, k)",
        "prefill_parity",
        STARTS,
        ("v_proj", "self.attn(q, v, k)"),
    ),
    "bias dropped": Seed(
        "bias=config.attention_bias",
        "bias=False",
        "starts",
        ("interface",),
        ("9 tensors of the checkpoint have no place", "k_proj.bias", "bias=False"),
    ),
    "norm skipped": Seed(
        "        hidden_states = self.post_attention_layernorm(hidden_states)\n",
        "",
        "prefill_parity",
        STARTS,
        ("model.layers.0.post_attention_layernorm", "never calls it"),
    ),
    "final norm's eps": Seed(
        "self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)",
        "self.norm = RMSNorm(config.hidden_size)",
        "prefill_parity",
        STARTS,
        ("model.norm", "Its eps is 1e-06, the original's is 0.01"),
    ),
    "gate and up exchanged": Seed(
        "self.act_fn(self.gate_proj(x)) * self.up_proj(x)",
        "self.act_fn(self.up_proj(x)) * self.gate_proj(x)",
        "prefill_parity",
        STARTS,
        ("applied to up_proj, in the original to gate_proj",),
    ),
    "another activation": Seed(
        "ACT2FN[config.hidden_act]",
        'ACT2FN["gelu"]',
        "prefill_parity",
        STARTS,
        ("The activation is gelu, the original's is silu",),
    ),
    "residual left out": Seed(
        "        return residual + hidden_states",
        "        return hidden_states",
        "prefill_parity",
        STARTS,
        ("the output of model.layers.0", "return hidden_states", "down_proj"),
    ),
    "logits scaled": Seed(
        "return self.lm_head(hidden_states)",
        "return self.lm_head(hidden_states) / 2",
        "prefill_parity",
        STARTS,
        ("divided by 2", "return self.lm_head(hidden_states) / 2"),
    ),
    "inputs_embeds ignored": Seed(
        "        if inputs_embeds is not None:\n            hidden_states = inputs_embeds\n     "
        "   else:\n"
        "            hidden_states = self.embed_input_ids(input_ids)",
        "        hidden_states = self.embed_input_ids(input_ids)",
        "inputs_embeds",
        (*ONLY_LATER, "chunked_prefill", "decode_parity", "ragged_batch", "far_positions"),
        ("input_ids is None",),
    ),
    "a value kept between calls": Seed(
        "        return self.o_proj(attn_output)",
        "        out = self.o_proj(attn_output)\n"
        "        return out if len(out) < 2 else out + 0.1 * (positions == 0).cumsum(0)[:, "
        "None].clamp(min=1) - 0.1",
        "ragged_batch",
        (*ONLY_LATER, "decode_parity"),
        ("against the same alone",),
    ),
    "a batch dimension": Seed(
        "        q = self.q_proj(hidden_states)",
        "        bsz, seq, _ = hidden_states.shape\n        q = self.q_proj(hidden_states)",
        "starts",
        ("interface",),
        ("not enough values to unpack", "bsz, seq, _ = hidden_states.shape"),
    ),
    "the original's argument": Seed(
        "        positions: torch.Tensor,\n        intermediate_tensors: IntermediateTensors | "
        "None = None,\n"
        "        inputs_embeds: torch.Tensor | None = None,\n    ) -> torch.Tensor:\n        "
        "return self.model(",
        "        position_ids: torch.Tensor,\n        intermediate_tensors: IntermediateTensors "
        "| None = None,\n"
        "        inputs_embeds: torch.Tensor | None = None,\n    ) -> torch.Tensor:\n"
        "        positions = position_ids\n        return self.model(",
        "interface",
        (),
        ("forward(positions) is missing", "forward(position_ids) is left over"),
    ),
    "another name for the class": Seed(
        "class HeliumForCausalLM",
        "class HeliumCausalLM",
        "interface",
        (),
        ("no class HeliumForCausalLM", "HeliumCausalLM"),
    ),
    "the config's number as a constant": Seed(
        "config.rms_norm_eps",
        "0.01",
        "config_fields",
        (*ONLY_LATER, "chunked_prefill", "decode_parity", "inputs_embeds", "used_parameters"),
        ("never reads config.rms_norm_eps (0.01 here)", "class HeliumDecoderLayer", "constant"),
    ),
}


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Port:
    return new_port("helium", architecture="helium", root=tmp_path_factory.mktemp("ports"))


def judge(port: Port, source: str) -> dict[str, Verdict]:
    """Run every check of the step in order; what requires a check that did not pass is left out."""
    write_atomically(port.modeling, source)
    context = CheckContext(port=port, live=live_for(port))
    verdicts: dict[str, Verdict] = {}
    for check in CHECKS:
        required = [verdicts.get(r) for r in check.requires if r in {c.id for c in CHECKS[:2]}]
        if all(v is not None and v.status == "passed" for v in required):
            verdicts[check.id] = check().run(context)
    return verdicts


def test_a_correct_port_passes_every_check(port: Port) -> None:
    verdicts = judge(port, GOLDEN)
    assert {id: v.status for id, v in verdicts.items()} == {c.id: "passed" for c in CHECKS}
    assert "chunks of 56, 56, 56, 32" in verdicts["chunked_prefill"].what
    assert "6 requests of different lengths in one step" in verdicts["ragged_batch"].what
    assert "Position 511 of 512" in verdicts["far_positions"].what
    assert all(v.device and v.tables for v in verdicts.values())


def test_a_weight_that_the_checkpoint_hides_is_missed(port: Port) -> None:
    """A norm without its weight is right as long as the weight is all ones."""
    shard = max(port.checkpoint.glob("*.safetensors"))
    tensors = load_file(shard)
    whole = tensors["model.norm.weight"]
    try:
        save_file({**tensors, "model.norm.weight": torch.ones_like(whole)}, shard)
        verdicts = judge(
            port,
            GOLDEN.replace(
                "return self.norm(hidden_states)",
                "return nn.functional.rms_norm(hidden_states, hidden_states.shape[1:], eps=0.01)",
            ),
        )
    finally:
        save_file(tensors, shard)
    assert verdicts["prefill_parity"].status == "passed"
    missed = verdicts["used_parameters"]
    assert missed.status == "failed" and missed.what.startswith("model.norm.weight is loaded")
    assert "self.norm = RMSNorm(" in missed.where


@pytest.mark.parametrize("name", SEEDS)
def test_a_seeded_bug_is_found_and_named(port: Port, name: str) -> None:
    seed = SEEDS[name]
    assert seed.old in GOLDEN, "the seed must apply"
    verdicts = judge(port, GOLDEN.replace(seed.old, seed.new))
    failed = [id for id, v in verdicts.items() if v.status == "failed"]
    assert failed, "the bug was not found"
    assert failed[0] == seed.red
    assert [id for id in seed.green if verdicts[id].status != "passed"] == []
    verdict = verdicts[seed.red]
    words = " ".join((verdict.what, verdict.where, verdict.next, *verdict.causes))
    assert [part for part in seed.says if part not in words] == [], words
    assert verdict.next
