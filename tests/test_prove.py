"""Step prove: the port as users run it, what only that shows, and the report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from seeds import Bench, Edit, edit, words

from portkit.checks import results
from portkit.checks.base import Check, CheckContext
from portkit.checks.runner import all_checks
from portkit.checks.verdict import Table, Verdict
from portkit.create import new_port
from portkit.draft.pipeline import apply_draft
from portkit.hints import find, for_failure
from portkit.live.client import live_for
from portkit.live.device import find_device
from portkit.port import Port
from portkit.steps.prove.checks import AsUsersRunIt, ReportWritten, TensorParallel
from portkit.steps.prove.gather import LIMITS
from portkit.steps.prove.half_precision import HalfPrecision
from portkit.steps.prove.judging import judge

# ---- the engine as users run it -----------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    port = new_port(
        "helium", architecture="HeliumForCausalLM", root=tmp_path_factory.mktemp("ports")
    )
    yield Bench(port, "weights")
    live_for(port).close()


def run(bench: Bench, check: type[Check], seed: Edit | None = None) -> Verdict:
    bench.write(seed)
    return check().run(CheckContext(bench.port, live_for(bench.port)))


@pytest.mark.vllm
def test_a_finished_port_passes_compiled_cached_and_in_half_precision(bench):
    verdict = run(bench, AsUsersRunIt)
    assert verdict.status == "passed", words(verdict)
    assert "HeliumModel compiled" in verdict.what
    assert [table.title.split(",")[0] for table in verdict.tables] == ["float32", "bfloat16"]
    exact, half = (table.rows for table in verdict.tables)
    assert len(exact) == len(half) > 5
    assert max(float(row[3]) for row in exact) < 1e-3 < max(float(row[3]) for row in half)


@pytest.mark.vllm
def test_two_ranks_pass_and_an_unreduced_sum_is_seen(bench):
    assert run(bench, TensorParallel).status == "passed"
    # o_proj leaves each rank its own part of the sum.
    seed = edit(
        "            bias=False,\n            quant_config",
        "            bias=False,\n            reduce_results=False,\n            quant_config",
    )
    verdict = run(bench, TensorParallel, seed)
    assert verdict.status == "failed"
    assert "One rank is right" in words(verdict) and "portkit check parallel" in verdict.next
    assert verdict.tables and "Matched tokens" in verdict.log


FIRST = "            residual = None\n        else:\n"
"""Where HeliumModel.forward has the embeddings."""
INIT = "        self.config = config\n        if get_pp"


@pytest.mark.vllm
def test_a_model_that_is_not_compiled_is_named_as_that(bench):
    verdict = run(bench, AsUsersRunIt, edit("@support_torch_compile\n", ""))
    assert verdict.status == "failed"
    assert "did not compile" in verdict.what and "@support_torch_compile" in verdict.next
    assert "class HeliumModel" in verdict.where
    assert "Not compiled" in for_failure(verdict).pointer


@pytest.mark.vllm
def test_a_branch_that_tracing_fixes_is_seen_only_compiled(bench):
    # Never taken by these prompts; but vLLM traces forward with as many tokens as a step may hold.
    seed = edit(
        FIRST,
        "            residual = None\n"
        "            if positions.shape[0] > 1024:\n"
        "                hidden_states = hidden_states * 1.05\n"
        "        else:\n",
    )
    verdict = run(bench, AsUsersRunIt, seed)
    assert verdict.status == "failed" and "Δ log p" in verdict.what
    assert "Eager passes and compiled does not" in verdict.causes[0]
    assert verdict.where.endswith("if positions.shape[0] > 1024:")
    assert "vLLM traces forward once" in for_failure(verdict).pointer
    assert "__init__" in verdict.next


@pytest.mark.vllm
def test_state_kept_between_calls_shows_when_a_prompt_is_asked_again(bench):
    seed = edit(
        INIT,
        INIT.replace("config\n", "config\n        self.seen = 0\n", 1),
        FIRST,
        "            residual = None\n"
        "            self.seen += int((positions == 199).any())\n"
        "            if self.seen > 1:\n"
        "                hidden_states = hidden_states * 1.05\n"
        "        else:\n",
    )
    verdict = run(bench, TensorParallel, seed)
    assert verdict.status == "failed" and "Asked again" in verdict.what
    assert verdict.where.endswith("if self.seen > 1:")
    assert "keeps state between calls" in words(verdict)


@pytest.mark.vllm
def test_rotary_angles_in_half_precision_are_seen(bench):
    """Harmless in float32. Run eagerly, since a compiled kernel keeps the angles in float32."""
    bench.write(
        edit(
            "        self.attn = Attention(\n",
            "        half = torch.arange(0, self.head_dim, 2) / self.head_dim\n"
            "        self.inv_freq = config.rope_parameters['rope_theta'] ** -half\n"
            "        self.attn = Attention(\n",
            "        q, k = self.rotary_emb(positions, q, k)\n",
            "        turns = positions[:, None].to(q.dtype) * self.inv_freq.to(q.dtype)\n"
            "        angle = turns[:, None]\n"
            "        c, s = angle.cos(), angle.sin()\n"
            "        def turned(x):\n"
            "            a, b = x.unflatten(-1, (-1, self.head_dim // 2, 2)).unbind(-1)\n"
            "            return torch.stack((a * c - b * s, b * c + a * s), -1).flatten(1)\n"
            "        q, k = turned(q), turned(k)\n",
        )
    )
    found = {}
    for dtype in ("float32", "auto"):
        context = CheckContext(bench.port, live_for(bench.port))
        job = AsUsersRunIt().live(context, tensor_parallel_size=1, eager=True, dtype=dtype)
        assert job.ok, job.what
        found[dtype] = judge(job.value)
    assert found["float32"].problem == ""
    assert "times as far from float32" in found["auto"].problem
    assert "rotary" in found["auto"].cause


ROTARY = (
    "class HeliumMLP(nn.Module):",
    """class Rotary(nn.Module):
    def __init__(self, dim, base):
        super().__init__()
        self.dim = dim
        self.inv_freq = 1.0 / base ** (torch.arange(0, dim, 2) / dim)

    def forward(self, positions, q, k):
        angle = (positions[:, None].float() * self.inv_freq.float())[:, None]
        c, s = angle.cos(), angle.sin()

        def turned(x):
            a, b = x.float().unflatten(-1, (-1, self.dim // 2, 2)).unbind(-1)
            return torch.stack((a * c - b * s, b * c + a * s), -1).flatten(1).to(x.dtype)

        return turned(q), turned(k)


class HeliumMLP(nn.Module):""",
    """get_rope(
            self.head_dim,
            max_position=config.max_position_embeddings,
            rope_parameters=config.rope_parameters,
            is_neox_style=False,
        )""",
    'Rotary(self.head_dim, config.rope_parameters["rope_theta"])',
)
"""By hand, in float32 as far as the eye can see; but vLLM builds it under the model's dtype."""


@pytest.mark.vllm
def test_frequencies_built_in_the_models_dtype_are_found_by_layer(bench):
    """The whole model keeps vLLM's rule and the bound: prompts of 200 tokens hardly show it."""
    verdict = run(bench, HalfPrecision, edit(*ROTARY))
    assert verdict.status == "failed", words(verdict)
    assert "queries of model.layers.0.self_attn" in verdict.what
    assert "self.rotary_emb = Rotary(" in verdict.where
    assert "rotary" in verdict.causes[0] and "torch.arange(n) / n" in verdict.causes[1]
    assert "default dtype" in for_failure(verdict).pointer


@pytest.mark.vllm
def test_the_same_rotary_embedding_built_in_float32_is_within_the_budget(bench):
    right = tuple(
        text.replace("torch.arange(0, dim, 2)", "torch.arange(0, dim, 2).float()")
        for text in ROTARY
    )
    verdict = run(bench, HalfPrecision, edit(*right))
    assert verdict.status == "passed", words(verdict)
    table = verdict.tables[0]
    assert [row[0] for row in table.rows] == [f"model.layers.{i}" for i in range(3)]
    assert all(0 < float(row[1]) < 0.02 > float(row[2]) > 0 for row in table.rows)


@pytest.mark.vllm
def test_digits_lost_to_a_large_summand_are_named_by_both_checks(bench):
    seed = edit(
        "        output, _ = self.o_proj(attn_output)\n",
        "        large = torch.full_like(attn_output, 8.0)\n"
        "        output, _ = self.o_proj(attn_output + large)\n"
        "        output = output - self.o_proj(large)[0]\n",
    )
    layer = run(bench, HalfPrecision, seed)
    assert layer.status == "failed" and "model.layers.0.self_attn" in layer.what
    whole = run(bench, AsUsersRunIt, seed)
    assert whole.status == "failed" and "times as far from float32" in whole.what
    assert (whole.where, whole.next) == (layer.where, layer.what)
    assert "modeling_helium.py:" in whole.where


@pytest.mark.vllm
def test_a_port_that_is_wrong_in_float32_leaves_nothing_to_compare(bench):
    seed = edit(
        "hidden_states = self.embed_input_ids(input_ids)",
        "hidden_states = self.embed_input_ids(input_ids) * 1.5",
    )
    verdict = run(bench, HalfPrecision, seed)
    assert verdict.status == "skipped" and "portkit check weights" in verdict.what


@pytest.mark.vllm
@pytest.mark.skipif(find_device()[0] != "cpu", reason="a GPU has the kernel")
def test_half_precision_that_this_build_of_vllm_has_no_kernel_for_is_skipped(tmp_path):
    """vLLM's CPU build runs Mamba's mixer in float32 only: no mistake of the port."""
    port = new_port("tiny", architecture="MambaForCausalLM", root=tmp_path)
    for step in ("copy", "forward", "parallel", "weights"):
        assert apply_draft(port, step).status == "success"
    with live_for(port) as live:
        verdict = HalfPrecision().run(CheckContext(port, live))
    assert verdict.status == "skipped", words(verdict)
    assert "MambaMixer in float32 only" in verdict.what and "on a GPU" in verdict.what


# ---- how a run is judged ------------------------------------------------------------------------

ROW = {
    "prompt": 200,
    "tokens": 24,
    "first_mismatch": None,
    "max": 2e-5,
    "mean": 1e-6,
    "again": 0.0,
    "again_equal": True,
    "floor_mean": 0.0,
    "asked": 24,
}
RUN = {
    "dtype": "float32",
    "compiled": ["HeliumModel"],
    "mode": "VLLM_COMPILE",
    "cudagraphs": "NONE",
    "routed": False,
    "kept": True,
    "scheduled": [709, 581],
    "rule": {"ok": True, "text": ""},
    "rows": [ROW],
}


def value(row: dict | None = None, **changes) -> dict:
    return {**RUN, **changes, "rows": [{**ROW, **(row or {})}]}


def test_a_right_run_has_no_problem():
    assert judge(RUN).problem == ""


def test_where_transformers_itself_breaks_the_rule_is_told():
    found = judge(value({"asked": 14}, dtype="bfloat16"))
    assert "Transformers itself breaks vLLM's rule at token 14" in found.table.note
    assert "itself breaks" not in judge(RUN).table.note


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            value(
                {"first_mismatch": 3},
                rule={"ok": False, "text": "Test0:\nMatched tokens: [1]"},
            ),
            "fails at token 3 after a prompt of 200 tokens",
        ),
        (value({"max": 2e-3}), "2.0e-03 on a prompt of 200"),
        (value({"mean": 0.3, "floor_mean": 0.1}, dtype="bfloat16"), "3.0 times as far"),
        (value({"again_equal": False}), "gets other tokens"),
        (value({"again": 0.01}), "differ by 1.0e-02"),
        (value(scheduled=[709, 709]), "no cached token was used"),
    ],
)
def test_each_way_to_be_wrong_is_said(wrong, said):
    assert said in judge(wrong).problem


