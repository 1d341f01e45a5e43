"""Tensors that Transformers ignores in a checkpoint: read from the source, drafted, and checked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from drafting import copied, drafted, states
from safetensors.torch import save_file
from seeds import words

from portkit.analysis.classes import view_module
from portkit.analysis.ignored import POSITIONS, Ignored, Translated, ignored_patterns, translate
from portkit.architectures import in_scope
from portkit.checks.base import Check, CheckContext
from portkit.checks.runner import checks_of
from portkit.checks.verdict import Verdict
from portkit.create import new_port
from portkit.draft.pipeline import apply_draft
from portkit.live.checkpoint import INDEX
from portkit.live.client import live_for
from portkit.port import Port

ATTRIBUTES = {"model", "layers", "attn", "c_attn", "weight", "bias", "shared"}
TRANSLATED = {
    # nothing of the port is called so: dropped by name
    "^mtp.*": Translated(prefix=("mtp",)),
    "mtp.*": Translated(substr=("mtp",)),
    r"^model\.mtp\.": Translated(prefix=("model.mtp.",)),
    "attn.masked_bias": Translated(substr=("attn.masked_bias",)),
    r"(^|\.)mtp\..*": Translated(regex=(r"(^|\.)mtp\..*",)),
    r"layers\.\d+\.shared_head\.": Translated(regex=(r"layers\.\d+\.shared_head\.",)),
    POSITIONS: Translated(regex=(POSITIONS,)),
    # a layer that another checkpoint of this model may have
    r"model\.layers\.61.*": Translated(unexpected=("model.layers.61",)),
    r"layers\.45\.": Translated(unexpected=("model.layers.45.",)),
    r"(^|\.)layers\.45\.": Translated(unexpected=("model.layers.45.",)),
    # c_attn.bias matches too, and has its place; vLLM ignores a bias without one
    "attn.bias": Translated(),
    # another model's layers, a name that the port has
    r"vision\.layers\.3\.": Translated(substr=("vision.layers.3.",)),
    r"shared\.layers\.3\.": Translated(left=(Ignored(r"shared\.layers\.3\.", "", 0),)),
    "weight": Translated(left=(Ignored("weight", "", 0),)),
}


@pytest.mark.parametrize("pattern", TRANSLATED)
def test_a_pattern_becomes_what_vllm_has_for_it(pattern: str) -> None:
    found = translate((Ignored(pattern, "", 0),), ATTRIBUTES, "model.layers")
    assert found == TRANSLATED[pattern]


def test_patterns_are_read_wherever_a_class_says_them() -> None:
    source = """
NAMES = ["from_a_constant"]
class A:
    _keys_to_ignore_on_load_unexpected = ["one", r"two\\."]
class B(A):
    _keys_to_ignore_on_load_unexpected = NAMES
class C:
    _keys_to_ignore_on_load_unexpected = None
class D:
    def __init__(self):
        self._keys_to_ignore_on_load_unexpected = []
        self._keys_to_ignore_on_load_unexpected.extend(computed())
        self.register_buffer("position_ids", None, persistent=False)
