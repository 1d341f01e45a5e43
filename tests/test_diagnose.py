"""adopt and diagnose: a vLLM model file becomes a port; a page says what is wrong and heals it."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from portkit.adopt import adopt, adopted
from portkit.autopilot import to_catch_up
from portkit.checks.base import CheckContext
from portkit.checks.verdict import Verdict
from portkit.cli import app
from portkit.diagnosis.flips import compiles, flips_of
from portkit.diagnosis.order import checks_that_apply, steps_that_apply
from portkit.diagnosis.values import Diagnosis, Trial
from portkit.errors import PortkitError
from portkit.lint.context import original_source
from portkit.live.client import live_for
from portkit.port import Port, open_port
from portkit.report.diagnosis import diagnosis_report

PORT = Path(__file__).parent / "ports" / "helium" / "weights.py"
CONFIG = {"hidden_size": 256, "rope_parameters": {"rope_theta": 1e5}, "rms_norm_eps": 1e-5}


@pytest.fixture
def port(tmp_path: Path) -> Port:
    return adopt(PORT, architecture="HeliumForCausalLM", name="mine", root=tmp_path)


# ---- adopt --------------------------------------------------------------------------------------


def test_a_file_comes_in_as_it_is_and_the_port_is_at_no_step(port):
    assert port.source == PORT.read_text()
    assert adopted(port) and port.steps_passed() == ()
    assert port.git("status", "--porcelain") == ""
    # Catching up would write drafts over the code.
    assert to_catch_up(port, "prove") == ("choose",)
    assert "transformers" in port.meta["source"]["kind"]
    assert "class HeliumAttention" in original_source(port) != port.source
    assert {"forward", "parallel", "weights"} == set(steps_that_apply(port))


def test_relative_imports_point_into_vllm_or_to_the_files_beside(tmp_path):
    source = PORT.read_text()
    file = tmp_path / "mine.py"
    old = "from vllm.model_executor.models.utils import"
    assert old in source
    extra = "from .helper import thing\nfrom . import interfaces\n"
    file.write_text(source.replace(old, f"{extra}from .utils import", 1))
    (tmp_path / "helper.py").write_text("thing = 1\n")
    port = adopt(file, architecture="HeliumForCausalLM", root=tmp_path / "ports")
    assert old in port.source and "from .helper import thing" in port.source
    assert "from vllm.model_executor.models import interfaces" in port.source
    assert (port.modeling.parent / "helper.py").is_file()
    (tmp_path / "helper.py").unlink()
    with pytest.raises(PortkitError, match=r"imports \.helper: neither beside it nor in vLLM"):
        adopt(file, architecture="HeliumForCausalLM", root=tmp_path / "other")


def test_a_class_of_another_name_is_named_or_refused(tmp_path):
    file = tmp_path / "renamed.py"
    file.write_text(PORT.read_text().replace("class HeliumForCausalLM", "class Ours"))
    with pytest.raises(PortkitError, match="defines no class HeliumForCausalLM") as error:
        adopt(file, architecture="helium", root=tmp_path / "ports")
    assert "--class" in error.value.next and "Ours" in error.value.next
    port = adopt(file, architecture="helium", cls="Ours", root=tmp_path / "ports")
    assert "class HeliumForCausalLM(Ours):" in port.source
    assert port.meta["adopted"]["cls"] == "Ours"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.py", "--model", "helium"], "There is no file"),
        ([str(PORT)], "Which architecture"),
        ([str(PORT), "--model", "NoSuchForCausalLM"], "NoSuchForCausalLM"),
        (["vllm.model_executor.models.nothing", "--model", "helium"], "There is no file"),
    ],
)
def test_wrong_usage_is_told_and_leaves_nothing(arguments, message, tmp_path):
    result = CliRunner().invoke(app, ["adopt", *arguments, "--root", str(tmp_path / "ports")])
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert not list(tmp_path.glob("ports/*"))


def test_code_that_does_not_parse_is_refused_with_its_line(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("class A(:\n    pass\n")
    with pytest.raises(PortkitError, match="not valid Python") as error:
        adopt(file, architecture="helium", root=tmp_path / "ports")
    assert "broken.py:1" in error.value.where


# ---- flips --------------------------------------------------------------------------------------

SEEDS = {
    "rotary-layout": ("is_neox_style=False", "is_neox_style=True"),
    "qkv-split": ("q, k, v = qkv", "q, v, k = qkv"),
    "attention-scale": ("self.scaling,", "1.0,"),
    "bias": ("bias=config.attention_bias,", "bias=False,"),
}


@pytest.mark.parametrize("id", SEEDS)
def test_a_flip_undoes_its_bug(id):
    """Each seeded bug has an edit among the flips that gives the same program as before."""
    good, bad = SEEDS[id]
    source = PORT.read_text()
    if good not in source:
        pytest.fail(f"the seed does not apply: {good!r}")
    offers = flips_of(source.replace(good, bad), CONFIG)
    assert [f for f in offers if f.id == id]
    assert all(compiles(f.source) for f in offers)
    line = source[: source.index(good)].count("\n") + 1
    assert any(abs(f.line - line) <= 8 for f in offers if f.id == id)


def test_flips_are_single_edits_of_the_text():
    source = PORT.read_text()
    for offer in flips_of(source, CONFIG):
        lines = difflib.ndiff(source.splitlines(), offer.source.splitlines())
        changed = [line for line in lines if line[0] in "+-"]
        assert 0 < len(changed) <= 12, (offer.id, changed)
        assert offer.cause.endswith(".") and offer.title


def test_a_source_that_does_not_parse_is_a_message():
    with pytest.raises(PortkitError, match="not valid Python"):
        flips_of("def f(:", CONFIG)


# ---- the page -----------------------------------------------------------------------------------


def diagnosis(*, healed: bool) -> Diagnosis:
    failed = Verdict("prefill_parity", "forward", "Prefill agrees", "failed", "3 differ", "m.py:7")
    passed = Verdict("interface", "forward", "The interface", "passed", "all there")
    outcome = "heals" if healed else "does not heal"
    trial = Trial("rotary-layout", "layout", "The layout.", "m.py:9", "-a\n+b", outcome, 1e-5, 2.0)
    return Diagnosis(
        "mine",
        "MineForCausalLM",
        "m.py",
        "",
        (passed, failed),
        failed,
        "certain" if healed else "likely",
        ("The layout. (m.py:9)",),
        2.0,
        (trial,),
        "",
        (),
        9.0,
    )


def test_the_page_says_where_how_sure_why_and_what_heals():
    page = diagnosis_report(diagnosis(healed=True))
    text = str(page)
    for part in ("Wrong first", "m.py:9", "certain", "1. The layout", "heals", "next:", "Right"):
        assert part in text, part
    assert not page.ok and "+b" in page.html()
    assert "None of 1 edit heals" in str(diagnosis_report(diagnosis(healed=False)))


def test_a_diagnosis_is_plain_values():
    found = json.loads(json.dumps(diagnosis(healed=True).to_dict()))
    assert found["healing"]["flip"] == "rotary-layout" and found["ok"] is False


def test_what_applies_depends_on_the_code(port):
    assert {"coverage", "half_precision"} <= {c.id for c in checks_that_apply(port)}
    assert "quantised_run" not in [c.id for c in checks_that_apply(port, quick=True)]


# ---- live ---------------------------------------------------------------------------------------


@pytest.mark.vllm
@pytest.mark.timeout(300)
def test_the_flip_that_heals_a_port_is_found_live(port):
    """Rotary layout: the commonest silent bug. The file of the reader stays as it is."""
    bad = port.source.replace("is_neox_style=False", "is_neox_style=True")
    port.modeling.write_text(bad)
    result = CliRunner().invoke(
        app, ["diagnose", str(port.root), "--quick", "--out", str(port.root / "page.html")]
    )
    assert result.exit_code == 1, result.output
    assert "certain" in result.output and "rotary layout is the other one" in result.output
    assert "✓ heals" in (port.root / "page.html").read_text()
    assert open_port(port.root).source == bad


@pytest.mark.vllm
@pytest.mark.timeout(300)
def test_the_deviation_of_vllms_own_bloom_is_named(tmp_path):
    """Its attention adds no residual inside, as Transformers' does: that is no divergence."""
    port = adopt("vllm.model_executor.models.bloom", architecture="bloom", root=tmp_path)
    check = next(c for c in checks_that_apply(port) if c.id == "prefill_parity")
    try:
        verdict = check().run(CheckContext(port, live_for(port), loader="port"))
    finally:
        live_for(port).close()
    assert verdict.status == "failed" and "mlp.dense_4h_to_h" in verdict.what
    assert verdict.causes[0].startswith(
        "The activation is gelu, the original's is gelu in its tanh form"
    )
