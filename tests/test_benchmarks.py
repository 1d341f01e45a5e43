"""The budgets' script runs and prints its table. What it measures is shown, never asserted."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from portkit.architectures import in_scope
from portkit.checks.runner import all_checks

ROOT = Path(__file__).resolve().parent.parent
CHEAP = ("import", "findings", "headers")


def budgets(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "benchmarks/budgets.py", "--repeats", "2", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def cheap(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    """One run of what needs no vLLM, written into a README."""
    readme = tmp_path_factory.mktemp("readme") / "README.md"
    readme.write_text("before\n<!-- budgets -->\nold\n<!-- /budgets -->\nafter\n")
    only = [argument for name in CHEAP for argument in ("--only", name)]
    return budgets(*only, "--write", str(readme)), readme


def test_a_table_with_budgets_measurements_and_the_machine(cheap):
    done, _ = cheap
    assert done.returncode in (0, 1), done.stderr  # 1: a budget is broken, on whatever machine
    caption, _, head, rule, *rows = done.stdout.strip().splitlines()
    for part in ("load average at the start", "cores", "torch", "transformers", "Python 3."):
        assert part in caption
    assert head.startswith("| what | budget | measured (median) |") and set(rule) <= set("| -")
    assert len({row.replace("\\|", "").count("|") for row in (head, rule, *rows)}) == 1
    for what in ("`import portkit`", "findings after an edit, forward", "1 TB checkpoint"):
        (row,) = (row for row in rows if what in row)
        assert "within" in row or "over" in row, row


def test_the_table_is_put_between_the_markers(cheap):
    done, readme = cheap
    assert readme.read_text() == (
        f"before\n<!-- budgets -->\n{done.stdout.strip()}\n<!-- /budgets -->\nafter\n"
    )
    assert budgets("--only", "import", "--write", str(readme)).returncode in (0, 1)
    assert readme.read_text().count("1 TB") == 0, "a table is replaced, not mended"


def test_a_file_without_markers_is_left_alone(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("# portkit\n")
    done = budgets("--only", "import", "--write", str(readme))
    assert done.returncode == 2 and "<!-- budgets -->" in done.stderr
    assert readme.read_text() == "# portkit\n"


def test_values_as_json_and_what_must_not_be_imported():
    done = budgets("--only", "import", "--json")
    said = json.loads(done.stdout)
    assert said["machine"]["versions"] and said["machine"]["cores"]
    row = said["rows"][0]
    assert row["what"] == "`import portkit`" and row["budget"] == 0.5 and len(row["values"]) == 2
    assert row["problem"] == "", "torch or vllm came with it"


def test_what_is_said_of_vllms_own_classes_names_checks_and_has_a_reason():
    said = tomllib.loads((ROOT / "benchmarks/native_findings.toml").read_text())
    checks = {check.id for checks in all_checks().values() for check in checks}
    for architecture, entry in said.items():
        assert architecture in in_scope()
        assert set(entry) <= {"kind", "checks", "says", "published", "usual", "on_gpu"}
        assert set(entry.get("checks", ())) <= checks
        if "kind" in entry:
            assert entry["kind"] in ("finding", "not checkable", "false alarm")
            assert len(entry["says"]) > 20 and (entry["kind"] != "finding" or entry["checks"])
