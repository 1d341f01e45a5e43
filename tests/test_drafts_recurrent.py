"""Drafts and facts of models with recurrent layers: read from source, no vLLM."""

import importlib
from functools import cache

import pytest

from portkit.analysis.facts import facts_of
from portkit.architectures import find_architecture
from portkit.draft.outcome import DraftOutcome
from portkit.draft.source_draft import draft_source_outcome
from portkit.draft.transforms import expert_layouts
from portkit.report.model import picture
from portkit.steps.choose.difficulty import difficulties
from portkit.steps.copy.extract import extract
from portkit.steps.copy.places import InTransformers


@cache
def copied(model: str) -> tuple[str, str]:
    """(architecture, source in the copy state) of one of Transformers' models."""
    found = find_architecture(model)
    where = InTransformers(found.module)
    code = extract(found.file.read_text(encoding="utf-8"), found.name, found.file.name, where)
    return found.name, code.code


def drafted(source: str, architecture: str, step: str) -> DraftOutcome:
    module = importlib.import_module(f"portkit.steps.{step}.draft")
    return draft_source_outcome(source, architecture, step, "modeling.py", module.draft_source)


@cache
def weights(model: str) -> str:
    """Source after the last of the three steps that have a draft."""
    architecture, source = copied(model)
    for step in ("forward", "parallel", "weights"):
        outcome = drafted(source, architecture, step)
        assert outcome.status == "success", outcome.reason
        ((_, source),) = outcome.files
    return source


@pytest.mark.parametrize(
    ("model", "kind", "layer", "arguments"),
    [
        ("mamba", "mamba", "MambaMixer", {"use_rms_norm": "False"}),
        ("falcon_mamba", "mamba", "MambaMixer", {"rms_norm_has_weight": "False"}),
        ("jamba", "mamba", "MambaMixer", {"time_step_rank": "config.mamba_dt_rank"}),
        ("mamba2", "mamba2", "MambaMixer2", {"n_groups": "config.n_groups"}),
        ("bamba", "mamba2", "MambaMixer2", {"head_dim": "config.mamba_d_head"}),
        ("lfm2", "short_conv", "ShortConv", {"dim": "config.hidden_size"}),
        (
            "qwen3_next",
            "delta_net",
            "QwenGatedDeltaNetAttention",
            {"gqa_interleaved_layout": "True"},
        ),
        ("olmo_hybrid", "delta_net", "OlmoHybridGatedDeltaNetAttention", {}),
        ("minimax", "linear_attention", "MiniMaxText01LinearAttention", {}),
    ],
)
def test_mixers_are_known_by_what_they_hold(
    model: str, kind: str, layer: str, arguments: dict[str, str]
) -> None:
    architecture, source = copied(model)
    (mixer,) = facts_of(source, architecture).recurrent
    assert (mixer.kind, mixer.layer, mixer.why) == (kind, layer, "")
    assert arguments.items() <= dict(mixer.arguments).items()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("rwkv", "RWKV time mixing: vLLM has no such layer"),
        ("recurrent_gemma", "RG-LRU"),
        ("zamba2", "sharing modules between them"),
        ("hrm_text", "runs stacks of layers (HrmTextStack) in a recurrence of its own"),
        ("zamba", "each of its heads has x_proj"),
        ("xlstm", "xLSTMLayer is matrix-memory LSTM (mLSTM): vLLM has no such layer"),
        ("blt", "BltModel runs several stacks of layers on each other's output"),
    ],
)
def test_what_vllm_has_no_layer_for_is_named_with_its_line(model: str, words: str) -> None:
    architecture, source = copied(model)
    outcome = drafted(source, architecture, "forward")
    assert outcome.status == "failed"
    assert words in outcome.reason and "line " in outcome.reason


@pytest.mark.parametrize(
    ("model", "interface"),
    [("mamba2", "IsAttentionFree"), ("bamba", "IsHybrid"), ("lfm2", "IsHybrid")],
)
def test_the_class_tells_the_engine_about_its_state(model: str, interface: str) -> None:
    text = weights(model)
    assert f"HasInnerState, {interface}" in text
    assert "get_mamba_state_shape_from_config" in text
    assert "create_recurrent_attention_mask" not in text


