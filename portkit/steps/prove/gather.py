"""Gather what the report says from port.toml and the saved verdicts."""

from __future__ import annotations

from datetime import UTC, datetime

from portkit.checks import results
from portkit.checks.runner import checks_of
from portkit.checks.verdict import Verdict
from portkit.curriculum import Step, steps
from portkit.models import find
from portkit.port import Port
from portkit.report.proof import Proof, StepProof

SELF = "report"
FINISHED = ("weights", "register", "out_of_tree", "prove")
"""Steps whose checks judge the finished port; the earlier ones judged it as it then was."""
LIMITS = (
    "Parity holds for the prompts, the checkpoint and the devices named here; other sizes of the "
    "architecture may use other branches of the code.",
    "Sampling, speculative decoding and multi-node runs were not exercised.",
    "LoRA adapters and quantised runs are those of step 3: random adapters, and the formats that "
    "its checks name.",
    "A person who understands the change must have read the code: vLLM's contribution rules ask "
    "for it.",
)


def gather(port: Port) -> Proof:
    """Return the proof of a port, from its latest verdicts."""
    found = tuple(_step(port, step) for step in steps())
    bundled = find(port.architecture)
    return Proof(
        name=port.name,
        architecture=port.architecture,
        facts=_facts(port, [v for step in found for v in step.verdicts]),
        steps=found,
        limits=LIMITS,
        commands=(
            f"portkit check all --port {port.name}",
            *([f"make port MODEL={bundled.name}"] if bundled else []),
        ),
    )


def _step(port: Port, step: Step) -> StepProof:
    ids = [check.id for check in checks_of(step) if check.id != SELF]
    saved = {id: one for id in ids if (one := results.load(port, id)) is not None}
    return StepProof(
        step.number,
        step.title,
        tuple(one.verdict for one in saved.values()),
        stale=tuple(id for id, one in saved.items() if not one.fresh and step.id in FINISHED),
        missing=tuple(id for id in ids if id not in saved),
    )


def _facts(port: Port, verdicts: list[Verdict]) -> tuple[tuple[str, str], ...]:
    meta = port.meta
    source = meta.get("source", {})
    origin = f"{source.get('package', '')} {source.get('version', '')}, {source.get('module', '')}"
    devices = sorted({f"{v.device} ({v.device_reason})" for v in verdicts if v.device})
    return (
        ("port", f"{port.name} ({port.module})"),
        ("source", origin.strip(" ,") or "not recorded"),
        ("licence", str(source.get("licence") or "not recorded")),
        ("checkpoint", str(meta.get("checkpoint", {}).get("origin", port.checkpoint.resolve()))),
        ("device", "; ".join(devices) or "no check ran"),
        ("versions", ", ".join(f"{name} {v}" for name, v in results.versions().items())),
        ("date", datetime.now(UTC).date().isoformat()),
        ("commit", port.git("rev-parse", "--short", "HEAD").strip()),
    )
