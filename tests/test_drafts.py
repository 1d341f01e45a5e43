"""Drafts of forward, parallel and weights: goldens, idempotence, half-done ports, precise blockers.

`UPDATE_GOLDENS=1 pytest tests/test_drafts.py -k golden` rewrites tests/goldens/.
"""

import ast
import difflib
import os
from pathlib import Path

import pytest
from drafting import STEPS, assert_done, copied, drafted, states

from portkit.create import new_port
from portkit.draft.pipeline import apply_draft, draft_step
from portkit.lint.engine import findings
from portkit.port import Port

GOLDENS = Path(__file__).parent / "goldens"
HELIUM = Path(__file__).parent.parent / "portkit" / "models" / "helium" / "checkpoint"
FAMILIES = (
    "helium", "llama", "mistral", "qwen2", "qwen3", "gemma2", "granite", "olmo2", "glm4", "phi3",
    "smollm3", "starcoder2",
)  # fmt: skip


@pytest.mark.parametrize("model", FAMILIES)
def test_golden(model: str) -> None:
    """The whole text, to read in a review: every state of Helium, the last of the others."""
    found = states(model)
    for step in STEPS if model == "helium" else ("weights",):
        path = GOLDENS / f"{model}_{step}.py"
        if os.environ.get("UPDATE_GOLDENS"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(found[step])
        expected = path.read_text()
        difference = difflib.unified_diff(
            expected.splitlines(), found[step].splitlines(), "golden", "draft", lineterm=""
        )
        assert found[step] == expected, "\n".join(difference)


@pytest.mark.parametrize("model", FAMILIES)
def test_drafts_satisfy_the_rules_and_are_done(model: str) -> None:
    assert_done(model)


@pytest.mark.parametrize("model", FAMILIES)
def test_nothing_of_transformers_machinery_is_left(model: str) -> None:
    final = states(model)["weights"]
    for word in (
        "attention_mask",
        "past_key_values",
        "position_ids",
        "nn.Linear",
        "PreTrainedModel",
        "Dropout",
    ):
        assert word not in final.split("__all__")[0], word
    imports = [n for n in ast.walk(ast.parse(final)) if isinstance(n, ast.ImportFrom)]
    kept = {a.name for n in imports if n.module.startswith("transformers") for a in n.names}
    assert all(name.endswith("Config") for name in kept), kept


# ---- what the drafts take over from the model --------------------------------------------------


@pytest.mark.parametrize(
    ("model", "step", "text"),
    [
        ("helium", "forward", "is_neox_style=False"),
        ("llama", "forward", "is_neox_style=True"),
        ("helium", "parallel", "bias=config.attention_bias"),
        ("helium", "parallel", "bias=config.mlp_bias"),
        ("gemma2", "forward", "logits_soft_cap=self.attn_logit_softcapping"),
        ("gemma2", "forward", "per_layer_sliding_window=self.sliding_window"),
        ("gemma2", "forward", "layer_idx = extract_layer_index(prefix)"),
        ("gemma2", "forward", "GemmaRMSNorm("),
        ("gemma2", "parallel", "soft_cap=config.final_logit_softcapping"),
        ("granite", "parallel", "scale=1 / config.logits_scaling"),
        ("granite", "weights", "hidden_states * self.residual_multiplier"),
        ("granite", "weights", "inputs_embeds * self.embedding_multiplier"),
        ("olmo2", "parallel", "tensor_model_parallel_all_gather"),
        ("smollm3", "weights", "if self.use_rope:"),
        ("phi3", "weights", '"qkv_proj": ["qkv_proj"]'),
        ("starcoder2", "parallel", "ColumnParallelLinear("),
        ("qwen3", "forward", "self.q_norm("),
    ],
)
def test_what_makes_the_model_itself_survives(model: str, step: str, text: str) -> None:
    assert text in states(model)[step]


def test_a_parameter_that_vllm_cannot_serve_becomes_a_note_and_a_warning() -> None:
    architecture, source = copied("gemma2")
    outcome = drafted(source, architecture, "forward")
    assert any("causal only if" in warning for warning in outcome.warnings)
    assert "# PORT:" in outcome.files[0][1]


# ---- what stops a draft ------------------------------------------------------------------------

SEEDS = {
    "mask": (("create_causal_mask", "create_chunked_causal_mask"), ("create_chunked_causal_mask",)),
    "head norm": (
        (
            ".view(hidden_shape).transpose(1, 2)\n        key_states",
            ".view(hidden_shape).flip(1)\n        key_states",
        ),
        (".flip(",),
    ),
    "cache in layer": (
        (
            "hidden_states = self.mlp(hidden_states)",
            "hidden_states = self.mlp(hidden_states) * attention_mask.sum()",
        ),
        ("attention_mask",),
    ),
}


@pytest.mark.parametrize("seed", SEEDS)
def test_forward_stops_with_the_line(seed: str) -> None:
    """Where the draft would have to guess, it fails: what is in the way, and at which line."""
    (old, new), words = SEEDS[seed]
    architecture, source = copied("helium")
    assert old in source
    outcome = drafted(source.replace(old, new), architecture, "forward")
    assert (outcome.status, outcome.files) == ("failed", ())
    for word in words:
        assert word in outcome.reason
    assert "line " in outcome.reason


@pytest.mark.parametrize(
    ("model", "step", "words"),
    [
        ("doge", "forward", ("torch.exp(self.A",)),
    ],
)
def test_known_limits(model: str, step: str, words: tuple[str, ...]) -> None:
    architecture, source = copied(model)
    for earlier in STEPS[: STEPS.index(step)]:
        ((_, source),) = drafted(source, architecture, earlier).files
    outcome = drafted(source, architecture, step)
    assert outcome.status == "failed"
    assert all(word in outcome.reason for word in words)


@pytest.mark.parametrize("part", ["q_proj", "gate_proj"])
def test_projections_that_cannot_be_fused(part: str) -> None:
    architecture, source = copied("helium")
    bias = "attention_bias" if part == "q_proj" else "mlp_bias"
    start = source.index(f"self.{part} = ")
    seeded = source[:start] + source[start:].replace(f"bias=config.{bias}", "bias=True", 1)
    ((_, forward),) = drafted(seeded, architecture, "forward").files
    outcome = drafted(forward, architecture, "parallel")
    assert outcome.status == "failed"
    assert "differ in their bias" in outcome.reason


def test_gate_and_up_by_other_names_keep_their_order() -> None:
    """The shard that the activation reads comes first, whatever the checkpoint calls it."""
    architecture, source = copied("helium")
    for old, new in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        source = source.replace(old, new)
    for step in STEPS:
        ((_, source),) = drafted(source, architecture, step).files
    assert '".w1": (".gate_up_proj", 0)' in source
    assert '".w3": (".gate_up_proj", 1)' in source


def test_an_unknown_feed_forward_is_divided_and_gathered() -> None:
    architecture, source = copied("helium")
    source = source.replace(
        "self.act_fn(self.gate_proj(x)) * self.up", "self.act_fn(self.gate_proj(x)) + self.up"
    )
    ((_, forward),) = drafted(source, architecture, "forward").files
    outcome = drafted(forward, architecture, "parallel")
    assert outcome.status == "success"
    text = outcome.files[0][1]
    assert text.count("gather_output=True") == 3 and "RowParallelLinear" in text
    assert "self.act_fn(self.gate_proj(x)[0]) + self.up_proj(x)[0]" in text


@pytest.mark.parametrize("step", ["parallel", "weights"])
def test_a_step_before_its_turn_says_what_to_do_first(step: str) -> None:
    architecture, source = copied("helium")
    outcome = drafted(source, architecture, step)
    assert outcome.status == "failed"
    assert "first" in outcome.reason


# ---- a reader who did part of it by hand -------------------------------------------------------


def _class(source: str, name: str) -> str:
    node = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == name)
    lines = source.splitlines(keepends=True)
    return "".join(
        lines[min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1 : node.end_lineno]
    )


