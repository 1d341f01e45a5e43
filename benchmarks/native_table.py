"""Rows of native_classes.py: kept in a file, judged with native_findings.toml, as a page."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

HARD, USUAL = "hard", "default"
FINDINGS = Path(__file__).with_name("native_findings.toml")
KINDS = {
    "silent": "no check fails",
    "option": "no check fails with options at their defaults; another value is not supported",
    "finding": "vLLM's class deviates from Transformers, or lacks what vLLM's guide asks for",
    "false alarm": "portkit is wrong",
    "not checkable": "it could not be adopted or run here",
    "unexplained": "fails, and nobody has looked into it",
}


@dataclass(frozen=True)
class Trial:
    """What the checks say with one checkpoint."""

    options: str
    """"hard" for the hardened one, "default" for options at the config class's defaults."""
    set: tuple[str, ...]
    """The config fields that were given a value."""
    passed: int
    failed: tuple[tuple[str, str, str], ...]
    """(check, what, where) of each that failed."""
    stopped: str = ""
    """Why it could not be checked at all; "" if it was."""

    @property
    def silent(self) -> bool:
        return not self.failed and not self.stopped


@dataclass(frozen=True)
class NativeRow:
    """One class of vLLM."""

    architecture: str
    module: str
    """Where the class is defined on this platform."""
    stopped: str
    """Why the class cannot be imported; "" if it can."""
    trials: tuple[Trial, ...]
    seconds: float

    @property
    def kind(self) -> str:
        """Return which of KINDS it is; a failure is what native_findings.toml says."""
        if self.trials and self.trials[0].silent:
            return "silent"
        said = explanations().get(self.architecture, {})
        if said.get("kind"):
            return str(said["kind"])
        if self.trials and self.trials[-1].silent:
            return "option"
        return "unexplained" if self.trials else "not checkable"


@cache
def explanations() -> dict[str, dict[str, Any]]:
    """Return what a person found out about each class that fails, by architecture."""
    return tomllib.loads(FINDINGS.read_text(encoding="utf-8")) if FINDINGS.is_file() else {}


def kept(path: Path) -> dict[str, NativeRow]:
    """Return the rows in the file, by architecture; the last one of each counts."""
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        value = json.loads(line)
        trials = tuple(
            Trial(**{**t, "set": tuple(t["set"]), "failed": tuple(map(tuple, t["failed"]))})
            for t in value["trials"]
        )
        rows[value["architecture"]] = NativeRow(**{**value, "trials": trials})
    return rows


def keep(row: NativeRow, path: Path) -> None:
    """Append a row to the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(asdict(row)) + "\n")


def one_line(row: NativeRow) -> str:
    """Say how a row came out."""
    said = [f"[{t.options}] {t.passed} passed, {_failures(t)}" for t in row.trials]
    return f"{row.architecture}: {' '.join(said) or row.stopped} ({row.seconds:.0f} s)"


def _failures(trial: Trial) -> str:
    return trial.stopped or "; ".join(f"{c}: {what}" for c, what, _ in trial.failed) or "silent"


def document(rows: Mapping[str, NativeRow]) -> str:
    return "TODO\n"
