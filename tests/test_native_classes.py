"""vLLM's own classes, adopted: what is right in them is no finding, and what is wrong is one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from seeds import edit

from portkit.adopt import adopt
from portkit.architectures import in_scope
from portkit.checks.base import CheckContext
from portkit.checks.runner import checks_of, run_checks, run_one
from portkit.errors import PortkitError
from portkit.live.client import live_for
from portkit.live.loads import refused_heads

MODELS = "vllm.model_executor.models"


def verdict(port, step: str, check: str, loader: str = ""):
    with live_for(port):
        if loader:
            (found,) = (c for c in checks_of(step) if c.id == check)
            return run_one(found, port, lambda text: None, loader)
        return {v.check: v for v in run_checks(port, step, only=[check])}[check]


def tiny(file: str, architecture: str, root: Path, **settings):
    """vLLM's class adopted on a small random checkpoint made as asked."""
    out = root / "checkpoint"
    done = live_for(None).run(
        "random_checkpoint",
        architecture=architecture,
        model_type=in_scope()[architecture],
        out=str(out),
        **settings,
    )
    assert done.ok, done.what
    return adopt(f"{MODELS}.{file}", architecture=architecture, checkpoint=out, root=root / "ports")


def at_line(port, where: str) -> str:
    """The text of the line that a verdict names."""
    numbers = [int(n) for n in re.findall(r":(\d+)|line (\d+)", where) for n in n if n]
    return " ".join(port.source.splitlines()[n - 1] for n in numbers)


def test_the_class_is_the_one_that_vllm_registers(tmp_path):
    port = adopt(f"{MODELS}.commandr", architecture="Cohere2ForCausalLM", root=tmp_path)
    assert "class Cohere2ForCausalLM(CohereForCausalLM):" in port.source
    assert port.meta["adopted"]["cls"] == "CohereForCausalLM"


def test_a_package_is_searched_for_the_class(tmp_path):
    """Packages have a file for each platform; one that only one file defines is found."""
    with pytest.raises(PortkitError, match="a package with 2 files that define") as error:
        adopt("vllm.models.hy_v4", architecture="HYV4ForCausalLM", root=tmp_path)
    assert "vllm.models.hy_v4.nvidia.model" in error.value.next
    with pytest.raises(PortkitError, match="a package with no files that define Gemma"):
        adopt("vllm.models.hy_v4", architecture="GemmaForCausalLM", root=tmp_path)
    port = adopt("vllm.models.hy_v4.nvidia", architecture="HYV4ForCausalLM", root=tmp_path)
    assert "from vllm.models.hy_v4.nvidia.moe import" in port.source


@pytest.mark.vllm
def test_an_operator_that_the_file_registers_gets_a_name_of_the_ports_own(tmp_path):
    """vLLM has registered its own by then, and torch takes a name once."""
    port = adopt(f"{MODELS}.deepseek_v2", architecture="DeepseekV3ForCausalLM", root=tmp_path)
    assert 'op_name="min_latency_fused_qkv_a_proj_deepseek_v2"' in port.source
    assert "torch.ops.vllm.min_latency_fused_qkv_a_proj_deepseek_v2(" in port.source
    assert verdict(port, "forward", "interface").status == "passed"


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("file", "architecture"),
    [
        ("phi3", "Phi3ForCausalLM"),  # its constructor is Llama's
        ("zamba2", "Zamba2ForCausalLM"),  # its forward takes **kwargs
    ],
)
def test_what_vllm_calls_may_be_inherited_from_vllm(file, architecture, tmp_path):
    port = adopt(f"{MODELS}.{file}", architecture=architecture, root=tmp_path)
    found = verdict(port, "forward", "interface")
    assert found.status == "passed", found.what


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("file", "architecture"),
    [
        ("nemotron_h", "NemotronHForCausalLM"),  # its convolution is in a ColumnParallelLinear
        ("hrm_text", "HrmTextForCausalLM"),  # a cache for each pass through the same attention
        ("qwen2_moe", "Qwen2MoeForCausalLM"),  # shared_expert_gate has one row
        ("mamba", "MambaForCausalLM"),  # vLLM's MambaMixer can be given none
    ],
)
def test_layers_that_nothing_quantises_need_no_quant_config(file, architecture, tmp_path):
    port = adopt(f"{MODELS}.{file}", architecture=architecture, root=tmp_path)
    found = verdict(port, "parallel", "prefixes")
    assert found.status == "passed", found.what


