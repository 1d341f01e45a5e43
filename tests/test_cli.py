"""The command line: what it prints, and its exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from portkit.cli import app
from portkit.create import new_port
from portkit.port import open_port

PORTKIT = [sys.executable, "-c", "from portkit.cli import main; main()"]


@pytest.fixture
def ports(tmp_path, monkeypatch):
    monkeypatch.setenv("PORTKIT_PORTS", str(tmp_path / "ports"))
    monkeypatch.delenv("PORTKIT_PORT", raising=False)
    monkeypatch.delenv("PORTKIT_AUTOPILOT", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "ports"


@pytest.fixture
def port(ports):
    return new_port("helium", architecture="helium")


@pytest.fixture
def copied(port):
    assert cli("draft", "copy", "--apply").exit_code == 0
    return port


def cli(*arguments: str):
    """Run the command line in this process."""
    result = CliRunner().invoke(app, list(arguments))
    assert "Traceback" not in result.output
    return result


def test_new_makes_a_port_and_says_where(ports):
    result = cli("new", "helium", "--model", "HeliumForCausalLM")
    assert result.exit_code == 0, result.output
    assert str(ports / "helium") in result.output.replace("\n", "")
    assert open_port("helium").architecture == "HeliumForCausalLM"


def test_new_of_an_unknown_architecture_offers_the_closest_and_exits_2(ports):
    result = cli("new", "x", "--model", "HeliunForCausalLM")
    assert result.exit_code == 2
    assert "HeliumForCausalLM" in result.output
    assert not (ports / "x").exists()


def test_without_any_port_it_says_how_to_make_one(ports):
    result = cli("status")
    assert result.exit_code == 2
    assert "portkit new helium" in result.output


def test_with_two_ports_it_asks_which(port, ports, monkeypatch):
    new_port("other", architecture="helium")
    result = cli("status")
    assert result.exit_code == 2
    assert "helium, other" in result.output
    assert cli("status", "--port", "other").exit_code == 0
    monkeypatch.setenv("PORTKIT_PORT", "other")
    assert cli("status").exit_code == 0


def test_inside_a_port_that_port_is_meant(port, monkeypatch):
    new_port("other", architecture="helium")
    monkeypatch.chdir(port.root / port.package)
    assert json.loads(cli("status", "--json").output)["name"] == "helium"


def test_status_names_the_next_step(port):
    data = json.loads(cli("status", "--json").output)
    assert data["next"] == "choose"
    assert [row["step"] for row in data["steps"]][:3] == ["choose", "copy", "forward"]
    assert "02_forward.ipynb" in cli("status").output


def test_tasks_without_code_says_that_there_is_none(port):
    result = cli("tasks", "forward")
    assert result.exit_code == 1
    assert "no code in the port yet" in result.output


def test_tasks_lists_findings_with_their_lines_and_exits_1(copied):
    result = cli("tasks", "forward")
    assert result.exit_code == 1
    assert "modeling_helium.py:" in result.output.replace("\n", "")
    rows = json.loads(cli("tasks", "forward", "--json").output)
    assert {"rule", "line", "message", "symbol"} <= set(rows[0])


def test_code_that_does_not_parse_is_named_with_its_line(copied):
    copied.modeling.write_text(copied.source + "\ndef broken(:\n")
    result = cli("tasks", "forward")
    assert result.exit_code == 2
    assert str(copied.source.count("\n")) in result.output


def test_show_prints_the_code_by_the_end_of_its_name(copied):
    output = cli("show", "Attention.forward", "--step", "forward").output
    assert "def forward" in output and "HeliumAttention.forward" in output
    result = cli("show", "Nothing")
    assert result.exit_code == 2
    assert "HeliumAttention" in result.output


def test_draft_shows_a_diff_and_changes_nothing(copied):
    before = copied.source
    result = cli("draft", "forward")
    assert result.exit_code == 0, result.output
    assert copied.source == before


def test_apply_and_undo_give_back_the_very_bytes(copied):
    before = copied.modeling.read_bytes()
    assert cli("draft", "forward", "--apply").exit_code == 0
    assert copied.modeling.read_bytes() != before
    assert cli("undo").exit_code == 0
    assert copied.modeling.read_bytes() == before


def test_undo_with_nothing_to_undo_exits_2(port):
    assert cli("undo").exit_code == 2


def test_decide_writes_port_toml(port):
    assert cli("decide", "out_of_tree", "our own model").exit_code == 0
    assert port.meta["decisions"] == {"destination": "out_of_tree", "reason": "our own model"}
    assert cli("decide", "mars", "why not").exit_code == 2


@pytest.mark.parametrize(
    "arguments",
    [("check",), ("check", "no_such_step"), ("nonsense",), ("hint", "x", "--level", "shout")],
)
def test_wrong_usage_exits_2(port, arguments):
    assert cli(*arguments).exit_code == 2


def test_an_error_as_json_has_what_where_next(ports):
    done = subprocess.run(
        [*PORTKIT, "status", "--json"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert set(json.loads(done.stdout)["error"]) == {"what", "where", "next"}


def test_an_unexpected_failure_is_two_lines_and_a_log(port, monkeypatch):
    import portkit.status

    monkeypatch.setattr(portkit.status, "status_of", lambda port: 1 / 0)
    result = cli("status")
    assert result.exit_code == 2
    assert "ZeroDivisionError" in result.output and len(result.output.splitlines()) == 2
    log = next((port.state_dir / "logs").glob("portkit-*.log"))
    assert "Traceback" in log.read_text()


def test_interrupted_exits_130(port, monkeypatch):
    import portkit.status

    def interrupted(port):
        raise KeyboardInterrupt

    monkeypatch.setattr(portkit.status, "status_of", interrupted)
    result = cli("status")
    assert result.exit_code == 130
    assert "interrupted" in result.output


def test_as_a_process_exit_codes_and_no_traceback(port):
    def run(*arguments):
        return subprocess.run([*PORTKIT, *arguments], capture_output=True, text=True, timeout=60)

    assert run("status").returncode == 0
    failed = run("tasks", "forward")
    assert failed.returncode == 1
    wrong = run("status", "--port", "nowhere")
    assert wrong.returncode == 2
    assert "nowhere" in wrong.stderr and "portkit new" in wrong.stderr
    assert run("--nonsense").returncode == 2
    assert "Traceback" not in failed.stderr + wrong.stderr


@pytest.mark.vllm
def test_ctrl_c_while_checking_exits_130_and_leaves_no_process(copied):
    """SIGINT while the worker starts or works: exit code 130, and nothing survives."""
    process = subprocess.Popen(
        [*PORTKIT, "check", "copy"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    time.sleep(2)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in errors and "Traceback" not in errors


def test_help_names_every_verb():
    output = cli("--help").output
    for verb in (
        "new",
        "status",
        "tasks",
        "fix",
        "check",
        "hint",
        "draft",
        "undo",
        "doctor",
        "report",
        "show",
        "decide",
        "autopilot",
    ):
        assert verb in output


def test_importing_portkit_is_light_and_loads_neither_torch_nor_vllm():
    code = (
        "import sys, time; import portkit, portkit.cli; from portkit import begin;"
        "heavy = {'torch', 'vllm', 'transformers', 'libcst', 'IPython'} & set(sys.modules);"
        "assert not heavy, heavy; print(time.process_time())"
    )
    times = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        times.append(float(done.stdout))
    assert min(times) < 0.5, "seconds of CPU time, the interpreter's own start included"
