"""Random checkpoints: weights that make mistakes show, and no more than float32 can carry."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from portkit.live.client import live_for
from portkit.live.device import find_device


@pytest.mark.parametrize(
    ("architecture", "model_type", "query_to_key"),
    [
        # GPT-Neo's attention has no scale: its queries hold head_dim**-0.5.
        ("GPTNeoForCausalLM", "gpt_neo", 32**-0.5),
        ("OPTForCausalLM", "opt", 1.0),
    ],
)
def test_an_attention_without_a_scale_has_it_in_its_queries(
    architecture: str, model_type: str, query_to_key: float, tmp_path: Path
) -> None:
    done = live_for(None).run(
        "random_checkpoint", architecture=architecture, model_type=model_type, out=str(tmp_path)
    )
    assert done.ok, done.what
    weights = {k: v for f in tmp_path.glob("*.safetensors") for k, v in load_file(f).items()}
    for name, query in weights.items():
        if name.endswith("q_proj.weight"):
            key = weights[name.replace("q_proj", "k_proj")]
            assert query.std() / key.std() == pytest.approx(query_to_key, rel=0.1)


def config_of(architecture: str, model_type: str, out: Path) -> dict:
    """Make a checkpoint and return its config.json."""
    done = live_for(None).run(
        "random_checkpoint", architecture=architecture, model_type=model_type, out=str(out)
    )
    assert done.ok, done.what
    return json.loads((out / "config.json").read_text())


def test_embeddings_for_each_layer_are_made_small_too(tmp_path: Path) -> None:
    done = live_for(None).run(
        "random_checkpoint",
        architecture="Gemma4ForCausalLM",
        model_type="gemma4_text",
        out=str(tmp_path),
    )
    assert done.ok, done.what
    assert done.value["parameters"] < 2_000_000


def test_pairs_are_rotated_where_a_part_of_a_small_head_would_be_odd(tmp_path: Path) -> None:
    config = config_of("MiMoV2FlashForCausalLM", "mimo_v2_flash", tmp_path)
    parts = [rope["partial_rotary_factor"] for rope in config["rope_parameters"].values()]
    assert parts and all(int(config["head_dim"] * part) % 2 == 0 for part in parts)


def test_experts_that_vllm_has_no_kernel_for_are_left_out_on_a_cpu(tmp_path: Path) -> None:
    config = config_of("NemotronHForCausalLM", "nemotron_h", tmp_path)
    on_cpu = find_device()[0] == "cpu"
    assert ("moe" in config["layers_block_type"]) != on_cpu
    assert {"linear_attention", "full_attention", "mlp"} <= set(config["layers_block_type"])


@pytest.mark.parametrize(
    ("architecture", "model_type"),
    [
        ("DbrxForCausalLM", "dbrx"),  # sizes in configs inside, one of which lacks rope_theta
        ("KimiLinearForCausalLM", "kimi_linear"),  # sizes under names that it maps
        ("ZayaForCausalLM", "zaya"),  # two experts per token are refused
        ("LongcatFlashForCausalLM", "longcat_flash"),
        ("CohereCompassForCausalLM", "cohere_compass_text"),  # rope_parameters by type of layer
        ("Gemma3nForCausalLM", "gemma3n_text"),  # layers that share keys and values of earlier ones
    ],
)
def test_unusual_configs_are_made_small(architecture: str, model_type: str, tmp_path: Path) -> None:
    done = live_for(None).run(
        "random_checkpoint", architecture=architecture, model_type=model_type, out=str(tmp_path)
    )
    assert done.ok, done.what
    assert done.value["parameters"] < 3_000_000


def test_weights_as_transformers_makes_them(tmp_path: Path) -> None:
    """Without hard values the heads' size must fit the small width all the same."""
    done = live_for(None).run(
        "random_checkpoint",
        architecture="HeliumForCausalLM",
        model_type="helium",
        out=str(tmp_path),
        hard=False,
    )
    assert done.ok, done.what
