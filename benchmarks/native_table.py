"""Rows of native_classes.py: kept in a file, judged with native_findings.toml, as a page."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from measure import machine

HARD, USUAL = "hard", "default"
FINDINGS = Path(__file__).with_name("native_findings.toml")
KINDS = {
    "silent": "No check fails, on the hardened checkpoint.",
    "option": "With options at their defaults no check fails. The hardened checkpoint, which has "
    "biases, caps and factors that the config class offers, shows what vLLM's class does not "
    "support; mostly it starts all the same.",
    "finding": "vLLM's class deviates from Transformers, or from what vLLM asks of a class.",
    "not checkable": "It cannot run here, so only what needs no engine was checked.",
    "false alarm": "portkit is wrong, and it is known how.",
    "unexplained": "A check fails, and why was not found: portkit may be wrong there.",
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
        """Return which of KINDS it is. Of a failure it is what native_findings.toml says.

        If that speaks of all the checks that fail; one that it does not know is unexplained.
        """
        if self.trials and self.trials[0].silent:
            return "silent"
        if self.trials and self.trials[-1].silent:
            return "option"
        said = explanations().get(self.architecture, {})
        failed = {check for check, _, _ in self.trials[-1].failed} if self.trials else set()
        known = failed <= set(said.get("checks", ())) or said.get("kind") == "not checkable"
        return str(said["kind"]) if known and "kind" in said else "unexplained"

    @property
    def says(self) -> str:
        """Return the person's sentence about it, or what the first failing check says."""
        said = explanations().get(self.architecture, {})
        if self.kind in ("finding", "not checkable", "false alarm"):
            return str(said["says"])
        trial = self.trials[0 if self.kind == "option" else -1] if self.trials else None
        return self.stopped or (_failures(trial) if trial else "")


@cache
def explanations() -> dict[str, dict[str, Any]]:
    """Return what a person found out about each class that fails, by architecture."""
    return tomllib.loads(FINDINGS.read_text(encoding="utf-8"))


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
    return f"{row.architecture}: {row.kind}. {' '.join(said) or row.stopped} ({row.seconds:.0f} s)"


def _failures(trial: Trial) -> str:
    return trial.stopped or "; ".join(f"{c}: {what}" for c, what, _ in trial.failed) or "silent"


def document(rows: Mapping[str, NativeRow]) -> str:
    """Return docs/native-classes.md."""
    versions = ", ".join(f"{name} {version}" for name, version in machine().versions)
    by_kind = {k: [r for r in rows.values() if r.kind == k] for k in KINDS}
    lines = [
        "# vLLM's own classes, checked",
        "",
        "Each class of vLLM for an architecture in scope, adopted as it is (`portkit adopt`) and "
        "diagnosed (`portkit diagnose`: all checks of the steps forward, parallel and weights, and "
        "half precision by layer; weights read by the class's own `load_weights`) on a tiny random "
        "checkpoint in float32, on a CPU. First a hardened one, which switches on what the config "
        "class offers; where a check fails there, a second one with options (switches, caps, "
        "factors, sizes that are computed unless given) at the config class's defaults, the "
        "weights as hard as ever. "
        "`python benchmarks/native_classes.py` measures, `--write docs/native-classes.md` makes "
        "this page; the sentences of the last two tables are from benchmarks/native_findings.toml: "
        "what a person found who looked into the failure.",
        "",
        f"{datetime.now(UTC).date().isoformat()}: {versions}.",
        "",
        "| | classes | what it means |",
        "|---|---|---|",
        *(f"| {kind} | {len(by_kind[kind])} | {words} |" for kind, words in KINDS.items()),
        f"| in all | {len(rows)} | |",
        "",
        "## Silent",
        "",
        ", ".join(r.architecture for r in by_kind["silent"]) + ".",
    ]
    for kind, title in (
        ("option", "Silent with options at their defaults"),
        ("finding", "Findings"),
        ("not checkable", "Not checkable here"),
        ("false alarm", "False alarms"),
        ("unexplained", "Unexplained"),
    ):
        if by_kind[kind]:
            lines += ["", f"## {title}", "", *_table(kind, by_kind[kind])]
    on_gpu = {
        name: said["on_gpu"] for name, said in sorted(explanations().items()) if "on_gpu" in said
    }
    lines += [
        "",
        "## On a GPU",
        "",
        "60 of them on an NVIDIA H200, 2026-11-28 (vLLM 0.32.0 for CUDA, torch 2.11, Transformers "
        "5.19.0), in the same way. 15 are silent on the hardened checkpoint: the 13 above, "
        "FalconMamba and Mamba; with options at their defaults Falcon, Gemma, GPT2, GraniteMoe, "
        "HYV3, Qwen2, Qwen3 and Qwen3Moe. What is not listed fails the checks that it fails here. "
        "Not run: AXK1, Dbrx, DeepseekV4, Inkling, MiMoV2Flash, Qwen3_5Moe and Qwen4Exp; in an "
        "earlier run only: DeepseekV32, GlmMoeDsa, HYV4, KimiLinear, Lfm2, Qwen3Next, Qwen3_5.",
        "",
        "| architecture | what was seen |",
        "|---|---|",
        *(f"| {name} | {_cell(text)} |" for name, text in on_gpu.items()),
    ]
    return "\n".join(lines) + "\n"


def _table(kind: str, rows: list[NativeRow]) -> list[str]:
    last = "on the hardened checkpoint" if kind == "option" else "what it is"
    lines = [f"| architecture | passed | failed | {last} |", "|---|---|---|---|"]
    for row in rows:
        trial = row.trials[0 if kind == "option" else -1] if row.trials else None
        failed = ", ".join(f"`{check}`" for check, _, _ in trial.failed) if trial else ""
        text = _short(row.says) if kind in ("option", "unexplained") else row.says
        passed = trial.passed if trial else 0
        lines.append(f"| {row.architecture} | {passed} | {failed} | {_cell(text)} |")
    return lines


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) < 260 else text[:257] + "…"