@pytest.mark.parametrize(
    ("wrong", "pointer"),
    [
        (value({"mean": 0.3, "floor_mean": 0.1}, dtype="bfloat16"), "original: norms"),
        (value({"again_equal": False}), "A cached block"),
        (value({"again": 0.01}), "A cached block"),
    ],
)
def test_the_hint_fits_what_is_wrong(wrong, pointer):
    found = judge(wrong)
    verdict = AsUsersRunIt().failed(found.problem, causes=(found.cause,))
    assert pointer in for_failure(verdict).pointer


@pytest.mark.parametrize(
    ("symptom", "key"),
    [
        ("Cannot re-initialize CUDA in forked subprocess", "no_cuda_on_import"),
        ("it works in the notebook but nowhere else", "fresh_process"),
        ("git apply refuses the patch", "patch_applies"),
        ("test_hf_registry_coverage fails", "registry_tests"),
        ("slower than the Transformers backend", "speed"),
        ("answer does not stop", "serves"),
    ],
)
def test_hints_are_found_by_symptom(symptom, key):
    assert find(symptom)[0].key == key


# ---- the report ---------------------------------------------------------------------------------


class Page(HTMLParser):
    """The text of a page; fails on tags that are not balanced."""

    VOID = ("meta", "br", "hr", "img")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.pieces: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.pieces.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.pieces).split())