def test_the_card_and_the_difficulties_name_the_state() -> None:
    architecture, source = copied("bamba")
    facts = facts_of(source, architecture)
    rows = {row.what for row in difficulties(facts, {})}
    assert {"Mamba 2 (state space, heads in groups)", "layers of two kinds"} <= rows
    assert "Mamba 2 (state space, heads in groups)" in picture(facts, {})


def test_what_the_checkpoint_has_fused_takes_adapters() -> None:
    """vLLM gives MambaMixer's in_proj an adapter where the mapping names it, as its own Jamba does.

    MambaMixer2's has more than two parts, for which vLLM has another way.
    """
    assert '"in_proj": ["in_proj"],' in weights("mamba")
    assert "packed_modules_mapping" not in weights("mamba2")


def test_renamed_parameters_and_fused_ones_share_a_mapper() -> None:
    text = weights("bamba")
    assert '".A_log": ".A",' in text
    assert '".q_proj": (".qkv_proj", "q"),' in text
    assert text.count("WeightsMapper(") == 1
    assert "nn.Linear" not in text


def test_an_activation_called_as_a_function_is_fused_with_gate_and_up() -> None:
    text = weights("lfm2")
    assert '".w1": (".gate_up_proj", 0),' in text
    assert 'self.act_fn = get_act_and_mul_fn("silu")' in text


def test_a_norm_over_all_channels_replaces_the_one_over_groups() -> None:
    """MambaMixer2 norms each group of channels; these models norm all channels together."""
    assert "self.mamba.norm = Mixer2RMSNormGated(" in weights("bamba")


def test_a_factor_on_each_channel_of_the_projection_is_divided_among_the_ranks() -> None:
    text = weights("falcon_h1")
    assert "compute_mup_vector(config)" in text
    assert ".chunk(tp_size)[tp_rank]" in text
    assert "mup_vector=self.mup_vector" in text


def test_a_layer_class_for_each_kind_of_layer() -> None:
    architecture, source = copied("jamba")
    layers = facts_of(source, architecture).layers
    assert {(bool(x.attention_attr), bool(x.recurrent_attrs)) for x in layers} == {
        (True, False),
        (False, True),
    }


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("scan_output = self.norm(scan_output, gate)", "scan_output = scan_output * gate", "norm"),
        ("-torch.exp(self.A_log.float())", "-self.A_log.float()", "A is not -exp(A_log)"),
        ("dt_softplus=True", "dt_softplus=False", "softplus"),
        (
            "gate, hidden_states_B_C, dt = projected_states.split(\n"
            "            [self.intermediate_size, self.conv_dim,",
            "hidden_states_B_C, gate, dt = projected_states.split(\n"
            "            [self.conv_dim, self.intermediate_size,",
            "order",
        ),
    ],
)
def test_a_mixer_that_computes_something_else_is_refused(old: str, new: str, words: str) -> None:
    architecture, source = copied("mamba2")
    assert old in source
    outcome = drafted(source.replace(old, new), architecture, "forward")
    assert outcome.status == "failed"
    assert words in outcome.reason


def test_one_class_of_layer_that_holds_either_mixer() -> None:
    """`self.mamba = None`, then the mixer in some layers: forward goes on asking which it is."""
    text = weights("granitemoehybrid")
    assert "self.mamba = None" in text
    assert (
        "if self.mamba is not None:\n            hidden_states = self.mamba(hidden_states)" in text
    )
    assert "get_act_and_mul_fn" in text  # gate and up of the shared expert, taken by their index


def test_the_class_of_a_layer_chosen_in_the_comprehension() -> None:
    architecture, source = copied("olmo_hybrid")
    for step in ("forward", "parallel"):
        outcome = drafted(source, architecture, step)
        assert outcome.status == "success", outcome.reason
        ((_, source),) = outcome.files
    start = source.index("def get_layer(prefix: str)")
    made = source[start : source.index("make_layers(", start)]
    assert 'if config.layer_types[layer_idx] == "linear_attention":' in made
    assert made.count("quant_config=quant_config") == 2


