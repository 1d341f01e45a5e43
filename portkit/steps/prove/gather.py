"""Gather what the report says from port.toml and the saved verdicts."""

from __future__ import annotations

from datetime import UTC, datetime

from portkit.checks import results
from portkit.checks.runner import checks_of
from portkit.checks.verdict import Verdict
from portkit.curriculum import steps
from portkit.port import Port
from portkit.report.proof import Proof

SELF = "report"
LIMITS = (
    "Parity holds for the prompts, the checkpoint and the devices named here; other sizes of the "
    "architecture may use other branches of the code.",
    "Sampling, speculative decoding, LoRA adapters and multi-node runs were not exercised.",
    "Quantised formats other than the one named above were not exercised.",
    "A person who understands the change must have read the code: vLLM's contribution rules ask "
    "for it.",
)


def gather(port: Port) -> Proof:
    """Return the proof of a port, from its latest verdicts."""
    verdicts: dict[str, tuple[Verdict, ...]] = {}
    stale, missing, devices = [], [], set()
    for step in steps():
        found = []
        for check in checks_of(step):
            saved = results.load(port, check.id)
            if check.id == SELF:
                continue
            if saved is None:
                missing.append(check.id)
                continue
            found.append(saved.verdict)
            if saved.verdict.device:
                devices.add(f"{saved.verdict.device} ({saved.verdict.device_reason})")
            # An earlier step judged the port as it was at that step, and rightly so.
            if not saved.fresh and step.id in ("weights", "register", "out_of_tree", "prove"):
                stale.append(check.id)
        if found:
            verdicts[f"{step.number} {step.title}"] = tuple(found)
    meta = port.meta
    source = meta.get("source", {})
    versions = ", ".join(f"{name} {version}" for name, version in results.versions().items())
    facts = (
        ("port", f"{port.name} ({port.module})"),
        (
            "source",
            f"{source.get('package', '?')} {source.get('version', '')}, {source.get('module', '')}",
        ),
        ("licence", str(source.get("licence", "?"))),
        ("checkpoint", str(meta.get("checkpoint", {}).get("origin", port.checkpoint.resolve()))),
        ("device", "; ".join(sorted(devices)) or "?"),
        ("versions", versions),
        ("date", datetime.now(UTC).date().isoformat()),
        ("commit", port.git("rev-parse", "--short", "HEAD").strip()),
    )
    return Proof(
        name=port.name,
        architecture=port.architecture,
        facts=facts,
        verdicts=verdicts,
        stale=tuple(stale),
        missing=tuple(missing),
        limits=LIMITS,
        commands=(f"portkit check all --port {port.name}", "make port"),
    )