@pytest.mark.vllm
def test_an_attention_without_quant_config_is_a_finding(tmp_path):
    """Lfm2Moe's, while its convolution, which has another name in Transformers, needs none."""
    port = adopt(f"{MODELS}.lfm2_moe", architecture="Lfm2MoeForCausalLM", root=tmp_path)
    found = verdict(port, "parallel", "prefixes")
    assert "self_attn.attn was given no quant_config" in found.what and "more:" not in found.what
    own = '            prefix=f"{prefix}.attn",'
    assert port.source.count(own) == 1
    port.modeling.write_text(
        port.source.replace(own, f"            quant_config=quant_config,\n{own}")
    )
    assert verdict(port, "parallel", "prefixes").status == "passed"


@pytest.mark.vllm
def test_a_layer_registered_by_name_is_imported_once_in_a_process(tmp_path):
    """The job imports the port to plan the copy, and vLLM once more to run it."""
    port = adopt(f"{MODELS}.nemotron", architecture="NemotronForCausalLM", root=tmp_path)
    assert 'CustomOp.register("nemotron_layer_norm")' in port.source
    with live_for(port) as live:
        job = live.run("quantised", timeout=240.0, loader="port", way="8 bits")
    assert job.ok, job.what


@pytest.mark.vllm
def test_experts_stay_out_of_the_copy_by_the_checkpoints_name(tmp_path):
    """Mixtral's are in block_sparse_moe there, and in mlp in Transformers' model."""
    port = adopt(f"{MODELS}.mixtral", architecture="MixtralForCausalLM", root=tmp_path)
    with live_for(port) as live:
        job = live.run("quantised", timeout=240.0, loader="port", way="8 bits")
    assert job.ok, job.what


@pytest.mark.vllm
def test_a_router_made_of_a_linear_is_not_quantised_and_an_attention_may_name_its_mask(tmp_path):
    """Afmoe's router.gate is an nn.Linear, and its attention hands the mask on by name."""
    published = {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1}
    for options in ("default", "hard"):
        root = tmp_path / options
        port = tiny("afmoe", "AfmoeForCausalLM", root, set=published, options=options)
        if options == "default":
            with live_for(port) as live:
                job = live.run("quantised", timeout=240.0, loader="port", way="8 bits")
            assert job.ok, job.what
        else:  # biases that the class does not have
            found = verdict(port, "forward", "prefill_parity", "port")
            assert "self_attn" in found.what and "The trace stopped" not in found.what


@pytest.mark.vllm
def test_a_router_that_is_no_linear_is_ignored_by_name(tmp_path):
    """vLLM's Qwen3Moe has it in a linear that quant_config reaches, as ignore lists know."""
    port = tiny("qwen3_moe", "Qwen3MoeForCausalLM", tmp_path, options="default")
    with live_for(port) as live:
        job = live.run("quantised", timeout=240.0, loader="port", way="8 bits")
    assert job.ok, job.what
    gates = [row for row in job.value["layers"] if row["path"].endswith("mlp.gate")]
    assert gates and not [row["path"] for row in gates if row["actual"]]


@pytest.mark.vllm
def test_a_model_without_attention_keeps_its_state_in_the_cache(tmp_path):
    port = adopt(f"{MODELS}.mamba2", architecture="Mamba2ForCausalLM", root=tmp_path)
    found = verdict(port, "forward", "starts")
    assert found.status == "passed", found.what


def test_options_stay_at_their_defaults_if_asked(tmp_path: Path) -> None:
    """The sizes are small, the weights hard; what the config class leaves off stays off."""
    configs = {}
    for options in ("hard", "default"):
        done = live_for(None).run(
            "random_checkpoint",
            architecture="FalconForCausalLM",
            model_type="falcon",
            out=str(tmp_path / options),
            options=options,
        )
        assert done.ok, done.what
        configs[options] = json.loads((tmp_path / options / "config.json").read_text())
    hard, usual = configs["hard"], configs["default"]
    assert usual["hidden_size"] == hard["hidden_size"] == 128
    assert usual["layer_norm_epsilon"] == hard["layer_norm_epsilon"] == 0.01
    # Computed from the hidden size unless it is given: vLLM's class knows no other width.
    assert (hard["ffn_hidden_size"], usual["ffn_hidden_size"]) == (192, 512)


