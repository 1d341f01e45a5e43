"""The port folder keeps every edit: through kills, full disks, odd git settings, two processes."""

import errno
import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from portkit import atomic
from portkit.create import decide, new_port
from portkit.curriculum import step
from portkit.errors import PortkitError
from portkit.port import Port, open_port
from portkit.repository import environment


@pytest.fixture
def port(tmp_path: Path) -> Port:
    made = new_port("helium", architecture="helium", root=tmp_path / "my ports é")
    made.modeling.write_text("first = 1\n")
    return made


def subjects(port: Port) -> list[str]:
    return port.git("log", "--format=%s").splitlines()


def test_apply_commits_the_readers_text_before_it_writes(port):
    assert port.apply({port.modeling: "second = 2\n"}, "two")
    assert port.source == "second = 2\n"
    assert subjects(port)[:2] == ["apply: two", "save: before two"]
    assert port.git("show", f"HEAD~1:{port.package}/{port.modeling.name}") == "first = 1\n"


def test_apply_of_the_same_text_does_nothing(port):
    port.apply({port.modeling: "second = 2\n"}, "two")
    before = subjects(port)
    assert not port.apply({port.modeling: "second = 2\n"}, "two again")
    assert subjects(port) == before


def test_undo_restores_the_exact_bytes_also_of_new_files_and_line_ends(port):
    crlf = "first = 1\r\nlast = 'é'"
    port.modeling.write_bytes(crlf.encode())
    port.apply({port.modeling: "second\n", f"{port.package}/extra.py": "x = 1\n"}, "two")
    assert port.undo() == "two"
    assert port.modeling.read_bytes() == crlf.encode()
    assert port.source == crlf
    assert not (port.root / port.package / "extra.py").exists()


def test_undo_again_takes_back_the_apply_before_and_then_there_is_nothing(port):
    port.apply({port.modeling: "second\n"}, "two")
    port.apply({port.modeling: "third\n"}, "three")
    assert [port.undo(), port.source] == ["three", "second\n"]
    assert [port.undo(), port.source] == ["two", "first = 1\n"]
    with pytest.raises(PortkitError, match="nothing to undo"):
        port.undo()
    port.apply({port.modeling: "fourth\n"}, "four")
    assert [port.undo(), port.source] == ["four", "first = 1\n"]


def test_undo_keeps_later_edits_in_history_and_later_settings_in_port_toml(port):
    port.apply(
        {port.modeling: "second\n", "port.toml": port.meta_with("source", sha256="x")}, "two"
    )
    port.modeling.write_text("second, edited\n")
    decide(port, "out_of_tree", "our own model")
    port.undo()
    assert port.source == "first = 1\n"
    assert port.git("show", f"HEAD~1:{port.package}/{port.modeling.name}") == "second, edited\n"
    assert "sha256" not in port.meta["source"]
    assert port.meta["decisions"]["destination"] == "out_of_tree"


def test_apply_refuses_when_the_text_it_was_made_from_has_changed(port):
    with pytest.raises(PortkitError, match="changed on disk"):
        port.apply({port.modeling: "new\n"}, "late", expected={port.modeling: "another\n"})
    assert port.source == "first = 1\n"


def test_a_file_that_the_readers_gitignore_hides_is_saved_all_the_same(port):
    (port.root / ".gitignore").write_text("*.py\n.portkit/\ncheckpoint\n")
    port.apply({port.modeling: "second\n"}, "two")
    port.modeling.write_text("edited\n")
    port.apply({port.modeling: "third\n"}, "three")
    assert port.git("show", f"HEAD~1:{port.package}/{port.modeling.name}") == "edited\n"


def test_apply_refuses_paths_outside_the_port_and_links(port, tmp_path):
    for path in ("../outside.py", ".git/config", tmp_path / "x.py"):
        with pytest.raises(PortkitError, match="outside the port"):
            port.apply({path: "x"}, "out")
    elsewhere = tmp_path / "elsewhere.py"
    elsewhere.write_text("mine\n")
    port.modeling.unlink()
    port.modeling.symlink_to(elsewhere)
    with pytest.raises(PortkitError, match=r"symbolic link|outside"):
        port.apply({port.modeling: "x"}, "link")
    assert elsewhere.read_text() == "mine\n"


