"""A Python environment of the port's own, to install the plugin in without touching the reader's.

It sees everything that the reader's environment has (vLLM, torch, ...) through a .pth file, and
holds nothing but the port: what `pip install -e` does there is what it will do for a user.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

from portkit.distribution import alias_vllm
from portkit.errors import PortkitError
from portkit.port import Port


@dataclass(frozen=True)
class PluginEnvironment:
    """Where the port is installed."""

    root: Path

    @property
    def python(self) -> str:
        return str(self.root / "bin" / "python")


def plugin_environment(port: Port) -> PluginEnvironment:
    """Return the port's environment, made if it is not there."""
    place = PluginEnvironment(port.state_dir / "plugin-env")
    if not Path(place.python).exists():
        venv.create(place.root, with_pip=False, symlinks=True, clear=True)
        folder = sysconfig.get_path("purelib", vars={"base": str(place.root)})
        alias_vllm(Path(folder))
        Path(folder, "parent.pth").write_text(
            "\n".join(p for p in sys.path if p.endswith("-packages")) + "\n"
        )
    return place


def install(port: Port) -> str:
    """Run `pip install -e` on the port in its environment and return pip's output.

    Raises PortkitError with pip's own error if it fails.
    """
    place = plugin_environment(port)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            place.python,
            "install",
            "--no-deps",
            "--no-build-isolation",
            "--disable-pip-version-check",
            "-e",
            str(port.root),
        ],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode:
        errors = [line for line in done.stdout.splitlines() if "error" in line.lower()]
        last = (errors or done.stdout.splitlines() or ["no output"])[-1]
        raise PortkitError(
            f"pip could not install the port: {last}",
            str(port.root / "pyproject.toml"),
            f"Run `pip install --no-deps -e {port.root}` to see the whole output.",
        )
    return done.stdout