def test_a_convolution_that_the_checkpoint_has_in_parts() -> None:
    text = weights("olmo_hybrid")
    assert '".linear_attn.k_conv1d.": (".linear_attn.conv1d.", 1)' in text
    assert '"in_proj_qkvg": ["q_proj", "k_proj", "v_proj", "g_proj"],' in text
    assert "lambda param, loaded_weight, shard_id=None: load_conv1d(" in text
    assert 'param, loaded_weight, getattr(loaded_weight, "shard_id", shard_id)' in text


def test_a_router_of_a_linear_and_a_method() -> None:
    text = weights("jamba")
    assert "self.router = GateLinear(" in text
    assert "JambaSparseMoeBlockRouter" not in text  # only a step on the way to vLLM's rule
    assert "renormalize=False" in text
    # The layers' classes stand in a table: one call makes them all.
    assert text.count("model_config: ModelConfig | None = None") == 2


def test_one_attribute_for_attention_and_linear_attention() -> None:
    """The class of layer is split: vLLM calls the two otherwise."""
    text = weights("minimax")
    assert 'if config.layer_types[layer_idx] == "linear_attention":' in text
    assert "return MiniMaxLightningAttentionDecoderLayer(" in text
    assert "self.self_attn(hidden_states, mixer_output, positions)" in text
    # What vLLM's layer has of its own: an epsilon, slopes, and states it does not clear.
    assert "self.self_attn.norm.variance_epsilon = 1e-06" in text
    assert "dtype=torch.float32) + 1" in text
    assert "class MiniMaxLightningAttention(MiniMaxText01LinearAttention):" in text
    assert '".self_attn.query_decay": None' in text


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("F.sigmoid(self.output_gate(", "F.silu(self.output_gate(", "sigmoid"),
        ("torch.exp(-self.slope_rate", "torch.exp(-2 * self.slope_rate", "decay"),
        ("3 * self.head_dim)", "self.head_dim * 3)", "lie together"),
    ],
)
def test_another_linear_attention_is_refused(old: str, new: str, words: str) -> None:
    architecture, source = copied("minimax")
    assert old in source
    outcome = drafted(source.replace(old, new), architecture, "forward")
    assert outcome.status == "failed"
    assert words in outcome.reason


def test_layers_of_four_kinds_one_of_them_experts_without_a_gate() -> None:
    text = weights("nemotron_h")
    assert "layer_class = LAYER_TYPES[config.layers_block_type[idx]]" in text
    assert "self.mixer = MambaMixer2(" in text
    assert "activation=activation_without_mul(config.mlp_hidden_act)" in text
    assert 'ckpt_names=("up_proj", "down_proj", None)' in text
    # In a branch: what stands there otherwise returns a tensor, so these do, too.
    assert text.count("return_bias=False") == 2
    assert "nn.Linear" not in text


def test_a_time_step_limited_over_prompts_alone_is_told() -> None:
    architecture, source = copied("nemotron_h")
    outcome = drafted(source, architecture, "forward")
    assert [w for w in outcome.warnings if "limits time steps to at least" in w]
    # Limited in decoding, too, it is what vLLM's layer would get wrong: refused at the start.
    step = "                dt_softplus=True,\n                **kwargs,\n            )\n"
    assert step in source
    limited = source.replace(step, step.replace("**", "dt_limit=self.time_step_limit, **"), 1)
    ((_, text),) = drafted(limited, architecture, "forward").files
    assert "MambaMixer2 does not clamp time steps" in text


def test_experts_without_a_gate_whose_checkpoint_is_stacked_are_refused(monkeypatch) -> None:
    architecture, source = copied("nemotron_h")
    ((_, source),) = drafted(source, architecture, "forward").files
    monkeypatch.setattr(expert_layouts, "conversions_of", lambda _: ())
    outcome = drafted(source, architecture, "parallel")
    assert outcome.status == "failed"
    assert "NemotronHExperts has no gate" in outcome.reason and "line " in outcome.reason
