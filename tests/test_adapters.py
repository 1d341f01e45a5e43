"""The check `lora`: adapters on a correct Helium, and on it with a layer they do not reach."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from seeds import Bench, Edit, edit, words

from portkit.create import new_port
from portkit.live import fused
from portkit.live.client import live_for

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    port = new_port(
        "helium", architecture="HeliumForCausalLM", root=tmp_path_factory.mktemp("ports")
    )
    yield Bench(port, "parallel")
    live_for(port).close()


ASTRAY: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "parts in another order": (
        edit('["gate_proj", "up_proj"]', '["up_proj", "gate_proj"]'),
        ("applies gate_proj's adapter to up_proj", '"gate_up_proj": ["up_proj", "gate_proj"]'),
    ),
    "parts of other sizes in another order": (
        edit('["q_proj", "k_proj", "v_proj"]', '["k_proj", "q_proj", "v_proj"]'),
        ("cannot take an adapter of q_proj", '"qkv_proj": ["k_proj", "q_proj", "v_proj"]'),
    ),
    "mapping missing": (
        edit("    packed_modules_mapping = {", "    other_mapping = {"),
        ("refuses an adapter of q_proj", "does not name q_proj"),
    ),
    "renamed by load_weights alone": (
        edit(
            "self.mlp = ", "self.ffn = ", 'f"{prefix}.mlp"', 'f"{prefix}.ffn"',
            "self.mlp(", "self.ffn(", "loader.load_weights(weights",
            'loader.load_weights(((n.replace(".mlp.", ".ffn."), w) for n, w in weights)',
        ),
        ("adapter of gate_proj reaches no layer", "def load_weights", "hf_to_vllm_mapper"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ASTRAY)
def test_adapters_that_go_astray_are_named(bench: Bench, name: str) -> None:
    """The port's own load_weights is right: only packed_modules_mapping, or a name, is wrong."""
    change, said = ASTRAY[name]
    Bench(bench.port, "weights").write(change)
    verdict = bench.run("lora")
    assert verdict.status == "failed" and not [t for t in said if t not in words(verdict)], words(
        verdict
    )


DEALT = """
        ranks = get_tensor_model_parallel_world_size()

        def dealt(name, weight):
            if ".gate_proj." in name or ".up_proj." in name:
                return torch.cat([weight[r::ranks] for r in range(ranks)])
            if name.endswith("down_proj.weight"):
                return torch.cat([weight[:, r::ranks] for r in range(ranks)], dim=1)
            return weight

        weights = ((name, dealt(name, weight)) for name, weight in weights)
"""
"""Every second row and column to a rank: the same sums, but no place for an adapter's one piece."""


def test_a_linear_whose_own_forward_casts_is_taken_at_its_word(bench: Bench) -> None:
    """As vLLM's GateLinear: its weight has another dtype than what it is given."""
    Bench(bench.port, "weights").write(
        edit(
            "class HeliumAttention(",
            "class WideLinear(ReplicatedLinear):\n"
            "    def forward(self, x):\n"
            "        wide, bias = super().forward(x.double())\n"
            "        return wide.to(x.dtype), bias\n\n\n"
            "class HeliumAttention(",
            "self.o_proj = RowParallelLinear(",
            "self.o_proj = WideLinear(",
            'prefix=f"{prefix}.o_proj",',
            'prefix=f"{prefix}.o_proj", params_dtype=torch.float64,',
            "    RowParallelLinear,\n)",
            "    ReplicatedLinear,\n    RowParallelLinear,\n)",
        )
    )
    job = live_for(bench.port).run("lora", loader="port")
    assert job.ok, job.what
    wide = [row for row in job.value["linears"] if row["path"].endswith(".o_proj")]
    assert wide and all(row["layer"] and row["difference"] < 1e-4 for row in wide), wide
    assert job.value["all"]["ok"], job.value["all"]


def test_adapters_that_only_ranks_lead_astray_are_named(bench: Bench) -> None:
    loader = "        loader = AutoWeightsLoader(self)\n"
    Bench(bench.port, "weights").write(edit(loader, DEALT + loader))
    verdict = bench.run("lora")
    assert verdict.status == "failed"
    for said in ("right on one rank; on two", "gate_proj, up_proj, down_proj", "one piece to each"):
        assert said in words(verdict)


def test_adapters_move_the_port_as_they_move_transformers(bench: Bench) -> None:
    Bench(bench.port, "weights").write()
    passed = bench.run("lora")
    assert passed.status == "passed" and "21 linear layers" in passed.what
    assert "On two ranks (2 processes on the CPU, over gloo) to" in passed.what
    Bench(bench.port, "weights").write(edit("SupportsLoRA, SupportsPP):", "SupportsPP):"))
    skipped = bench.run("lora")
    assert skipped.status == "skipped" and "SupportsLoRA" in skipped.what


def test_parts_that_a_mapper_names_for_two_kinds_of_layers_count_once() -> None:
    """An MLP's gate and up, and those of shared experts, are parts of layers of one name."""
    stacked = {
        ".mlp.gate_proj": (".mlp.gate_up_proj", 0),
        ".mlp.up_proj": (".mlp.gate_up_proj", 1),
        ".shared_experts.gate_proj": (".shared_experts.gate_up_proj", 0),
        ".shared_experts.up_proj": (".shared_experts.gate_up_proj", 1),
    }
    port = SimpleNamespace(hf_to_vllm_mapper=SimpleNamespace(orig_to_new_stacked=stacked))
    parts = fused.stacked_parts(port)
    assert parts == {"gate_up_proj": ["gate_proj", "up_proj"]}
    assert fused.disputed({"gate_up_proj": ["up_proj", "gate_proj"]}, parts) == ["gate_up_proj"]
