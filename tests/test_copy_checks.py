"""Checks of step copy: green on the drafted copy, red on each seeded bug.

pytest tests/test_copy_checks.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from portkit.checks.base import CheckContext
from portkit.checks.verdict import Verdict
from portkit.create import new_port
from portkit.live.client import live_for
from portkit.port import Port, write_atomically
from portkit.steps.copy.checks import CHECKS
from portkit.steps.copy.draft import draft

pytestmark = pytest.mark.vllm
BY_ID = {check.id: check for check in CHECKS}


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Port:
    port = new_port("helium", architecture="helium", root=tmp_path_factory.mktemp("ports"))
    outcome = draft(port)
    assert outcome.status == "success", outcome.reason
    port.apply({port.root / path: text for path, text in outcome.files}, "draft copy")
    return port


def judge(port: Port, check: str, source: str | None = None) -> Verdict:
    """Run one check, on another text of the modeling file if one is given."""
    before = port.source
    write_atomically(port.modeling, source or before)
    try:
        return BY_ID[check]().run(CheckContext(port=port, live=live_for(port)))
    finally:
        write_atomically(port.modeling, before)


def broken(port: Port, old: str, new: str) -> str:
    assert old in port.source, "the seed must apply"
    return port.source.replace(old, new)


@pytest.mark.parametrize("check", BY_ID)
def test_the_drafted_copy_passes(port: Port, check: str) -> None:
    verdict = judge(port, check)
    assert verdict.status == "passed", verdict


def test_a_copy_by_hand_is_bit_equal(port: Port) -> None:
    source = (Path(__file__).parent / "ports" / "helium" / "copy.py").read_text()
    verdict = judge(port, "bit_equal", source)
    assert verdict.status == "passed", verdict


def test_a_relative_import_is_named_with_its_line(port: Port) -> None:
    verdict = judge(
        port, "stands_alone", broken(port, "from transformers.activations", "from ...activations")
    )
    assert verdict.status == "failed"
    assert "relative import" in verdict.what
    assert "modeling_helium.py:" in verdict.where


def test_another_models_base_class_is_named(port: Port) -> None:
    source = port.source.replace(
        "class HeliumForCausalLM(",
        "from transformers.models.llama.modeling_llama import LlamaForCausalLM\n\n\nclass "
        "HeliumForCausalLM(LlamaForCausalLM, ",
    )
    verdict = judge(port, "stands_alone", source)
    assert verdict.status == "failed"
    assert "LlamaForCausalLM of transformers.models.llama.modeling_llama" in verdict.what


def test_a_lost_copyright_line_is_quoted(port: Port) -> None:
    lines = [line for line in port.source.splitlines(keepends=True) if "Copyright" not in line]
    verdict = judge(port, "licence", "".join(lines))
    assert verdict.status == "failed"
    assert "Kyutai" in verdict.what


def test_another_sha_in_port_toml_is_refused(port: Port) -> None:
    right = port.meta["source"]["sha256"]
    port.update_meta("source", sha256="0" * 64)
    try:
        verdict = judge(port, "provenance")
    finally:
        port.update_meta("source", sha256=right)
    assert verdict.status == "failed"
    assert right in verdict.what


def test_a_changed_computation_is_not_bit_equal(port: Port) -> None:
    verdict = judge(
        port, "bit_equal", broken(port, "torch.rsqrt(variance", "torch.rsqrt(1e-6 + variance")
    )
    assert verdict.status == "failed"
    assert "HeliumRMSNorm.forward is not the original's" in verdict.what
    assert "torch.rsqrt(1e-6 + variance" in verdict.where
    assert any(row[2] == "NO" for row in verdict.tables[0].rows)


def test_a_broken_cache_is_seen(port: Port) -> None:
    source = broken(
        port,
        "past_key_values.update(key_states, value_states",
        "past_key_values.update(value_states, value_states",
    )
    verdict = judge(port, "bit_equal", source)
    assert verdict.status == "failed"
    rows = {row[0]: row[2] for row in verdict.tables[0].rows}
    assert rows["logits with a cache, in two parts"] == "NO"
    assert rows["logits of a padded batch"] == "yes"