"""
    found = ignored_patterns(view_module(source))
    assert [(i.pattern, i.cls) for i in found] == [
        ("one", "A"),
        ("two\\.", "A"),
        ("from_a_constant", "B"),
        ("", "D"),
        (POSITIONS, "D"),
    ]
    assert found[3].line == 12


WRITTEN = [
    ("glm4_moe", "forward", '"model.layers.92",\n        "model.layers.46",'),
    ("glm4_moe", "weights", "ignore_unexpected_prefixes=self.ignore_unexpected_prefixes"),
    ("ernie4_5_moe", "weights", '"mtp": None,\n            # name in the checkpoint: name in'),
    ("gpt_neox", "weights", '"attention.masked_bias": None,'),
    ("openai-gpt", "weights", r're.compile(r"(^|\.)position_ids$"): None,'),
]


@pytest.mark.parametrize(("model", "step", "text"), WRITTEN)
def test_a_draft_leaves_out_what_transformers_leaves_out(model: str, step: str, text: str) -> None:
    assert text in states(model)[step]


def test_what_cannot_be_translated_is_said() -> None:
    architecture, source = copied("gpt_neox")
    outcome = drafted(source.replace('r"attention.bias"', 'r"dense"'), architecture, "forward")
    assert outcome.status == "success"
    assert any("match r'dense'" in w and "GPTNeoX" in w for w in outcome.warnings)


EXTRA = {
    "model.layers.46.mlp.experts.0.gate_proj.weight": (96, 128),
    "model.layers.46.self_attn.q_proj.weight": (128, 128),
    "model.layers.46.eh_proj.weight": (128, 256),
}
"""A published GLM-4.5-Air has these beside its 46 layers."""


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Port]:
    root = tmp_path_factory.mktemp("ports")
    checkpoint = root / "checkpoint"
    name = "Glm4MoeForCausalLM"
    made = live_for(None).run(
        "random_checkpoint", architecture=name, model_type=in_scope()[name], out=str(checkpoint)
    )
    assert made.ok, made.what
    add(checkpoint, EXTRA)
    port = new_port("glm", checkpoint=checkpoint, root=root)
    yield port
    live_for(port).close()


def add(checkpoint: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    values = {name: torch.ones(shape) for name, shape in tensors.items()}
    save_file(values, checkpoint / "extra.safetensors", metadata={"format": "pt"})
    index = json.loads((checkpoint / INDEX).read_text())
    index["weight_map"] |= dict.fromkeys(tensors, "extra.safetensors")
    (checkpoint / INDEX).write_text(json.dumps(index))


def run(port: Port, step: str, check: str) -> Verdict:
    cls: type[Check] = next(c for c in checks_of(step) if c.id == check)
    return cls().run(CheckContext(port, live_for(port)))


@pytest.mark.vllm
@pytest.mark.timeout(300)
def test_a_checkpoint_with_more_than_the_model_loads_and_its_verdicts_say_so(port: Port) -> None:
    said = "3 more went nowhere, as in Transformers, which ignores them: model.layers.46."
    for step in ("copy", "forward"):
        assert apply_draft(port, step).status == "success"
    verdict = run(port, "forward", "starts")
    assert verdict.ok and said in verdict.what, words(verdict)
    for step in ("parallel", "weights"):
        assert apply_draft(port, step).status == "success"
    verdict = run(port, "weights", "coverage")
    assert verdict.ok and said in verdict.what, words(verdict)
    for check in ("poisoned_load", "load_parity", "bad_checkpoints"):
        verdict = run(port, "weights", check)
        assert verdict.ok, words(verdict)

    drafted = port.source
    given = "self, ignore_unexpected_prefixes=self.ignore_unexpected_prefixes"
    assert given in drafted
    port.modeling.write_text(drafted.replace(given, "self"))  # broken on purpose
    verdict = run(port, "weights", "coverage")
    assert verdict.status == "failed"
    for word in ("load_weights stopped at model.layers.46", "Transformers ignores model.layers.46"):
        assert word in words(verdict)


@pytest.mark.vllm
def test_what_the_model_has_is_not_ignored(tmp_path: Path) -> None:
    """GPT-2's pattern `attn.bias` is for a mask; it matches c_attn.bias too."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from portkit.live.checkpoint import Checkpoint
    from portkit.live.ignored import ignored_by

    GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9).save_pretrained(tmp_path)
    names = {
        "transformer.h.0.attn.bias": True,
        "h.0.attn.bias": True,
        "transformer.h.0.attn.c_attn.bias": False,
        "h.0.attn.c_attn.bias": False,
        "transformer.h.0.attn.other": False,
    }
    ignored = ignored_by(GPT2LMHeadModel, Checkpoint(tmp_path, {}, ()), names)
    assert ignored == tuple(name for name, is_it in names.items() if is_it)