@pytest.fixture
def port(tmp_path) -> Port:
    port = new_port("helium", architecture="HeliumForCausalLM", root=tmp_path)
    assert apply_draft(port, "copy").status == "success"  # writes source and licence down
    return port


def a_verdict(check: type[Check], status="passed") -> Verdict:
    return Verdict(
        check.id,
        check.step,
        check.title,
        status,
        f"found by {check.id}: a | b & <c>",
        tables=(Table(f"numbers of {check.id}", ("x", "y"), ((1, 0.25),)),),
        device="cpu",
        device_reason="no GPU here",
        seconds=1.5,
    )


def everything() -> list[type[Check]]:
    return [c for checks in all_checks().values() for c in checks if c is not ReportWritten]


def the_report(port: Port) -> tuple[Verdict, str, str]:
    """Run the check; return its verdict, the page's text and the Markdown."""
    verdict = ReportWritten().run(CheckContext(port, live_for(port)))
    folder = port.root / "report"
    html = (folder / "helium.html").read_text()
    assert html.startswith("<!doctype html>")
    return verdict, Page(html).text, (folder / "helium.md").read_text()


def test_the_report_says_what_every_check_found_and_on_what(port):
    for check in everything():
        results.save(port, a_verdict(check))
    verdict, page, markdown = the_report(port)
    assert verdict.status == "passed" and "not run" not in verdict.what
    for check in everything():
        assert f"found by {check.id}: a | b & <c>" in page
        assert f"numbers of {check.id}" in page
        assert f"found by {check.id}: a \\| b & \\<c>" in markdown
    for form in (page, markdown):
        for fact in ("Apache-2.0", "no GPU here", *results.versions().values(), *LIMITS):
            assert fact in form, fact
        assert str(port.meta["source"]["version"]) in form
        assert f"{len(everything())} passed, 0 failed, 0 skipped, 0 never run" in form
        assert "Never run:" not in form and "earlier state of" not in form


