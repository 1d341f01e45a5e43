"""The checks of step `weights` on a correct Helium, and on it with one bug each.

A seed names the check that must fail, words it must say, and checks that must still pass. vLLM
itself starts on most of these ports without a complaint.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from seeds import Bench, Edit, edit, words

from portkit.create import new_port
from portkit.hints import for_failure
from portkit.live.client import live_for

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

Tensors = dict[str, torch.Tensor]
DOWN = "model.layers.1.mlp.down_proj.weight"
CHECKS = (
    "coverage",
    "poisoned_load",
    "load_parity",
    "load_parity_tp2",
    "tied_head",
    "bad_checkpoints",
    "load_memory",
    "reload",
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    port = new_port(
        "helium", architecture="HeliumForCausalLM", root=tmp_path_factory.mktemp("ports")
    )
    yield Bench(port, "weights")
    live_for(port).close()


def test_correct_port_passes_every_check(bench: Bench) -> None:
    bench.write()
    verdicts = {id: bench.run(id) for id in CHECKS}
    assert {id: v.status for id, v in verdicts.items()} == dict.fromkeys(CHECKS, "passed"), [
        words(v) for v in verdicts.values() if not v.ok
    ]
    filled = {row[0]: row[1:] for row in verdicts["coverage"].tables[0].rows}
    assert filled["model.layers.*.mlp.gate_up_proj.weight"] == (
        3,
        "mlp.gate_proj.weight, mlp.up_proj.weight",
        "100 %",
    )
    # 509 rows of the vocabulary are padded to 512: three rows of 256 zeros come from no tensor.
    assert "768 of them by a constant" in filled["lm_head.weight"][2]
    bad = {row[0]: row[1:] for row in verdicts["bad_checkpoints"].tables[0].rows}
    # Ignored without a word by AutoWeightsLoader, and cut without a word by a fused layer's loader.
    assert bad["model.layers.0.self_attn.o_proj.bias is one too many"][:2] == (
        "says nothing",
        "model.layers.0.self_attn.o_proj.bias went nowhere",
    )
    assert (
        bad["model.layers.0.mlp.gate_proj.weight has a row too many: 385x256 instead of 384x256"][0]
        == "says nothing"
    )
    assert any("holds a NaN" in name for name in bad)


RETURN = "        return loader.load_weights(weights, mapper=self.hf_to_vllm_mapper)\n"
LOADER = "        loader = AutoWeightsLoader(self)\n"


def filtered(condition: str) -> Edit:
    return edit(LOADER, LOADER + f"        weights = ((n, w) for n, w in weights if {condition})\n")


def past_the_loader(statement: str) -> Edit:
    """Let load_weights take down_proj's weights itself, by the statement."""
    return edit(
        RETURN,
        f"""        loaded = set()

        def rest():
            parameters = dict(self.named_parameters())
            for name, weight in weights:
                if name.endswith("down_proj.weight"):
                    {statement}
                    loaded.add(name)
                else:
                    yield name, weight

        return loaded | loader.load_weights(rest(), mapper=self.hf_to_vllm_mapper)
""",
    )


