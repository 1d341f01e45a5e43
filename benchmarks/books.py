"""All notebooks from top to bottom by nbmake, the draft in the reader's place, as CI runs them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ports
from measure import Failed, Row, Say, repeated

from portkit.curriculum import steps

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


def all_notebooks(repeats: int, say: Say) -> list[Row]:
    """A fresh port each time; a kernel and a worker per notebook, as a reader has them."""
    slowest: list[tuple[float, str]] = []

    def once(number: int) -> float:
        with ports.folder() as root:
            say(f"all {len(steps())} notebooks, run {number + 1}")
            for step in steps():
                shutil.copy(NOTEBOOKS / step.notebook, root)
            start = time.perf_counter()
            done = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "pytest",
                    "-q",
                    "-p",
                    "no:cacheprovider",
                    "--nbmake",
                    "--nbmake-timeout=900",
                    "--durations=0",
                    "--rootdir",
                    str(root),
                    "-c",
                    os.devnull,
                    *(str(root / step.notebook) for step in steps()),
                ],
                env=_environment(root),
                cwd=root,
                capture_output=True,
                text=True,
            )
            seconds = time.perf_counter() - start
            if done.returncode:
                raise Failed(f"a notebook failed: {done.stdout.strip()[-300:]}")
            slowest[:] = [
                (float(found), Path(name).name)
                for found, name in re.findall(r"^([\d.]+)s call +(\S+\.ipynb)", done.stdout, re.M)
            ]
            return seconds / 60

    values = repeated(once, repeats)
    detail = ", ".join(f"{name} {seconds:.0f} s" for seconds, name in sorted(slowest, reverse=True))
    note = f"`pytest --nbmake` with PORTKIT_AUTOPILOT=1 on a fresh Helium; {detail}"
    return [Row("all eight notebooks", "min", values, 8.0, note)]


def _environment(root: Path) -> dict[str, str]:
    given = {**os.environ, "PORTKIT_PORTS": str(root / "ports"), "PORTKIT_AUTOPILOT": "1"}
    given.pop("PORTKIT_PORT", None)
    given["PORTKIT_MODEL"] = ports.MODEL
    return given