def test_the_report_does_not_say_where_the_port_lies(port):
    said = replace(a_verdict(AsUsersRunIt), what=f"pip install -e {port.root}")
    results.save(port, said)
    for form in the_report(port)[1:]:
        assert str(port.root) not in form and "pip install -e helium" in form


def test_the_report_says_what_was_never_run(port):
    for check in everything():
        if check.id not in ("serves", "speed"):
            results.save(port, a_verdict(check))
    verdict, page, markdown = the_report(port)
    assert verdict.status == "passed" and "serves, speed" in verdict.what
    for form in (page, markdown):
        assert "Never run: serves, speed" in form


def stale_in(form: str) -> set[str]:
    _, found, rest = form.partition("Of an earlier state of the port:")
    return {name.strip() for name in rest.partition(".")[0].split(",")} if found else set()


def test_the_report_says_which_verdicts_are_of_an_earlier_state(port):
    for check in everything():
        results.save(port, a_verdict(check))
    port.modeling.write_text("# the model, edited\n")
    results.save(port, a_verdict(AsUsersRunIt))
    verdict, page, markdown = the_report(port)
    assert verdict.status == "passed" and "coverage" in verdict.what
    assert stale_in(page) == stale_in(markdown) >= {"coverage", "patch_applies", "fresh_process"}
    assert "as_users_run_it" not in stale_in(page)
    # A step that is behind judged the port as it then was.
    assert not {c.id for c in all_checks()["forward"]} & stale_in(page)


def test_writing_the_plugin_makes_only_verdicts_of_the_plugin_old(port):
    for check in everything():
        results.save(port, a_verdict(check))
    port.init_file.write_text("def register():\n    pass\n")
    _, page, _ = the_report(port)
    later = {c.id for step in ("out_of_tree", "prove") for c in all_checks()[step]}
    assert stale_in(page) == later - {"report"}


def test_a_failure_fails_the_report_which_is_written_all_the_same(port):
    for check in everything():
        results.save(port, a_verdict(check))
    broken = replace(
        a_verdict(TensorParallel, "failed"), causes=("not reduced",), next="look there"
    )
    results.save(port, broken)
    verdict, page, markdown = the_report(port)
    assert verdict.status == "failed" and "tensor_parallel" in verdict.what
    for form in (page, markdown):
        assert f"{len(everything()) - 1} passed, 1 failed" in form
        # What failed stands before what passed.
        assert form.index("tensor_parallel") < form.index("as_users_run_it")