def test_the_mode_of_a_file_stays(port):
    port.modeling.chmod(0o600)
    port.apply({port.modeling: "second\n"}, "two")
    assert port.modeling.stat().st_mode & 0o777 == 0o600


def test_steps_passed_are_commits(port):
    port.pass_step(step("copy"))
    assert port.steps_passed() == ("copy",)


def test_the_readers_git_settings_do_not_interfere(port, tmp_path, monkeypatch):
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    for name in ("pre-commit", "prepare-commit-msg", "post-commit", "commit-msg"):
        (hooks / name).write_text("#!/bin/sh\necho no >&2\nexit 1\n")
        (hooks / name).chmod(0o755)
    config = tmp_path / "gitconfig"
    config.write_text(
        f"[core]\n hooksPath = {hooks}\n autocrlf = true\n excludesFile = {tmp_path}/ignore\n"
        "[commit]\n gpgsign = true\n[user]\n signingkey = none\n[init]\n templateDir = /nowhere\n"
    )
    (tmp_path / "ignore").write_text("*.py\n*.toml\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "not-a-repository"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "index"))
    port.git("config", "core.hooksPath", str(hooks))
    port.apply({port.modeling: "second\n"}, "two")
    assert port.undo() == "two"
    other = new_port("other", architecture="helium", root=tmp_path / "more")
    assert "port.toml" in other.git("ls-files")


def test_a_stale_lock_of_a_killed_git_is_recovered(port):
    for name in ("index.lock", "HEAD.lock", "refs/heads/main.lock"):
        (port.root / ".git" / name).touch()
    port.apply({port.modeling: "second\n"}, "two")
    assert subjects(port)[0] == "apply: two"


def test_a_lock_is_left_alone_while_a_git_works_in_the_port(port, monkeypatch):
    monkeypatch.setattr("portkit.repository.LOCK_PATIENCE", 0.3)
    running = subprocess.Popen(
        ["git", "cat-file", "--batch"], cwd=port.root, stdin=subprocess.PIPE, env=environment()
    )
    try:
        (port.root / ".git" / "index.lock").touch()
        with pytest.raises(PortkitError, match=r"index\.lock"):
            port.apply({port.modeling: "second\n"}, "two")
        assert port.source == "first = 1\n"
    finally:
        running.communicate()
    port.apply({port.modeling: "second\n"}, "two")


def test_temporary_files_of_a_killed_portkit_go_when_the_port_is_opened(port):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = port.modeling.with_name(f".{port.modeling.name}.{gone.pid}.abc.portkit-tmp")
    mine = port.modeling.with_name(f".{port.modeling.name}.{os.getpid()}.abc.portkit-tmp")
    left.write_text("half")
    mine.write_text("half")
    open_port(port.root)
    assert not left.exists() and mine.exists()


def test_git_missing_is_said(port, monkeypatch):
    monkeypatch.setenv("PATH", str(port.root))
    with pytest.raises(PortkitError, match="git is not installed"):
        port.apply({port.modeling: "second\n"}, "two")
    assert port.source == "first = 1\n"


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_full_disk_leaves_the_old_texts(port, monkeypatch, at):
    """The disk fills at each of the writes in turn: owner note, journal, first and second file."""
    real, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle)

    extra = f"{port.package}/extra.py"
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "sync_folder", lambda folder: None)
        patch.setattr(os, "fsync", full)
        with pytest.raises(PortkitError, match="No space left"):
            port.apply({port.modeling: "second\n", extra: "x\n"}, "two")
    assert port.source == "first = 1\n" and not (port.root / extra).exists()
    port.apply({port.modeling: "second\n", extra: "x\n"}, "two")
    assert port.undo() == "two"
    assert port.source == "first = 1\n"


