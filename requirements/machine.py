"""What this machine is: its platform, its Pythons, its GPU, its disk. Standard library only.

Runs before anything is installed, maybe under an old python3: nothing newer than 3.8 here.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SUPPORTED = ((3, 11), (3, 12), (3, 13))
CANDIDATES = ("python3.12", "python3.11", "python3.13")
NEEDED_GIB = {"cpu": 4, "gpu": 12}
"""Disk that a finished set-up takes, with room for the wheels being unpacked."""

COUNT_GPUS = """
import ctypes
cuda = ctypes.CDLL("libcuda.so.1")
count = ctypes.c_int(0)
ok = cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0
print(count.value if ok else 0)
"""


class SetupError(Exception):
    """A failed set-up: what is wrong, where, and what to do next."""

    def __init__(self, what: str, where: str = "", next: str = "") -> None:
        self.what, self.where, self.next = what, where, next
        super().__init__(what)

    def __str__(self) -> str:
        parts = [f"set-up failed: {self.what}"]
        if self.where:
            parts.append(f"where: {self.where}")
        if self.next:
            parts.append(f"next:  {self.next}")
        return "\n".join(parts)


@dataclass(frozen=True)
class Device:
    """Which lock this machine gets, and why."""

    name: str
    """`cpu` or `gpu`."""
    reason: str


@dataclass(frozen=True)
class Python:
    """An interpreter that answered."""

    path: str
    version: tuple
    """(major, minor)."""

    @property
    def supported(self) -> bool:
        return self.version in SUPPORTED


def output_of(command: list, env: dict, seconds: float = 20) -> str | None:
    """Return what a command prints, or None if it is missing, fails or hangs."""
    try:
        done = subprocess.run(
            command, env=env, timeout=seconds, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


def find_device(env: dict, root: Path = Path("/")) -> Device:
    """Find out whether there is an NVIDIA GPU that a program here could open; quickest look first.

    A container without GPUs still sees its host's /proc/driver/nvidia, so device nodes must be
    there too; and images ship libcuda and nvidia-smi without a GPU, so both must count one.
    """
    asked = env.get("PORTKIT_DEVICE", "").strip().lower()
    if asked in NEEDED_GIB:
        return Device(asked, f"PORTKIT_DEVICE={asked}")
    if asked:
        raise SetupError(
            f"PORTKIT_DEVICE is {asked!r}", "environment", "set it to cpu or gpu, or unset it"
        )
    boards = list(root.glob("proc/driver/nvidia/gpus/*"))
    if boards and list(root.glob("dev/nvidia[0-9]*")):
        return Device("gpu", f"the driver lists {len(boards)} NVIDIA GPU(s)")
    smi = shutil.which("nvidia-smi", path=env.get("PATH", ""))
    if smi:
        listed = output_of([smi, "-L"], env) or ""
        names = [line for line in listed.splitlines() if line.startswith("GPU ")]
        if names:
            return Device("gpu", f"nvidia-smi lists {len(names)}: {names[0].split(' (UUID')[0]}")
    counted = (output_of([sys.executable, "-c", COUNT_GPUS], env) or "").strip()
    if counted.isdigit() and int(counted) > 0:
        return Device("gpu", f"libcuda counts {counted} NVIDIA GPU(s)")
    missing = "nvidia-smi lists none" if smi else "no nvidia-smi"
    libcuda = "libcuda counts none" if counted else "no libcuda"
    return Device("cpu", f"no NVIDIA GPU found: none under /proc and /dev, {missing}, {libcuda}")


def ask_python(command: str, env: dict) -> Python | None:
    """Return the interpreter behind a command, or None if there is none (a pyenv shim may fail)."""
    path = shutil.which(command, path=env.get("PATH", ""))
    code = "import sys; print(sys.executable, *sys.version_info[:2], sep='\\n')"
    lines = (output_of([path, "-c", code], env) or "").splitlines() if path else []
    if len(lines) != 3:
        return None
    return Python(lines[0], (int(lines[1]), int(lines[2])))


def choose_python(asked: str, env: dict, running: Python | None = None) -> Python:
    """Return the Python to build the environment with: the one asked for, this one, or another."""
    how = (
        "install Python 3.11, 3.12 or 3.13 (Debian, Ubuntu: apt install python3.12 python3.12-venv;"
        " anywhere: uv python install 3.12, or conda), then: make PYTHON=/path/to/python3.12 setup"
    )
    if asked:
        found = ask_python(asked, env)
        if found is None:
            raise SetupError(f"PYTHON={asked} does not run", "make PYTHON=…", how)
        if not found.supported:
            version = ".".join(map(str, found.version))
            raise SetupError(f"vLLM needs Python 3.11-3.13, this is {version}", found.path, how)
        return found
    running = running or Python(sys.executable, sys.version_info[:2])
    if running.supported:
        return running
    for name in CANDIDATES:
        found = ask_python(name, env)
        if found is not None and found.supported:
            return found
    version = ".".join(map(str, running.version))
    raise SetupError(
        f"no Python 3.11-3.13 here: python3 is {version}, and none of {', '.join(CANDIDATES)} runs",
        running.path,
        how,
    )


def check_platform(
    system: str = platform.system(),
    machine: str = platform.machine(),
    libc: tuple = platform.libc_ver(),
) -> None:
    """Refuse a platform that vLLM 0.32 has no wheels for, before downloading gigabytes."""
    if system != "Linux" or machine not in ("x86_64", "aarch64"):
        raise SetupError(
            f"vLLM 0.32 has no wheels for {system} on {machine}: only Linux on x86_64 and aarch64",
            "this machine",
            "use Linux: WSL2 on Windows, a container or a remote machine on macOS, or Binder",
        )
    name, version = libc
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if name != "glibc" or numbers < (2, 28):
        raise SetupError(
            f"vLLM's wheels need glibc 2.28 or newer; this python3 has {name or 'musl'} {version}",
            sys.executable,
            "use a newer system (Debian 10, Ubuntu 20.04, RHEL 8 or later), or a container of one",
        )


def check_disk(folder: Path, device: str, usage=shutil.disk_usage) -> None:
    """Refuse a disk that would fill up half way."""
    needed, free = NEEDED_GIB[device], usage(folder).free / 2**30
    if free < needed:
        raise SetupError(
            f"not enough disk: {free:.1f} GiB free, the {device} environment needs {needed} GiB",
            os.fspath(folder),
            "make room there, or clone the repository on a larger disk",
        )
