"""The coverage benchmark's options and its page; what it measures, it measures elsewhere."""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = ("coverage_rows", "coverage_table", "coverage_variants")
    return [importlib.import_module(name) for name in names]


def coverage(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, BENCHMARKS / "coverage.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--config", "{"), "--config is no JSON"),
        (("--config", '{"bias": true}'), "--config needs --only"),
        (("--only", "NoSuchForCausalLM"), "not in scope: NoSuchForCausalLM"),
    ],
)
def test_wrong_options_are_refused_in_words(arguments: tuple[str, ...], said: str) -> None:
    done = coverage(*arguments)
    assert done.returncode == 2 and said in done.stderr


def test_variants_have_a_table_and_leave_the_first_alone(modules, tmp_path: Path) -> None:
    rows, table, variants = modules
    row = rows._Row("FalconForCausalLM", "port").matched("1e-5")
    text = variants.text_of({"multi_query": False, "alibi": None})
    other = replace(row, config=text, matches=False, where="TP=2", reason="differs | by 1")
    store = rows.Store(tmp_path / "rows.jsonl")
    for one in (row, other):
        store.add(one)
    assert set(store.rows()) == {
        ("FalconForCausalLM", "port"),
        (f"FalconForCausalLM {text}", "port"),
    }
    page = table.document({"FalconForCausalLM": "falcon"}, [store.rows()])
    assert "| FalconForCausalLM | ✓ match | 1e-5 | not measured | not measured |" in page
    assert "0 of 1 match" in page
    assert f"| FalconForCausalLM | `{text}` | ✗ | TP=2: differs \\| by 1 |" in page


def test_each_variant_is_of_an_architecture_in_scope_and_there_once(modules) -> None:
    from portkit.architectures import in_scope

    _, _, variants = modules
    named = [(name, variants.text_of(config)) for name, config in variants.VARIANTS]
    assert {name for name, _ in named} <= set(in_scope())
    assert len(set(named)) == len(named)