def test_options_stay_at_their_defaults_where_layers_rotate_each_their_own_way(
    tmp_path: Path,
) -> None:
    settings = {"architecture": "Gemma3ForCausalLM", "model_type": "gemma3_text"}
    out = tmp_path / "checkpoint"
    done = live_for(None).run("random_checkpoint", **settings, out=str(out), options="default")
    assert done.ok, done.what
    rope = json.loads((out / "config.json").read_text())["rope_parameters"]
    assert {kind: of["rope_theta"] for kind, of in rope.items()} == {
        "full_attention": 1_000_000.0,
        "sliding_attention": 10_000.0,
    }


@pytest.mark.vllm
def test_weights_may_be_cut_when_they_are_loaded(tmp_path):
    """Mamba's mixer asks for the rank in its weight_loaders, not when it is built."""
    port = adopt(f"{MODELS}.mamba", architecture="MambaForCausalLM", root=tmp_path)
    with live_for(port) as live:
        job = live.run("coverage")
    assert job.ok, job.what
    assert [rank["error"] for rank in job.value["ranks"]] == [{}, {}]
    assert not [bad["what"] for bad in job.value["bad"] if bad["duty"]]  # nor is A_log one too many


@pytest.mark.vllm
def test_nobody_has_to_miss_a_buffer(tmp_path):
    """Apertus' activation keeps constants as buffers, which its checkpoints repeat."""
    port = adopt(f"{MODELS}.apertus", architecture="ApertusForCausalLM", root=tmp_path)
    with live_for(port) as live:
        job = live.run("coverage")
    assert job.ok, job.what
    assert not [bad["what"] for bad in job.value["bad"] if bad["duty"]]


@pytest.mark.vllm
def test_fields_that_a_file_beside_reads_are_read(tmp_path):
    port = adopt("vllm.models.hy_v4.nvidia", architecture="HYV4ForCausalLM", root=tmp_path)
    assert "hc_magnitude" not in port.source
    with live_for(port) as live:
        job = live.run("config_fields")
    assert job.ok, job.what
    assert "hc_magnitude" not in {row["name"] for row in job.value["fields"]}


@pytest.mark.vllm
def test_a_class_that_is_compiled_as_a_whole_is_watched_too(tmp_path):
    """Its own __call__ runs no hooks of torch."""
    port = adopt(f"{MODELS}.ernie45", architecture="Ernie4_5ForCausalLM", root=tmp_path)
    assert "@support_torch_compile" in port.source
    found = verdict(port, "forward", "inputs_embeds")
    assert found.status == "passed", found.what


@pytest.mark.vllm
def test_adapters_beside_experts_are_left_to_a_gpu(tmp_path):
    """Without adapters the experts have a kernel on a CPU, in a file that the port imports."""
    port = tiny("granitemoeshared", "GraniteMoeSWAForCausalLM", tmp_path, options="default")
    assert "FusedMoE" not in port.source
    with live_for(port) as live:
        job = live.run("lora", timeout=240.0, loader="port")
    assert job.ok, job.what
    assert "nothing" in job.value


@pytest.mark.vllm
def test_adapters_that_vllms_own_block_cuts_wrongly_for_ranks_are_told_as_that(tmp_path):
    """One group on two ranks: MambaMixer2 repeats it in in_proj, vLLM's adapters do not."""
    one = {"mamba_n_groups": 1}
    port = tiny("falcon_h1", "FalconH1ForCausalLM", tmp_path, options="default", set=one)
    with live_for(port) as live:
        (check,) = (c for c in checks_of("parallel") if c.id == "lora")
        found = check().run(CheckContext(port, live, loader="port"))
    assert found.status == "passed", found.what
    assert "On two ranks those of in_proj go wrong, in any port" in found.what, found.what


