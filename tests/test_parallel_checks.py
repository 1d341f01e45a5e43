"""The checks of step `parallel` on a correct Helium, and on it with one bug each.

A seed names the check that must fail, words it must say, and checks that must still pass.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from seeds import Bench, Edit, edit, words

from portkit.checks.base import CheckContext
from portkit.create import new_port
from portkit.live.client import live_for
from portkit.live.rank_counts import possible, refusal
from portkit.steps.parallel.quantised import QuantisedRun
from portkit.steps.parallel.rehearse import rehearse

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

LAYOUT = ("layer_classes", "prefixes", "impossible_ranks")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    port = new_port(
        "helium", architecture="HeliumForCausalLM", root=tmp_path_factory.mktemp("ports")
    )
    yield Bench(port, "parallel")
    live_for(port).close()


def test_correct_port_passes_every_check(bench: Bench) -> None:
    bench.write()
    verdicts = {
        id: bench.run(id)
        for id in (*LAYOUT, "rehearsal_tp1", "rehearsal_tp2", "rehearsal_tp4", "quantised_run")
    }
    assert {id: v.status for id, v in verdicts.items()} == dict.fromkeys(verdicts, "passed"), [
        words(v) for v in verdicts.values() if not v.ok
    ]
    shares = {row[0]: row for table in verdicts["rehearsal_tp4"].tables for row in table.rows}
    # Two KV heads, four ranks: each has 2 of 8 query heads and a copy of 1 KV head: (2 + 2) / 12.
    assert shares["model.layers.*.self_attn.qkv_proj.weight"][4:] == (
        0.333,
        "more ranks than KV heads: each holds a copy of one",
    )
    assert shares["model.layers.*.mlp.down_proj.weight"][4] == 0.25
    talks = {row[0]: row[1:] for row in verdicts["rehearsal_tp2"].tables[1].rows}
    assert talks["model.layers.*.mlp.down_proj"] == (3, "1 all_reduce", "1 all_reduce")
    layers = {row[0]: row[3] for row in verdicts["quantised_run"].tables[0].rows}
    assert layers["model.layers.1.mlp.gate_up_proj"] == "CompressedTensorsW8A8Int8"
    assert layers["model.layers.2.mlp.gate_up_proj"] == "unquantised"
    assert layers["model.layers.0.self_attn.o_proj"] == "unquantised"
    four = {row[0]: row[3] for row in verdicts["quantised_run"].tables[2].rows}
    assert four["model.layers.1.mlp.gate_up_proj"] == "CompressedTensorsWNA16"
    assert four["model.layers.2.mlp.gate_up_proj"] == "unquantised"
    online = {row[0]: row[3] for row in verdicts["quantised_run"].tables[4].rows}
    assert online["model.layers.1.mlp.gate_up_proj"] == "Fp8PtpcOnlineLinearMethod"
    assert online["model.layers.2.mlp.gate_up_proj"] == "unquantised"


O_PROJ = """        self.o_proj = RowParallelLinear(
            config.hidden_size,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
"""
SEEDS: dict[str, tuple[Edit, str, tuple[str, ...], tuple[str, ...]]] = {
    "nn.Linear left": (
        edit(
            O_PROJ,
            "        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)\n",
        ),
        "layer_classes",
        ("self_attn.o_proj", "nn.Linear", "RowParallelLinear belongs there", "modeling_helium.py:"),
        (),
    ),
    "nn.Embedding left": (
        edit(
            """VocabParallelEmbedding(
                config.vocab_size,
                config.hidden_size,
                quant_config=quant_config,
                prefix=f"{prefix}.embed_tokens",
            )""",
            "nn.Embedding(config.vocab_size, config.hidden_size)",
        ),
        "layer_classes",
        ("embed_tokens is an nn.Embedding", "VocabParallelEmbedding("),
        (),
    ),
    "replicated down_proj": (
        edit(
            "    RowParallelLinear,\n)",
            "    ReplicatedLinear,\n    RowParallelLinear,\n)",
            "self.down_proj = RowParallelLinear(",
            "self.down_proj = ReplicatedLinear(",
        ),
        "layer_classes",
        ("mlp.down_proj", "ReplicatedLinear", "every rank holds"),
        (),
    ),
    "prefix missing": (
        edit('            prefix=f"{prefix}.down_proj",\n', ""),
        "prefixes",
        ("mlp.down_proj was given no prefix", "self.down_proj = RowParallelLinear("),
        ("rehearsal_tp1",),
    ),
    "prefix of another attribute": (
        edit('prefix=f"{prefix}.gate_up_proj"', 'prefix=f"{prefix}.gate_up"'),
        "prefixes",
        ("mlp.gate_up_proj was given the prefix", "gate_up'"),
        ("rehearsal_tp1",),
    ),
    "prefix not handed down": (
        edit(
            'HeliumMLP(config, quant_config, prefix=f"{prefix}.mlp")',
            'HeliumMLP(config, quant_config, prefix="mlp")',
        ),
        "prefixes",
        ("mlp.gate_up_proj was given the prefix 'mlp.gate_up_proj'", "self.mlp = HeliumMLP("),
        ("layer_classes",),
    ),
    "head_dim half as large": (
        edit("self.head_dim = config.head_dim or ", "self.head_dim = config.head_dim // 2 or "),
        "rehearsal_tp1",
        ("does not fit", "the layer has 32 rows for it", "sizes given"),
        (),
    ),
    "more ranks than KV heads refused": (
        edit(
            "        self.num_kv_heads = max(1, ",
            '        assert total_num_kv_heads % tp_size == 0, "not divisible"\n'
            "        self.num_kv_heads = max(1, ",
        ),
        "rehearsal_tp4",
        ("not divisible", "fewer KV heads than ranks"),
        (),
    ),
    "logits by hand": (
        edit(
            "return self.logits_processor(self.lm_head, hidden_states)",
            "return torch.nn.functional.linear(hidden_states, self.lm_head.weight)[\n"
            "            :, : self.config.vocab_size\n        ]",
        ),
        "rehearsal_tp2",
        ("does without LogitsProcessor", "def compute_logits"),
        (),
    ),
    "attention layers share a name": (
        edit('prefix=f"{prefix}.attn",', 'prefix="attn",'),
        "prefixes",
        ("Duplicate layer name", "its own name"),
        (),
    ),
    "quant_config not passed": (
        edit(
            "            bias=config.attention_bias,\n            quant_config=quant_config,\n",
            "            bias=config.attention_bias,\n",
        ),
        "prefixes",
        ("self_attn.qkv_proj was given no quant_config", "silently"),
        ("layer_classes",),
    ),
    "quant_config not passed to Attention": (
        edit(
            "            cache_config=cache_config,\n            quant_config=quant_config,\n",
            "            cache_config=cache_config,\n",
        ),
        "prefixes",
        ("self_attn.attn was given no quant_config", "KV cache"),
        ("layer_classes", "quantised_run"),
    ),
    "packed_modules_mapping missing": (
        edit("    packed_modules_mapping = {", "    other_mapping = {"),
        "prefixes",
        ("qkv_proj fuses layers", "packed_modules_mapping"),
        ("layer_classes",),
    ),
    "packed_modules_mapping missing, run": (
        edit("    packed_modules_mapping = {", "    other_mapping = {"),
        "rehearsal_tp1",
        ("qkv_proj.weight", "packed_modules_mapping"),
        (),
    ),
    "q, k, v split in another order": (
        edit(
            "q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)",
            "q, v, k = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)",
        ),
        "rehearsal_tp1",
        ("differ from Transformers", "layers.0.self_attn"),
        LAYOUT,
    ),
    "logits with the vocabulary's padding": (
        edit(
            "return self.logits_processor(self.lm_head, hidden_states)",
            "return hidden_states @ self.lm_head.weight.t()",
        ),
        "rehearsal_tp1",
        ("out of bounds", "LogitsProcessor"),
        (),
    ),
    "no all-reduce": (
        edit(
            'prefix=f"{prefix}.o_proj",',
            'prefix=f"{prefix}.o_proj",\n            reduce_results=False,',
        ),
        "rehearsal_tp2",
        (
            "self_attn.o_proj makes no all-reduce",
            "self.o_proj = RowParallelLinear(",
            "reduce_results",
        ),
        ("rehearsal_tp1", *LAYOUT),
    ),
    "a bias added on each rank": (
        edit(
            'prefix=f"{prefix}.down_proj",',
            'prefix=f"{prefix}.down_proj", reduce_results=False, skip_bias_add=True,',
            "        x, _ = self.down_proj(x)\n        return x",
            "        x, bias = self.down_proj(x)\n        return all_reduce(x + bias)",
            "import get_pp_group, ",
            "import tensor_model_parallel_all_reduce as all_reduce, get_pp_group, ",
        ),
        "rehearsal_tp2",
        (
            "layers.0.mlp: its output differs on every rank",
            "down_proj.bias is added on each of the 2 ranks",
            "self.down_proj = RowParallelLinear(",
        ),
        ("rehearsal_tp1",),
    ),
    "reduced twice": (
        edit(
            "        x, _ = self.down_proj(x)\n        return x",
            "        x, _ = self.down_proj(x)\n        return all_reduce(x)",
            "import get_pp_group, ",
            "import tensor_model_parallel_all_reduce as all_reduce, get_pp_group, ",
        ),
        "rehearsal_tp2",
        ("it is 2 times as large", "return all_reduce(x)"),
        ("rehearsal_tp1",),
    ),
    "another rank's queries": (
        edit(
            "        q, k = self.rotary_emb(positions, q, k)",
            "        heads = q.unflatten(-1, (self.num_heads, -1))\n"
            "        q = heads.roll(int(self.qkv_proj.tp_rank > 0), 1).flatten(1)\n"
            "        q, k = self.rotary_emb(positions, q, k)",
        ),
        "rehearsal_tp2",
        ("queries of rank 1 are not its heads'", "self_attn", "self.qkv_proj = QKVParallelLinear("),
        ("rehearsal_tp1",),
    ),
    "one rank alone stops": (
        edit(
            "        attn_output = self.attn(q, k, v)",
            "        if self.qkv_proj.tp_rank == 1:\n"
            "            q = q.unflatten(-1, (7, -1))\n"
            "        attn_output = self.attn(q, k, v)",
        ),
        "rehearsal_tp2",
        ("RuntimeError", "(in rank 1)", "q = q.unflatten(-1, (7, -1))"),
        ("rehearsal_tp1",),
    ),
    "q_size counts all heads": (
        edit(
            "self.q_size = self.num_heads * self.head_dim",
            "self.q_size = total_num_heads * self.head_dim",
        ),
        "rehearsal_tp2",
        ("On 2 ranks the port stopped", "modeling_helium.py:", "divide num_heads"),
        ("rehearsal_tp1",),
    ),
    "KV heads asserted to divide": (
        edit(
            "        self.num_kv_heads = max(1, total_num_kv_heads // tp_size)",
            "        assert total_num_kv_heads % tp_size == 0\n        self.num_kv_heads = "
            "total_num_kv_heads // tp_size",
        ),
        "impossible_ranks",
        ("4 ranks are possible", "refuses", "total_num_kv_heads % tp_size"),
        ("layer_classes", "prefixes"),
    ),
    "ignore list misses a layer": (
        edit('prefix=f"{prefix}.gate_up_proj"', 'prefix=f"{prefix}.gate_up"'),
        "quantised_run",
        ("gate_up_proj",),
        (),
    ),
    "a layer is never quantised": (
        edit(
            "            bias=config.attention_bias,\n            quant_config=quant_config,\n",
            "            bias=config.attention_bias,\n",
        ),
        "quantised_run",
        ("self_attn.qkv_proj is quantised, but vLLM runs it unquantised",),
        (),
    ),
    "packed_modules_mapping against the mapper": (
        edit(
            '["q_proj", "k_proj", "v_proj"]',
            '["q_proj", "v_proj", "k_proj"]',
            "    packed_modules_mapping",
            """    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            ".gate_proj": (".gate_up_proj", 0),
            ".up_proj": (".gate_up_proj", 1),
        }
    )

    def load_weights(self, weights):
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)

    packed_modules_mapping""",
            "from vllm.sequence",
            """from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper
