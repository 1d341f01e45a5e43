"""The notebooks: their grammar; by autopilot they pass; without it their checks fail and say why.

nbmake runs them as CI does: `pytest --nbmake notebooks/` with PORTKIT_AUTOPILOT=1.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import nbformat
import pytest

from portkit.checks.runner import checks_of
from portkit.clinic import Examination
from portkit.create import new_port
from portkit.curriculum import Beside, Step, beside, steps
from portkit.hints import hints_of
from portkit.models import bundled
from portkit.notebook import Session

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
STEPS = steps()
BY_ID = pytest.mark.parametrize("step", STEPS, ids=lambda s: s.id)
SECTIONS = ("Look", "Edit", "Tasks", "Check", "Help", "Recap")


def cells(step: Step | Beside, kind: str) -> list[str]:
    book = nbformat.read(NOTEBOOKS / step.notebook, as_version=4)
    return [cell.source for cell in book.cells if cell.cell_type == kind]


# ---- grammar ------------------------------------------------------------------------------------


def test_each_step_has_its_notebook_and_there_is_no_other():
    known = {s.notebook for s in STEPS} | {b.notebook for b in beside()}
    assert {p.name for p in NOTEBOOKS.glob("*.ipynb")} == known


@BY_ID
def test_it_begins_with_title_goal_time_and_guide(step):
    first = cells(step, "markdown")[0]
    assert first.startswith(f"# {step.number}. ")
    for part in ("**Goal:**", "**Time:**", "**Guide:**", f"about {step.minutes} minutes"):
        assert part in first
    assert "https://docs.vllm.ai/en/v0.32.0/contributing/model/" in first


@BY_ID
def test_it_names_the_guides_section(step):
    prose = "\n".join(cells(step, "markdown")).lower().replace("-", " ")
    section = step.guide.lower().replace("-", " ")
    for part in re.split(r"[:;(]", section):
        words = re.sub(r"[0-9.)]|optional|contributing/model/tests", "", part).strip()
        assert words in prose, words


@BY_ID
def test_its_sections_come_in_order(step):
    headings = [
        line for c in cells(step, "markdown") for line in c.splitlines() if line.startswith("## ")
    ]
    places = [
        next((i for i, h in enumerate(headings) if h.startswith(f"## {s}")), None) for s in SECTIONS
    ]
    assert None not in places, dict(zip(SECTIONS, places, strict=True))
    assert places == sorted(places)


@BY_ID
def test_code_is_short_calls_and_nothing_else(step):
    only_short_calls(step)
    setup = cells(step, "code")[0]
    assert setup == f'from portkit import begin\nstep = begin("{step.id}")'
    assert cells(step, "code").count("step.check()") == 1


def only_short_calls(book: Step | Beside) -> None:
    for source in cells(book, "code"):
        assert len(source.splitlines()) <= 12
        assert not re.search(r"^\s*[!%]", source, re.M), "no shell, no magics"
        for node in ast.walk(ast.parse(source)):
            assert not isinstance(
                node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
            )
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert getattr(node, "module", "") == "portkit"


@pytest.mark.parametrize("book", beside(), ids=lambda b: b.id)
def test_a_notebook_that_is_no_step_keeps_the_grammar(book):
    """Title, goal, time; short calls of what an examination has; help by symptom; links resolve."""
    first = cells(book, "markdown")[0]
    for part in (book.title, "**Goal:**", f"about {book.minutes} minutes"):
        assert part in first
    only_short_calls(book)
    code, prose = "\n".join(cells(book, "code")), "\n".join(cells(book, "markdown"))
    assert code.startswith("from portkit import begin_diagnosis\nexam = begin_diagnosis()")
    calls = re.findall(r"exam\.(\w+)\(", code + prose)
    assert calls and not [c for c in calls if not callable(getattr(Examination, c, None))]
    assert "Helium" not in code
    assert prose.count("<details><summary>Help - ") == prose.count("</details>") >= 4
    local = [t for t in re.findall(r"\]\(([^)]+)\)", prose) if not t.startswith("http")]
    assert local and not [t for t in local if not (NOTEBOOKS / t).is_file()]
    assert book.notebook in "\n".join(cells(STEPS[-1], "markdown")), "nothing leads there"


@BY_ID
def test_it_calls_only_what_a_session_has_and_names_no_model(step):
    calls = re.findall(r"step\.(\w+)\(", "\n".join(cells(step, "code") + cells(step, "markdown")))
    assert calls and not [c for c in calls if not callable(getattr(Session, c, None))]
    assert "Helium" not in "\n".join(cells(step, "code"))


@BY_ID
def test_outputs_are_stripped(step):
    book = nbformat.read(NOTEBOOKS / step.notebook, as_version=4)
    nbformat.validate(book)
    for cell in book.cells:
        assert not cell.get("outputs") and not cell.get("execution_count"), cell.id
        assert not cell.metadata, "state never lives in a cell's metadata"


@BY_ID
def test_help_is_filed_by_symptom(step):
    prose = "\n".join(cells(step, "markdown"))
    drops = re.findall(
        r"<details><summary>Help - (.+?)</summary>\n\n(.+?)\n</details>", prose, re.S
    )
    assert len(drops) >= 4
    assert len(drops) == prose.count("<details>") == prose.count("</details>")
    assert all(len(text) > 50 for _, text in drops)


@BY_ID
def test_links_between_notebooks_resolve_and_lead_on(step):
    prose = "\n".join(cells(step, "markdown"))
    local = [t for t in re.findall(r"\]\(([^)]+)\)", prose) if not t.startswith("http")]
    assert not [t for t in local if not (NOTEBOOKS / t).is_file()]
    if step is not STEPS[-1]:
        assert STEPS[step.number + 1].notebook in cells(step, "markdown")[-1]


def test_the_older_guides_names_are_mapped():
    prose = "\n".join(c for s in STEPS for c in cells(s, "markdown"))
    for name in (
        "PagedAttentionWithRoPE",
        "PagedAttentionWithALiBi",
        "kv_caches",
        "attn_metadata",
        "linear_method",
        "SamplerOutput",
        "_MODELS",
        "runpy",
        "stacked_params_mapping",
    ):
        assert name in prose, name


@BY_ID
def test_every_check_has_help(step):
    """A check without a hint is one that a reader fails alone."""
    keys = {h.key for h in hints_of(step.id)}
    missing = [c.id for c in checks_of(step) if c.id not in keys]
    assert not missing, missing


# ---- running ------------------------------------------------------------------------------------


def nbmake(
    tmp_path: Path, names: list[str], autopilot: bool, timeout: int
) -> subprocess.CompletedProcess:
    """Run notebooks by nbmake on the only port under tmp_path, keeping what they printed there."""
    environment = {
        **os.environ,
        "PORTKIT_PORTS": str(tmp_path / "ports"),
        "PORTKIT_AUTOPILOT": "1" if autopilot else "",
    }
    environment.pop("PORTKIT_PORT", None)
    done = tmp_path / "done"
    done.mkdir(exist_ok=True)
    for name in names:
        (done / name).write_bytes((NOTEBOOKS / name).read_bytes())
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--nbmake",
            "--overwrite",
            f"--nbmake-timeout={timeout}",
            "--rootdir",
            str(done),
            "-c",
            os.devnull,
            *(str(done / name) for name in names),
        ],
        capture_output=True,
        text=True,
        env=environment,
        cwd=done,
        timeout=timeout * len(names) + 120,
    )


def outputs(path: Path) -> dict[str, str]:
    """Return each code cell's source with the text that it showed."""
    book = nbformat.read(path, as_version=4)
    shown = {}
    for cell in book.cells:
        if cell.cell_type == "code":
            texts = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in cell.outputs]
            shown[cell.source] = "\n".join(texts)
    return shown


