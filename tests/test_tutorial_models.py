"""The other tutorial models: each checkpoint is what its recipe says, and reads like text.

Helium, which the workbook is taught with, has tests of its own (test_models.py).
"""

from __future__ import annotations

import json
import re
from functools import cache

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from portkit.checks.base import CheckContext
from portkit.checks.runner import checks_of
from portkit.create import new_port
from portkit.draft.pipeline import apply_draft
from portkit.live.client import live_for
from portkit.models import bundled, find
from portkit.models.corpus import pieces
from portkit.models.recipe import load_recipe

# Several tests at a time: threads that wait for each other's cores take ten times as long.
torch.set_num_threads(1)

OTHERS = [name for name in bundled() if name != "helium"]


@cache
def loaded(name: str):
    model, info = AutoModelForCausalLM.from_pretrained(
        find(name).checkpoint, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval(), AutoTokenizer.from_pretrained(find(name).checkpoint)


@cache
def continued(name: str) -> list[tuple[str, list[int], torch.Tensor]]:
    """Per prompt: it, the ids after it, and how far each best logit is above the second."""
    model, tokenizer = loaded(name)
    found = []
    for prompt in find(name).prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_length=300, output_logits=True, return_dict_in_generate=True)
        best = torch.cat(out.logits).topk(2).values
        found.append((prompt, out.sequences[0, ids.shape[1] :].tolist(), best[:, 0] - best[:, 1]))
    return found


def test_there_is_one_of_each_kind() -> None:
    """Learned positions, ALiBi, and a mixture of experts."""
    assert set(OTHERS) >= {"mpt", "opt", "phimoe"}


@pytest.mark.parametrize("name", OTHERS)
def test_the_checkpoint_is_of_its_recipe(name: str) -> None:
    recipe, folder = load_recipe(name), find(name).checkpoint
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [
        recipe.architecture == find(name).architecture and recipe.architecture
    ]
    for field, value in recipe.config.items():
        if not isinstance(value, dict):
            assert config.get(field, value) == value, field
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            found |= {key: shard.name for key in file.keys()}  # noqa: SIM118
    assert found == index
    assert len(set(index.values())) > 1
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3e6


@pytest.mark.parametrize("name", OTHERS)
def test_norms_and_biases_are_not_trivial(name: str) -> None:
    for key, parameter in loaded(name)[0].named_parameters():
        if parameter.ndim == 1:
            assert parameter.std() > 0.03, key


@pytest.mark.parametrize("name", OTHERS)
def test_greedy_continuations_are_legible_with_healthy_margins(name: str) -> None:
    _, tokenizer = loaded(name)
    known = set(re.findall(r"\w+", " ".join(pieces())))
    margins = []
    for prompt, ids, above in continued(name):
        text = prompt + tokenizer.decode(ids, skip_special_tokens=True)
        words = re.findall(r"\w+", text)
        assert ids[-1] == tokenizer.eos_token_id, text
        assert sum(word in known for word in words) / len(words) > 0.95, text
        margins.append(above)
    assert torch.cat(margins).median() > 1.0


@pytest.mark.vllm
def test_wrong_experts_are_found_where_they_are_made(tmp_path) -> None:
    """The two sides compare nothing inside a block of experts; the block's line would mislead."""
    port = new_port("phimoe", architecture="PhimoeForCausalLM", root=tmp_path)
    for step in ("copy", "forward", "parallel", "weights"):
        assert apply_draft(port, step).status == "success"
    right = 'ckpt_names=("w1", "w2", "w3")'
    assert right in port.source
    port.modeling.write_text(port.source.replace(right, 'ckpt_names=("w3", "w2", "w1")'))
    parity = next(check for check in checks_of("forward") if check.id == "prefill_parity")
    verdict = parity().run(CheckContext(port, live_for(port)))
    live_for(port).close()
    assert verdict.status == "failed"
    assert "self.experts = FusedMoEFactory(" in verdict.where
    assert any("ckpt_names" in cause for cause in verdict.causes[:3])