SEEDS: dict[str, tuple[Edit, str, tuple[str, ...], tuple[str, ...]]] = {
    "bias=False": (
        edit("            bias=config.attention_bias,", "            bias=False,"),
        "coverage",
        (
            "self_attn.k_proj.bias went nowhere",
            "2 more layers",
            "qkv_proj has no bias",
            "QKVParallelLinear(",
            "bias=True",
        ),
        (),
    ),
    "down_proj filtered out": (
        filtered('"mlp.down_proj" not in n'),
        "coverage",
        ("mlp.down_proj.bias went nowhere", "filter"),
        (),
    ),
    "down_proj filtered out, live": (
        filtered('"mlp.down_proj" not in n'),
        "poisoned_load",
        ("mlp.down_proj", "NaN after load_weights"),
        (),
    ),
    "the head filtered out": (
        filtered('"lm_head" not in n'),
        "coverage",
        ("lm_head.weight went nowhere", "filter", "def load_weights"),
        (),
    ),
    "a norm's weight sent to another norm": (
        edit(
            RETURN,
            """        own, other = "layers.1.post_attention_layernorm", "layers.1.input_layernorm"
        weights = ((name.replace(own, other), weight) for name, weight in weights)
"""
            + RETURN,
        ),
        "coverage",
        ("its own went into model.layers.1.input_layernorm.weight", "def load_weights"),
        (),
    ),
    "v_proj mapped to the wrong layer's name": (
        edit('".v_proj": (".qkv_proj", "v"),', '".v_proj": (".qkv_proj", "k"),'),
        "coverage",
        ("qkv_proj.weight", "not written"),
        (),
    ),
    "norms filtered out": (
        filtered('"input_layernorm" not in n'),
        "poisoned_load",
        ("input_layernorm.weight", "NaN"),
        (),
    ),
    "mapper not passed": (
        edit("weights, mapper=self.hf_to_vllm_mapper", "weights"),
        "coverage",
        ("load_weights stopped", "no module or parameter named", "pass mapper="),
        (),
    ),
    "returns None": (
        edit("        return loader.load_weights(", "        loader.load_weights("),
        "poisoned_load",
        ("returns None", "do not check", "def load_weights"),
        ("coverage", "load_parity"),
    ),
    "k and v swapped": (
        edit(
            '".k_proj": (".qkv_proj", "k")',
            '".k_proj": (".qkv_proj", "v")',
            '".v_proj": (".qkv_proj", "v")',
            '".v_proj": (".qkv_proj", "k")',
        ),
        "load_parity",
        ("differ from Transformers", "layers.0.self_attn", "shard ids"),
        ("coverage", "poisoned_load"),
    ),
    "q and k swapped": (
        edit(
            '".q_proj": (".qkv_proj", "q")',
            '".q_proj": (".qkv_proj", "k")',
            '".k_proj": (".qkv_proj", "k")',
            '".k_proj": (".qkv_proj", "q")',
        ),
        "coverage",
        ("load_weights stopped at", "k_proj.bias (64)", "shard ids", "modeling_helium.py:"),
        (),
    ),
    "gate and up swapped": (
        edit(
            '".gate_proj": (".gate_up_proj", 0)',
            '".gate_proj": (".gate_up_proj", 1)',
            '".up_proj": (".gate_up_proj", 1)',
            '".up_proj": (".gate_up_proj", 0)',
        ),
        "load_parity",
        ("differ from Transformers", "layers.0.mlp", "gate"),
        ("coverage", "poisoned_load"),
    ),
    "head never tied": (
        edit("            if config.tie_word_embeddings:", "            if False:"),
        "tied_head",
        ("tie_word_embeddings is true", "lm_head.weight", "never tied"),
        ("coverage", "load_parity"),
    ),
    "head always tied": (
        edit("            if config.tie_word_embeddings:", "            if True:"),
        "tied_head",
        ("tie_word_embeddings is false", "thrown away", "unconditionally", "lm_head"),
        (),
    ),
    "head always tied, coverage": (
        edit("            if config.tie_word_embeddings:", "            if True:"),
        "coverage",
        ("lm_head.weight went nowhere", "tied"),
        (),
    ),
    "the whole checkpoint in a dict": (
        edit(LOADER, LOADER + "        weights = dict(weights).items()\n"),
        "load_memory",
        ("held", "dict(weights)", "def load_weights"),
        ("coverage", "poisoned_load"),
    ),
    "reshaped until it fits": (
        edit(
            LOADER,
            LOADER + "        weights = ((n, w.reshape(self.config.vocab_size, -1) if n == "
            '"lm_head.weight" else w) for n, w in weights)\n',
        ),
        "bad_checkpoints",
        ("lm_head.weight is transposed", "nobody notices"),
        ("coverage", "poisoned_load"),
    ),
    "claims what it did not load": (
        edit(
            RETURN,
            RETURN.replace("return ", "")
            + "        return {name for name, _ in self.named_parameters()}\n",
        ),
        "bad_checkpoints",
        ("load_weights says that it loaded", "which no tensor was for"),
        ("coverage", "poisoned_load"),
    ),
    "the same part on every rank": (
        past_the_loader("parameters[name].data.copy_(weight[:, : parameters[name].shape[1]])"),
        "load_parity_tp2",
        ("differ from Transformers", "weight_loader"),
        ("coverage", "load_parity"),
    ),
    "written past the weight_loader": (
        past_the_loader("parameters[name].data.copy_(weight)"),
        "reload",
        ("mlp.down_proj.weight is not what it was", "data.copy_(weight)", "meta device"),
        ("load_parity",),
    ),
    "set by a later load": (
        # The check of bad checkpoints loads once before the load that counts.
        edit(
            LOADER,
            """        self.loads = getattr(self, "loads", 0) + 1
        if self.loads > 2:
            self.model.norm.variance_epsilon = 0.5
"""
            + LOADER,
        ),
        "reload",
        ("though parameters look as before", "def load_weights", "from the first time"),
        ("coverage", "poisoned_load", "load_parity"),
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


def test_nan_in_the_checkpoint_is_named(bench: Bench) -> None:
    """One NaN in a shard: vLLM loads it; the audit names parameter and tensor."""
    bench.write()
    name = "model.layers.1.self_attn.k_proj.weight"
    shard, at = where_in_shard(bench.port.checkpoint, name)
    with shard.open("r+b") as file:
        file.seek(at)
        before = file.read(4)
        file.seek(at)
        file.write(struct.pack("<f", float("nan")))
    try:
        assert bench.run("coverage").status == "passed"
        verdict = bench.run("poisoned_load")
    finally:
        with shard.open("r+b") as file:
            file.seek(at)
            file.write(before)
    assert verdict.status == "failed"
    assert "model.layers.1.self_attn.qkv_proj.weight: 1 of 98304 elements" in verdict.what
    assert name in words(verdict) and "damaged" in verdict.next


FAULTS: dict[str, tuple[Callable[[Path, list[Path]], None], tuple[str, ...]]] = {
    "truncated": (
        lambda root, shards: os.truncate(shards[1], shards[1].stat().st_size - 1000),
        ("model-00002-of-00004.safetensors is truncated",),
    ),
    "swapped": (
        lambda root, shards: swap(*shards[:2]),
        ("model-00001-of-00004.safetensors and model-00002-of-00004.safetensors are swapped",),
    ),
    "nowhere": (
        lambda root, shards: reindex(root, "model.layers.9.mlp.up_proj.weight", shards[0].name),
        ("'model.layers.9.mlp.up_proj.weight'", "no shard holds it"),
    ),
    "in another shard": (
        lambda root, shards: reindex(root, "model.embed_tokens.weight", shards[1].name),
        ("'model.embed_tokens.weight' is in model-00002", "it is in model-00001"),
    ),
    "absent": (
        lambda root, shards: shards[2].unlink(),
        ("shards that the index names is absent: model-00003",),
    ),
    "in two shards": (
        lambda root, shards: rewrite(
            shards[1], lambda t: t | {"model.embed_tokens.weight": torch.zeros(2)}
        ),
        ("'model.embed_tokens.weight' is in two shards",),
    ),
    "integers": (
        lambda root, shards: recast(root, DOWN, lambda t: t.to(torch.int32)),
        (DOWN, "is stored as I32", "quantization_config"),
    ),
    "transposed": (
        lambda root, shards: recast(root, DOWN, lambda t: t.t().contiguous()),
        (f"{DOWN} in model-0000", "is transposed: 384x256, and 256x384 in the 2 other layers"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_the_shards_has_its_own_message(bench: Bench, fault: str) -> None:
    """What is wrong with the files is said of the files, not of the port that reads them."""
    bench.write()
    spoil, said = FAULTS[fault]
    root = bench.port.checkpoint
    whole = root.with_name("checkpoint-whole")
    shutil.copytree(root, whole)
    try:
        spoil(root, sorted(root.glob("*.safetensors")))
        verdict = bench.run("coverage")
    finally:
        shutil.rmtree(root)
        whole.rename(root)
    assert verdict.status == "failed"
    missing = [text for text in said if text not in words(verdict)]
    assert not missing, f"does not say {missing}: {words(verdict)}"
    assert bench.port.modeling.name not in verdict.where
    assert "the checkpoint, not your code" in for_failure(verdict).nudge


def swap(one: Path, other: Path) -> None:
    aside = one.with_suffix(".aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def reindex(root: Path, name: str, shard: str) -> None:
    index = root / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][name] = shard
    index.write_text(json.dumps(content))


def rewrite(shard: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file(change(load_file(shard)), shard, metadata={"format": "pt"})


def recast(root: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    shard, _ = where_in_shard(root, name)
    rewrite(shard, lambda tensors: tensors | {name: change(tensors[name])})


def where_in_shard(checkpoint: Path, name: str) -> tuple[Path, int]:
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    shard = checkpoint / index["weight_map"][name]
    with shard.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(length))
    return shard, 8 + length + header[name]["data_offsets"][0]
