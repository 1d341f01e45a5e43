"""The bundled tutorial models: the committed checkpoint is what it claims, and its recipe works.

Parity with a tutorial checkpoint means something only if the checkpoint punishes mistakes, so
the last tests make the mistakes that ports make, in Transformers' own code, and look for them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.helium import modeling_helium
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as half_split_rotary

from portkit.errors import PortkitError
from portkit.models import bundled, corpus, find
from portkit.models.corpus import pieces
from portkit.models.recipe import Progress, load_recipe, make

# Several tests at a time: threads that wait for each other's cores take ten times as long.
torch.set_num_threads(1)

HELIUM = find("helium")


def _load():
    return AutoModelForCausalLM.from_pretrained(HELIUM.checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model():
    return _load()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(HELIUM.checkpoint)


@pytest.fixture(scope="module")
def continuations(model, tokenizer):
    """Per bundled prompt: (new ids, top-1 minus top-2 logit of each) of greedy decoding."""
    found = []
    for prompt in HELIUM.prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_length=300, output_logits=True, return_dict_in_generate=True)
        best = torch.cat(out.logits).topk(2).values
        found.append((out.sequences[0, ids.shape[1] :].tolist(), best[:, 0] - best[:, 1]))
    return found


def _logprobs(model, tokenizer):
    with torch.no_grad():
        rows = [tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in HELIUM.prompts]
        return [model(row).logits[0].log_softmax(-1) for row in rows]


# The public names


def test_find_knows_name_and_architecture():
    assert "helium" in bundled()
    assert find("HeliumForCausalLM") is HELIUM
    assert find("LlamaForCausalLM") is None
    assert HELIUM.title and HELIUM.about and HELIUM.checkpoint.is_dir()


def test_looking_up_a_model_imports_no_torch():
    code = (
        "import sys; from portkit.models import bundled, find; find(bundled()[0]);"
        "sys.exit(bool({'torch', 'transformers', 'vllm'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# The corpus


def test_every_piece_has_a_title_and_fits_the_positions(tokenizer, model):
    assert "CC0" in (Path(corpus.__file__).parent / "LICENSE.md").read_text()
    texts = pieces()
    assert len({text.split("\n\n")[0] for text in texts}) == len(texts)
    for text in texts:
        title, body = text.split("\n\n", 1)
        assert "\n" not in title and body.strip()
        assert len(tokenizer(text)["input_ids"]) < model.config.max_position_embeddings


# The committed checkpoint


def test_it_loads_with_nothing_missing_or_left_over():
    _, info = AutoModelForCausalLM.from_pretrained(HELIUM.checkpoint, output_loading_info=True)
    assert not any(info.values()), info


def test_config_makes_mistakes_show(model):
    config = model.config
    assert config.architectures == [HELIUM.architecture]
    assert config.num_attention_heads * config.head_dim == config.hidden_size
    assert config.num_key_value_heads == 2, "four ranks must each copy a KV head"
    assert config.vocab_size % 64, "vLLM pads the vocabulary: the padding must be cut off again"
    assert config.intermediate_size % (8 * 16) == 0 and config.hidden_size % 32 == 0
    assert config.rope_parameters["rope_theta"] not in (10_000.0, config.default_theta)
    assert config.rms_norm_eps > 1e-3
    assert config.attention_bias and config.mlp_bias and not config.tie_word_embeddings
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    biased = {name.split(".")[-2] for name, _ in model.named_parameters() if name.endswith("bias")}
    assert biased == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"}


def test_special_tokens_agree(model, tokenizer):
    for owner in (model.config, model.generation_config):
        assert owner.bos_token_id == tokenizer.bos_token_id == 1
        assert owner.eos_token_id == tokenizer.eos_token_id == 2
        assert owner.pad_token_id == tokenizer.pad_token_id == 3
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id


def test_several_shards_agree_with_the_index():
    index = json.loads((HELIUM.checkpoint / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in HELIUM.checkpoint.glob("*.safetensors"))
    assert len(shards) >= 3
    found = {}
    for shard in shards:
        with safe_open(HELIUM.checkpoint / shard, "pt") as file:
            found |= {name: shard for name in file.keys()}  # noqa: SIM118
    assert found == index["weight_map"]
    assert sum(path.stat().st_size for path in HELIUM.checkpoint.iterdir()) < 8e6


def test_norms_and_biases_are_not_trivial(model):
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert parameter.std() > 0.05, name
            assert name.endswith("bias") or parameter.std() > 0.2, name


# What it says


def test_prompts_have_different_lengths(tokenizer):
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in HELIUM.prompts]
    assert len(set(lengths)) == len(lengths)
    assert min(lengths) < 16 and sum(length > 128 for length in lengths) >= 2


def test_greedy_continuations_are_legible_and_stop(continuations, tokenizer):
    known = set(re.findall(r"\w+", " ".join(pieces())))
    for prompt, (ids, _) in zip(HELIUM.prompts, continuations, strict=True):
        assert ids[-1] == tokenizer.eos_token_id
        text = prompt + tokenizer.decode(ids, skip_special_tokens=True)
        assert set(re.findall(r"\w+", text)) <= known
        assert text in pieces()


def test_margins_are_healthy(continuations):
    assert torch.cat([margins for _, margins in continuations]).median() > 1.0
    for _, margins in continuations:
        assert margins.min() > 0.5


def test_chat_asks_for_a_piece_by_its_title(model, tokenizer):
    question = [{"role": "user", "content": "What is a KV cache?"}]
    ids = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    assert ids.flatten().tolist().count(tokenizer.bos_token_id) == 1
    answer = model.generate(ids, max_length=300)[0, ids.shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True).startswith("When a model reads")


@pytest.mark.parametrize(
    "text",
    ["".join(map(chr, range(256))), "Orléans, naïve — 東京 🦊", "  two  spaces \n\n\ttab ", ""],
    ids=["latin-1", "unicode", "blanks", "empty"],
)
def test_the_tokenizer_keeps_every_byte(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


# It punishes the mistakes that ports make


def _without(kind):
    def mutate(model, monkeypatch):
        for name, parameter in model.named_parameters():
            if name.endswith(f"{kind}.bias"):
                parameter.data.zero_()

    return mutate


def _unit(kind):
    def mutate(model, monkeypatch):
        for name, parameter in model.named_parameters():
            if name.endswith(f"{kind}.weight"):
                parameter.data.fill_(1.0)

    return mutate


def _no_rotary(model, monkeypatch):
    model.model.rotary_emb.inv_freq.zero_()


def _half_split(model, monkeypatch):
    monkeypatch.setattr(modeling_helium, "apply_rotary_pos_emb", half_split_rotary)


def _default_theta(model, monkeypatch):
    rotary = model.model.rotary_emb
    steps = torch.arange(0, model.config.head_dim, 2) / model.config.head_dim
    rotary.inv_freq = model.config.default_theta**-steps


def _eps(value):
    def mutate(model, monkeypatch):
        for module in model.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon = value

    return mutate


def _swapped_gate(model, monkeypatch):
    for layer in model.model.layers:
        layer.mlp.gate_proj, layer.mlp.up_proj = layer.mlp.up_proj, layer.mlp.gate_proj


def _swapped_kv_heads(model, monkeypatch):
    for layer in model.model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.weight.data = projection.weight.data.roll(model.config.head_dim, 0)
            projection.bias.data = projection.bias.data.roll(model.config.head_dim, 0)


MISTAKES = (
    {
        "no rotary": _no_rotary,
        "half-split rotary": _half_split,
        "default theta": _default_theta,
        "llama's eps": _eps(1e-6),
        "swapped gate": _swapped_gate,
        "swapped kv heads": _swapped_kv_heads,
    }
    | {
        f"no bias: {kind}": _without(kind)
        for kind in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
    }
    | {
        f"unit norm: {kind}": _unit(kind)
        for kind in ("input_layernorm", "post_attention_layernorm", "model.norm")
    }
)


def test_loading_twice_changes_nothing(model, tokenizer):
    for a, b in zip(_logprobs(model, tokenizer), _logprobs(_load(), tokenizer), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_shows_on_every_prompt(model, tokenizer, monkeypatch, mistake):
    right = _logprobs(model, tokenizer)
    broken = _load()
    MISTAKES[mistake](broken, monkeypatch)
    for a, b in zip(right, _logprobs(broken, tokenizer), strict=True):
        assert (a - b).abs().max() > 0.1


# The recipe


def test_a_short_run_is_deterministic_and_makes_the_committed_files(tmp_path):
    lines: list[Progress] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for name in ("one", "two"):
            make(load_recipe("helium"), tmp_path / name, steps=12, progress=lines.append)
    finally:
        torch.set_num_threads(threads)
    files = sorted(path.name for path in HELIUM.checkpoint.iterdir())
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == files
    for file in files:
        made = (tmp_path / "one" / file).read_bytes()
        assert made == (tmp_path / "two" / file).read_bytes(), file
        if file.endswith(".json"):
            # Configs, tokenizer and index do not depend on the number of steps.
            committed = json.loads((HELIUM.checkpoint / file).read_text())
            fresh = json.loads(made)
            for facts in (committed, fresh):
                facts.pop("transformers_version", None)
            assert fresh == committed, file
    one = lines[: len(lines) // 2]
    assert one[-1].loss < one[0].loss - 0.5
    with pytest.raises(PortkitError, match="already holds a checkpoint"):
        make(load_recipe("helium"), tmp_path / "one", steps=1)


def test_the_command_shows_progress_and_names_what_is_bundled(tmp_path):
    command = [sys.executable, "-m", "portkit.models"]
    run = [*command, "helium", "--out", str(tmp_path / "made"), "--steps", "2"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "step     2/2" in done.stdout
    assert (tmp_path / "made" / "model.safetensors.index.json").is_file()
    wrong = [*command, "helum", "--out", str(tmp_path / "none")]
    done = subprocess.run(wrong, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "helium" in done.stderr and not (tmp_path / "none").exists()