@pytest.mark.notebooks
@pytest.mark.vllm
@pytest.mark.timeout(2400)
def test_by_autopilot_all_notebooks_pass_on_a_fresh_port(tmp_path):
    names = [*(s.notebook for s in STEPS), *(b.notebook for b in beside())]
    done = nbmake(tmp_path, names, autopilot=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:]
    last = outputs(tmp_path / "done" / STEPS[-1].notebook)
    assert "✗" not in last["step.check()"]
    diagnosed = outputs(tmp_path / "done" / "08_diagnose.ipynb")
    assert "Nothing is wrong" in diagnosed["exam.diagnose()"]
    assert "✓ heals" in diagnosed["exam.break_copy()"]


@pytest.mark.notebooks
@pytest.mark.vllm
@pytest.mark.timeout(2400)
def test_by_autopilot_another_tutorial_model_passes_in_turn(tmp_path):
    """One of them a day; PORTKIT_TURN names it."""
    others = [name for name in bundled() if name != "helium"]
    name = os.environ.get("PORTKIT_TURN", others[date.today().toordinal() % len(others)])
    new_port(name, architecture=name, root=tmp_path / "ports")
    done = nbmake(tmp_path, [s.notebook for s in STEPS], autopilot=True, timeout=600)
    assert done.returncode == 0, f"{name}: {done.stdout[-6000:]}"


@pytest.mark.notebooks
@pytest.mark.vllm
@pytest.mark.timeout(2400)
def test_without_autopilot_they_run_through_and_each_check_fails_with_a_message(tmp_path):
    """Nothing was edited: no cell raises, every step's check says what is wrong and what to do."""
    new_port("helium", architecture="helium", root=tmp_path / "ports")
    names = [*(s.notebook for s in STEPS), *(b.notebook for b in beside())]
    done = nbmake(tmp_path, names, autopilot=False, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:]
    for step in STEPS:
        shown = outputs(tmp_path / "done" / step.notebook)["step.check()"]
        assert "✗ failed" in shown, (step.id, shown)
        assert "next:" in shown, (step.id, shown)
        assert "Traceback" not in shown, (step.id, shown)


@pytest.mark.notebooks
@pytest.mark.vllm
@pytest.mark.timeout(1200)
def test_any_step_starts_cold(tmp_path):
    """A late notebook on a port where nothing was done: autopilot catches up by the drafts."""
    new_port("helium", architecture="helium", root=tmp_path / "ports")
    done = nbmake(tmp_path, ["05_register.ipynb"], autopilot=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:]