def _imports(source: str) -> str:
    return "".join(
        f"{ast.unparse(n)}\n"
        for n in ast.parse(source).body
        if isinstance(n, ast.Import | ast.ImportFrom)
    )


@pytest.mark.parametrize(
    ("step", "before", "names"),
    [
        ("forward", "copy", ("HeliumAttention",)),
        ("forward", "copy", ("HeliumAttention", "HeliumMLP", "HeliumDecoderLayer")),
        ("forward", "copy", ("HeliumMLP",)),
        ("parallel", "forward", ("HeliumMLP",)),
        ("parallel", "forward", ("HeliumAttention",)),
        (
            "parallel",
            "forward",
            ("HeliumAttention", "HeliumMLP", "HeliumDecoderLayer", "HeliumModel"),
        ),
    ],
)
def test_classes_done_by_hand_are_kept(step: str, before: str, names: tuple[str, ...]) -> None:
    """The draft leaves the classes that the reader ported, and ports the rest: the same file."""
    found = states("helium")
    mixed = found[before]
    for name in names:
        mixed = mixed.replace(_class(mixed, name), _class(found[step], name))
    header, rest = mixed.split("\nclass ", 1)
    mixed = f"{header}{_imports(found[step])}\nclass {rest}"
    outcome = drafted(mixed, "HeliumForCausalLM", step)
    assert outcome.status == "success", outcome.reason
    assert ast.unparse(ast.parse(outcome.files[0][1])) == ast.unparse(ast.parse(found[step]))


def test_a_half_ported_class_is_named() -> None:
    found = states("helium")
    source = found["copy"].replace(
        "        self.is_causal = True\n",
        "        self.is_causal = True\n        self.attn = Attention(1, 2, 3.0)\n",
    )
    outcome = drafted(source, "HeliumForCausalLM", "forward")
    assert outcome.status == "failed"
    assert "HeliumAttention is half ported" in outcome.reason


# ---- in a port ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Port:
    root = tmp_path_factory.mktemp("ports") / "helium"
    made = new_port("helium", architecture="HeliumForCausalLM", checkpoint=HELIUM, root=root)
    assert apply_draft(made, "copy").status == "success"
    return made


def test_drafting_writes_nothing_and_applying_can_be_undone(port: Port) -> None:
    before = port.source
    outcome = draft_step(port, "forward")
    assert outcome.status == "success"
    assert outcome.did
    assert port.source == before
    assert apply_draft(port, "forward").status == "success"
    assert port.source == dict(outcome.files)[f"{port.package}/{port.modeling.name}"]
    assert findings(port, "forward") == []
    port.undo()
    assert port.source == before


def test_user_code_that_does_not_parse_is_a_failed_outcome(port: Port) -> None:
    before = port.source
    try:
        port.modeling.write_text("class Helium(:\n")
        for step in STEPS:
            outcome = draft_step(port, step)
            assert outcome.status == "failed"
            assert "line 1" in outcome.reason
        port.modeling.write_text("")
        assert "copy first" in draft_step(port, "forward").reason
    finally:
        port.modeling.write_text(before)


def test_a_step_without_a_draft_is_skipped(port: Port) -> None:
    assert draft_step(port, "prove").status == "skipped"
