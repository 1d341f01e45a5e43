"""The check of quantised copies: 8 bits for weights and activations, then 4 for weights alone."""

from __future__ import annotations

from typing import Any

from portkit.checks.base import Check, CheckContext
from portkit.checks.verdict import Table, Verdict
from portkit.live.evidence import run_with_a_loader
from portkit.live.job import JobResult
from portkit.steps.parallel.rehearsals import STEP


class QuantisedRun(Check):
    """Quantised copies of the checkpoint run: the right layers, with the right scales.

    portkit rounds the checkpoint to 8 bits (compressed-tensors, a scale per row, an ignore list
    with the parts of a fused layer), then to 4 (a scale per 32 inputs, packed into int32), and
    compares with Transformers computing with the same rounding. Proves nothing about the quality
    that a quantised model has.
    """

    id = "quantised_run"
    step = STEP
    title = "A quantised checkpoint runs as its config says"
    requires = ("rehearsal_tp1",)

    def run(self, context: CheckContext) -> Verdict:
        eight = self._in(context, 8)
        if eight.status == "failed":
            return eight
        four = self._in(context, 4)
        if "passed" not in (eight.status, four.status) or four.status == "failed":
            return four if four.status == "failed" else eight
        return self.passed(
            f"{eight.what} {four.what}",
            *eight.tables,
            *four.tables,
            device=four.device,
            device_reason=four.device_reason,
            seconds=eight.seconds + four.seconds,
        )

    def _in(self, context: CheckContext, bits: int) -> Verdict:
        """Return the verdict on the copy in that many bits."""

        def start(loader: str) -> JobResult:
            return context.live.run(
                "quantised", progress=context.progress, loader=loader, bits=bits
            )

        job = run_with_a_loader(context, start, lambda found: not _right(found))
        if not job.ok:
            return self.failed(
                f"The {bits}-bit copy does not run: {job.what}",
                where=job.where,
                next=job.next,
                log=job.log_tail,
                job=job,
                causes=(
                    "a layer was given no quant_config: its scales have no place to go",
                    "a prefix is not the module's path: the ignore list misses the layer",
                    "packed_modules_mapping lacks a fused layer: the ignore list speaks of its "
                    "parts",
                ),
            )
        found = job.value
        if "nothing" in found:
            return self.skipped(
                f"There is nothing to quantise in {bits} bits: {found['nothing']}.", job=job
            )
        return self._judged(context, found, job)

    def _judged(self, context: CheckContext, found: dict[str, Any], job: JobResult) -> Verdict:
        layers, cases = _layers(found), _cases(found)
        wrong = [r for r in found["layers"] if r["known"] and r["expected"] != r["actual"]]
        if wrong:
            first = wrong[0]
            says = "quantised" if first["expected"] else "ignored, as it is"
            return self.failed(
                f"By the config {first['path']} is {says}, but vLLM runs it "
                f"{'quantised' if first['actual'] else 'unquantised'} ({len(wrong)} such layers).",
                layers,
                job=job,
                where=first["path"],
                next="The check `prefixes` names the line.",
                causes=(
                    "quant_config is not passed to that layer",
                    "its prefix is not its path",
                    "packed_modules_mapping does not name its parts",
                ),
            )
        limit = _limit(found)
        # A NaN is no number below the limit either.
        if not found["difference"] <= limit:
            return self.failed(
                f"In {found['format']} the log-probabilities differ from Transformers quantised "
                f"alike by {found['difference']:.2g} "
                f"in the mean; quantising itself changes them by {found['effect']:.2g}.",
                layers,
                cases,
                job=job,
                where=context.port.modeling.name,
                next="Unquantised the port is right, so look at where scales go: they follow "
                "their weight's shard.",
                causes=(
                    "the scales of a fused layer's parts are swapped (shard ids of q, k, v or "
                    "gate, up)",
                    "a weight is loaded without its scale",
                ),
            )
        count = sum(r["actual"] for r in found["layers"])
        return self.passed(
            f"{count} of {len(found['layers'])} layers run in {found['format']}, as the config "
            f"says; the mean difference to Transformers with the same rounding is "
            f"{found['difference']:.1e} (limit {limit:.1e}).",
            layers,
            cases,
            job=job,
        )


def _layers(found: dict[str, Any]) -> Table:
    return Table(
        f"Layers of the {found['format']} copy",
        ("module", "of the checkpoint", "config says", "vLLM runs"),
        tuple(
            (
                r["path"],
                ", ".join(m.rpartition(".")[2] for m in r["members"]),
                _says(r),
                r["scheme"] or "unquantised",
            )
            for r in found["layers"]
        ),
        f"ignore: {', '.join(found['ignored'])}",
    )


def _cases(found: dict[str, Any]) -> Table:
    part, reason = found["tolerance"]
    return Table(
        f"Against Transformers, rounded alike to {found['format']}",
        ("prompt", "mean difference", "largest", "what quantising changes (mean)"),
        tuple(
            (c["name"], f"{c['mean']:.1e}", f"{c['max']:.1e}", f"{c['effect']:.1e}")
            for c in found["cases"]
        ),
        f"Tolerance: {part:g} of what quantising changes: {reason}.",
    )


def _right(found: dict[str, Any]) -> bool:
    return "nothing" in found or found["difference"] <= _limit(found)


def _limit(found: dict[str, Any]) -> float:
    """Return the largest mean difference that rounding alike leaves."""
    return max(found["tolerance"][0] * found["effect"], 1e-4)


def _says(row: dict[str, Any]) -> str:
    if not row["known"]:
        return "nothing: not a linear of the original"
    return "quantised" if row["expected"] else "ignored"