@pytest.mark.vllm
def test_a_norm_that_gets_a_row_for_each_head_is_no_divergence(tmp_path):
    """Apertus keeps its activation's parameters in bfloat16: that is where the two sides part."""
    port = adopt(f"{MODELS}.apertus", architecture="ApertusForCausalLM", root=tmp_path)
    found = verdict(port, "forward", "prefill_parity")
    assert found.status == "failed" and "mlp.act_fn" in found.what, found.what


@pytest.mark.vllm
def test_the_longest_context_is_what_vllm_makes_of_the_config(tmp_path):
    """The smallest of several fields: `model_max_length` counts too."""
    port = tiny("llama", "LlamaForCausalLM", tmp_path, set={"model_max_length": 256})
    with live_for(port) as live:
        job = live.run("layout")
    assert job.ok, job.what


@pytest.mark.vllm
def test_a_class_without_supports_lora_may_refuse_adapters_as_it_likes(tmp_path):
    """Mamba 2 asserts that there is no LoRA, before vLLM has said that the class takes none."""
    port = adopt(f"{MODELS}.mamba2", architecture="Mamba2ForCausalLM", root=tmp_path)
    with live_for(port) as live:
        job = live.run("lora", timeout=240.0, loader="port")
    assert job.ok, job.what
    assert "SupportsLoRA" in job.value["nothing"]


@pytest.mark.vllm
def test_a_bare_assertion_is_told_with_its_line(tmp_path):
    """GPT-2's class asserts that an option is off, which the hardened checkpoint switches on."""
    port = adopt(f"{MODELS}.gpt2", architecture="GPT2LMHeadModel", root=tmp_path)
    with live_for(port) as live:
        job = live.run("layout")
    assert "modeling_gpt2.py" in job.what and "assert not config." in job.what


@pytest.mark.vllm
def test_a_constructor_that_refuses_a_tied_head_is_a_limit_in_words(tmp_path):
    port = adopt(f"{MODELS}.dbrx", architecture="DbrxForCausalLM", root=tmp_path)
    with live_for(port) as live:
        job = live.run("coverage")
    assert job.ok, job.what
    assert "tie_word_embeddings is not supported" in refused_heads(job.value["tied"])["tied"]


@pytest.mark.vllm
def test_latent_attention_is_compared_expanded_and_what_follows_is_located(tmp_path):
    """vLLM has no kernel of latents for this size, so VLLM_MLA_DISABLE=1 takes plain attention.

    Its queries and keys have another order than Transformers', its values are filled with zeros:
    neither is where the sides part. The class takes softmax for routers where the config says
    nothing; Transformers' config class writes no scoring_func, and its router takes a sigmoid.
    """
    usual = {"topk_method": "noaux_tc", "kv_lora_rank": 64, "rms_norm_eps": 1e-6}
    port = tiny("deepseek_v2", "DeepseekV3ForCausalLM", tmp_path, options="default", set=usual)
    found = verdict(port, "forward", "prefill_parity")
    if "cpu" in found.device:  # vLLM's rotary kernel for CPUs misreads queries of three dimensions
        assert "[tokens, heads, head_dim]" in found.causes[0], found.causes
        assert "q_pe, k_pe = self.rotary_emb(" in at_line(port, found.where), found.where
    flat = edit(
        "q_pe, k_pe = self.rotary_emb(positions, q_pe, k_pe)\n\n        q[..., self",
        "q_pe, k_pe = self.rotary_emb(\n"
        "            positions, q_pe.flatten(1).contiguous(), k_pe.flatten(1).contiguous()\n"
        "        )\n"
        "        q_pe = q_pe.unflatten(1, (self.num_local_heads, -1))\n"
        "        k_pe = k_pe.unsqueeze(1)\n\n        q[..., self",
    )
    port.modeling.write_text(flat.apply(port.source))
    found = verdict(port, "forward", "prefill_parity")
    assert "First diverging module: the output of model.layers.1.mlp," in found.what, found.what
    sigmoid = edit('getattr(config, "scoring_func", "softmax")', '"sigmoid"')
    port.modeling.write_text(sigmoid.apply(port.source))
    found = verdict(port, "forward", "prefill_parity")
    assert found.status == "passed", found.what
    assert "latents expanded by VLLM_MLA_DISABLE=1" in verdict(port, "forward", "starts").what
    half = verdict(port, "prove", "half_precision")
    assert half.status == "passed", half.what  # in its own dtype vLLM takes latents, of other sizes