from vllm.sequence""",
        ),
        "prefixes",
        ("qkv_proj holds q_proj, v_proj, k_proj", "in the order q_proj, k_proj, v_proj"),
        ("layer_classes", "rehearsal_tp1"),
    ),
}


@pytest.mark.parametrize("name", SEEDS)
def test_seeded_bug_is_caught_by_name(bench: Bench, name: str) -> None:
    change, check, said, green = SEEDS[name]
    bench.write(change)
    verdict = bench.run(check)
    assert verdict.status == "failed", f"{check} passes: {words(verdict)}"
    missing = [text for text in said if text not in words(verdict)]
    assert not missing, f"{check} does not say {missing}: {words(verdict)}"
    assert verdict.where
    for other in green:
        result = bench.run(other)
        assert result.status == "passed", f"{other} fails too: {words(result)}"


@pytest.mark.parametrize(
    "change",
    [
        "weight.float()",  # eight bits survive float32 and back, eight weights in an int32 do not
        'weight * float("inf") if name.endswith("_scale") and weight.shape[1] > 1 else weight',
    ],
)
def test_what_spoils_four_bits_alone_is_caught(bench: Bench, change: str) -> None:
    """The second gives NaN, which must not pass for a model that float16 cannot hold."""
    Bench(bench.port, "weights").write(
        edit(
            "loader.load_weights(weights",
            f"loader.load_weights(((name, {change}) for name, weight in weights)",
        )
    )
    verdict = QuantisedRun().run(CheckContext(bench.port, live_for(bench.port), loader="port"))
    assert verdict.status == "failed"
    assert verdict.what.startswith("In int4 model.layers.") and "own input" in verdict.what


def test_one_layers_scale_is_named_by_what_it_does_to_that_layers_own_input(bench: Bench) -> None:
    layer = "model.layers.1.mlp.down_proj"
    Bench(bench.port, "weights").write(
        edit(
            "loader.load_weights(weights",
            "loader.load_weights(((name, weight * 1.1 "
            f'if name == "{layer}.weight_scale" else weight) for name, weight in weights)',
        )
    )
    verdict = QuantisedRun().run(CheckContext(bench.port, live_for(bench.port), loader="port"))
    assert verdict.status == "failed" and verdict.where == layer
    assert verdict.what.startswith(f"In int8 {layer} is 0.1") and "such layers" not in verdict.what
    row = next(row for row in verdict.tables[0].rows if row[0] == layer)
    assert float(row[4]) > float(row[5]) > 0


HELIUM = {
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 384,
    "vocab_size": 509,
}


@pytest.mark.parametrize(
    ("changes", "ranks", "why"),
    [
        ({}, 2, ""),
        ({}, 4, ""),
        ({}, 8, ""),
        ({}, 3, "8 query heads"),
        ({}, 0, "no number of ranks"),
        ({"num_attention_heads": 12, "num_key_value_heads": 4}, 6, "4 KV heads"),
        ({"num_attention_heads": 12, "num_key_value_heads": 3, "intermediate_size": 100}, 6, "100"),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 3, "intermediate_size": 96},
            3,
            "padded to 512",
        ),
        ({"vocab_size": 2}, 8, ""),
        ({"mamba_n_groups": 1}, 4, ""),
        ({"mamba_n_groups": 2}, 2, ""),
        ({"mamba_n_groups": 2}, 4, "2 groups of its state-space layers"),
        ({"linear_num_key_heads": 2}, 2, ""),
        ({"linear_num_key_heads": 2}, 4, "2 heads of its linear attention"),
    ],
)
def test_rank_counts_that_cannot_work(changes: dict[str, int], ranks: int, why: str) -> None:
    reason = refusal({**HELIUM, **changes}, ranks)
    assert (why in reason) if why else not reason


def test_rank_counts_that_can() -> None:
    assert possible(HELIUM) == (1, 2, 4, 8)


def test_what_a_stage_raised_is_told_and_not_that_a_process_ended(bench):
    """vLLM's executor says "WorkerProc initialization failed"; the stage's own words are logged."""
    bench.write(edit("self.lm_head = PPMissingLayer()", "self.lm_head = PPMissingLayer().weight"))
    found = bench.run("rehearsal_pp2")
    assert found.status == "failed"
    assert "no attribute 'weight' (in stage 0)" in found.what, found.what
    line = next(
        n for n, text in enumerate(bench.port.source.splitlines(), 1) if "Layer().weight" in text
    )
    assert found.where.startswith(f"{bench.port.modeling.name}:{line}"), found.where


@pytest.mark.vllm
def test_any_number_of_ranks_and_stages_is_rehearsed_and_told(bench):
    """Two stages of one rank each: what each holds, and that together they equal Transformers."""
    bench.write()
    page = rehearse(bench.port, ranks=1, stages=2)
    assert page.ok, str(page)
    (found,) = page.values
    stages = {row["stage"]: row for row in found["sizes"]}
    assert set(stages) == {0, 1}
    assert sum(row["attentions"] for row in stages.values()) == 3
    assert "What each" in str(page)


def test_ranks_that_cannot_be_are_refused_in_words(bench):
    refused = rehearse(bench.port, ranks=3)
    assert not refused.ok and "cannot run on 3 ranks" in str(refused)