def test_a_file_size_limit_while_git_commits_leaves_the_old_text(port):
    """RLIMIT_FSIZE stands for a full disk in every process, git's own included."""
    code = textwrap.dedent("""
        import resource, signal, sys
        from portkit.port import open_port
        from portkit.errors import PortkitError
        port = open_port(sys.argv[1])
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        try:
            port.apply({port.modeling: "x = 1\\n" * 1000}, "big")
        except PortkitError as error:
            print(error.what)
    """)
    done = subprocess.run(
        [sys.executable, "-c", code, str(port.root)], capture_output=True, text=True, timeout=60
    )
    assert "Could not write" in done.stdout, done.stderr
    assert open_port(port.root).source == "first = 1\n"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_port_is_said(port):
    (port.root / port.package).chmod(0o555)
    try:
        with pytest.raises(PortkitError, match="Permission denied"):
            port.apply({port.modeling: "second\n"}, "two")
    finally:
        (port.root / port.package).chmod(0o755)


def test_two_processes_on_one_port_are_told(port):
    code = (
        "import sys, time\nfrom portkit.port import open_port\n"
        "with open_port(sys.argv[1]).locked():\n    print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(port.root)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        told = pytest.raises(PortkitError, match=f"Another portkit .process {other.pid}. is chang")
        with told, port.locked(seconds=0.2):
            pass
        assert open_port(port.root).name == "helium"
    finally:
        other.kill()
        other.wait()
    port.apply({port.modeling: "second\n"}, "two")


def test_what_is_no_port_is_said(port, tmp_path, monkeypatch):
    monkeypatch.setenv("PORTKIT_PORTS", str(port.root.parent))
    assert open_port("helium").root == port.root.resolve()
    with pytest.raises(PortkitError, match="is not a port"):
        open_port(tmp_path)
    (port.root / "port.toml").write_text("[port\n")
    with pytest.raises(PortkitError, match=r"port\.toml cannot be read"):
        open_port("helium")
    (port.root / "port.toml").write_text('[port]\nname = "../x"\narchitecture = "A"\n')
    with pytest.raises(PortkitError, match="not a name"):
        open_port("helium")


WORKER = """
import sys, itertools
from portkit.port import open_port
port, round_ = open_port(sys.argv[1]), sys.argv[2]
for n in itertools.count():
    text = f"draft {round_} {n}\\n" * 10000
    port.apply({port.modeling: text, port.init_file: text}, f"{round_}.{n}")
    if n == 0:
        print("ready", flush=True)
    if n % 3 == 2:
        port.undo()
"""


def test_sigkill_at_any_moment_loses_nothing(port):
    """25 kills of a process that applies and undoes without pause."""
    chance = random.Random(7)
    init = port.init_file.read_text()
    edits = []
    for round_ in range(25):
        edit = f"edited by the reader, round {round_}\n"
        port.modeling.write_text(edit)
        edits.append(edit)
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(port.root), str(round_)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        if chance.random() < 0.8:
            assert worker.stdout.readline() == "ready\n", worker.communicate()
            delay = chance.uniform(0, 0.3)
        else:
            delay = chance.uniform(0, 0.6)
        with pytest.raises(subprocess.TimeoutExpired):
            worker.wait(delay)
        if round_ % 2:
            os.killpg(worker.pid, signal.SIGKILL)  # its git as well
        else:
            worker.send_signal(signal.SIGKILL)
        worker.communicate()

        opened = open_port(port.root)
        texts = {"modeling": opened.source, "init": opened.init_file.read_text()}
        for text in texts.values():
            lines = set(text.splitlines(keepends=True))
            assert len(lines) == 1 and (
                text in edits or text == init or len(text) == len(lines.copy().pop()) * 10000
            ), f"a torn text in round {round_}: {text[:80]!r}"
        if texts["modeling"].startswith("draft"):
            assert texts["init"] == texts["modeling"], "half of an apply"
        opened.apply({opened.modeling: f"after the kill {round_}\n"}, "still works")
        assert opened.undo() == "still works"
        assert opened.source == texts["modeling"]
        opened.git("fsck", "--strict")
    for edit in edits:
        blob = _blob(port, edit)
        assert port.git("log", "--all", "--format=%h", f"--find-object={blob}"), f"lost: {edit}"
    assert not list(port.root.rglob("*.portkit-tmp"))


def _blob(port: Port, text: str) -> str:
    """git's own name of a text, as its object database knows it."""
    done = subprocess.run(
        ["git", "hash-object", "--stdin"], input=text, text=True, capture_output=True, cwd=port.root
    )
    return done.stdout.strip()
