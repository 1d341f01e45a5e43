"""The check of quantised runs: a copy in 8 bits, one with weights of 4, and fp8 while loading."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from portkit.checks.base import Check, CheckContext
from portkit.checks.verdict import Table, Verdict
from portkit.live.evidence import gather, run_with_a_loader
from portkit.live.job import JobResult
from portkit.steps.parallel.rehearsals import STEP

if TYPE_CHECKING:
    from portkit.live.quantised import Way

NAMES: dict[Way, str] = {
    "8 bits": "The 8-bit copy",
    "4 bits": "The 4-bit copy",
    "online": "The port, rounded to fp8 while loading,",
}
ALIKE = 0.1
"""How far a layer may be from its own input rounded alike, as a part of what rounding changes.
Right ports were at most 0.04 away on an H200 and 0.003 on a CPU; a scale that is off by a tenth is
twice what rounding changes."""
FLOOR = 2.0
"""How many times Transformers' own distance from itself in 16 bits the port may be."""
NEXT = (
    "Unquantised the port is right, so look at where scales go: they follow their weight's shard.",
    "From a quantised copy the port is right, so look at how load_weights fills parameters: vLLM "
    "rounds a layer when its parameters' weight_loader has taken all of it.",
)
CAUSES = (
    (
        "the scales of a fused layer's parts are swapped (shard ids of q, k, v or gate, up)",
        "a weight is loaded without its scale",
    ),
    (
        "load_weights writes into a parameter's data itself: while vLLM quantises there is none "
        "(it is on the meta device), and what is written is lost",
        "load_weights hands a tensor on twice, or only a part of it",
    ),
)


class QuantisedRun(Check):
    """The port runs quantised: the right layers, with the right scales.

    portkit rounds the checkpoint to 8 bits (compressed-tensors, a scale per row, an ignore list
    with the parts of a fused layer), then to 4 (a scale per 32 inputs, packed into int32), and has
    vLLM round it to fp8 while loading. In each run every quantised layer is compared with its own
    input and weight rounded by hand, and the whole model with Transformers rounded alike, where
    that tells something. Proves nothing about the quality that a quantised model has.
    """

    id = "quantised_run"
    step = STEP
    title = "The port runs quantised, as a config says"
    requires = ("rehearsal_tp1",)

    def run(self, context: CheckContext) -> Verdict:
        verdicts = []
        for way in NAMES:
            verdict = self._in(context, way)
            if verdict.status not in ("passed", "skipped"):
                return verdict
            verdicts.append(verdict)
        passed = [v for v in verdicts if v.status == "passed"]
        if not passed:
            return verdicts[0]
        return self.passed(
            " ".join(v.what for v in verdicts),
            *(table for v in passed for table in v.tables),
            device=passed[0].device,
            device_reason=passed[0].device_reason,
            seconds=sum(v.seconds for v in verdicts),
        )

    def _in(self, context: CheckContext, way: Way) -> Verdict:
        """Return the verdict on the port quantised in that way."""

        layout = gather(context, f"{self.id} {way}", "layout")
        closed = [m["path"] for m in layout.value["modules"] if m["closed"]] if layout.ok else []

        def start(loader: str) -> JobResult:
            return context.live.run(
                "quantised", progress=context.progress, loader=loader, way=way, closed=closed
            )

        name = NAMES[way]
        job = run_with_a_loader(context, start, lambda found: not _right(found))
        if not job.ok:
            return self.failed(
                f"{name} does not run: {job.what}",
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
            return self.skipped(f"{name} has nothing to quantise: {found['nothing']}.", job=job)
        return self._judged(context, way, found, job)

    def _judged(
        self, context: CheckContext, way: Way, found: dict[str, Any], job: JobResult
    ) -> Verdict:
        layers, cases = _layers(found, way), _cases(found, way)
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
        count = f"{sum(r['actual'] for r in found['layers'])} of {len(found['layers'])} layers run"
        off = [r for r in found["linears"] if not _alike(r)]
        if off:
            worst = max(off, key=_times)
            part = f" (in {worst['part']})" if worst["part"] else ""
            return self.failed(
                f"{_in_format(found, way)} {worst['path']}{part} "
                + (
                    f"is {worst['difference']:.2g} of its output away from its own input and "
                    f"weight rounded alike; rounding itself changes {worst['effect']:.2g}"
                    if math.isfinite(worst["difference"])
                    else "gives NaN for its own input"
                )
                + (f" ({len(off)} such layers)." if off[1:] else "."),
                layers,
                cases,
                job=job,
                where=worst["path"],
                next=NEXT[way == "online"],
                causes=CAUSES[way == "online"],
            )
        if not found["tolerance"] and math.isfinite(found["difference"]):
            return self.passed(
                f"{_in_format(found, way)} {count}, as the config says; {_closest(found)}. The "
                f"whole model is not judged: in {found['dtype']} activations cross rounding steps.",
                layers,
                cases,
                job=job,
            )
        limit = _limit(found)
        # A NaN is no number below the limit either.
        if not found["difference"] <= limit:
            return self.failed(
                f"{_in_format(found, way)} the log-probabilities differ from Transformers "
                f"quantised alike by {found['difference']:.2g} in the mean; quantising itself "
                f"changes them by {found['effect']:.2g}.",
                layers,
                cases,
                job=job,
                where=context.port.modeling.name,
                next=NEXT[way == "online"],
                causes=CAUSES[way == "online"],
            )
        return self.passed(
            f"{_in_format(found, way)} {count}, as the config says; {_closest(found)}; the mean "
            f"difference to Transformers with the same rounding is {found['difference']:.1e} "
            f"(limit {limit:.1e}).",
            layers,
            cases,
            job=job,
        )


def _in_format(found: dict[str, Any], way: Way) -> str:
    return f"In {found['format']}" + (", rounded while loading," if way == "online" else "")


def _layers(found: dict[str, Any], way: Way) -> Table:
    by_hand = {
        r["path"]: (f"{r['difference']:.1e}", f"{r['effect']:.1e}") for r in found["linears"]
    }
    return Table(
        f"Layers of the {found['format']} copy"
        if way != "online"
        else f"Layers, rounded to {found['format']} while loading",
        ("module", "of the checkpoint", "config says", "vLLM runs", "difference", "rounding"),
        tuple(
            (
                r["path"],
                ", ".join(m.rpartition(".")[2] for m in r["members"]),
                _says(r),
                r["scheme"] or "unquantised",
                *by_hand.get(r["path"], ("", "")),
            )
            for r in found["layers"]
        ),
        "Difference: how far a quantised layer is from its own input and weight rounded alike, as "
        f"a part of its output; rounding: what that changes itself; at most {ALIKE:g} of it is "
        f"right. ignore: {', '.join(found['ignored'])}",
    )


def _cases(found: dict[str, Any], way: Way) -> Table:
    note = "The whole model is not judged here."
    if found["tolerance"]:
        part, reason = found["tolerance"]
        note = f"Tolerance: {part:g} of what quantising changes: {reason}."
    if found["itself"]:
        note += (
            f" Or twice what Transformers, rounded alike, moves by in {found['dtype']} itself: "
            f"{found['itself']:.1e}."
        )
    return Table(
        f"Against Transformers, rounded alike to {found['format']}"
        + (" (vLLM: while loading)" if way == "online" else ""),
        ("prompt", "mean difference", "largest", "what quantising changes (mean)"),
        tuple(
            (c["name"], f"{c['mean']:.1e}", f"{c['max']:.1e}", f"{c['effect']:.1e}")
            for c in found["cases"]
        ),
        note,
    )


def _closest(found: dict[str, Any]) -> str:
    """Say how near the quantised layers come to what they should compute."""
    if not found["linears"]:
        return "no layer's own input was seen"
    worst = max(found["linears"], key=_times)
    return (
        f"each gives what its own input rounded alike gives, to {worst['difference']:.1e} of it at "
        f"most (rounding changes {worst['effect']:.1e})"
    )


def _times(row: dict[str, Any]) -> float:
    """How often what rounding changes, which is nothing for some weights, the layer is off."""
    return row["difference"] / max(row["effect"], 1e-30)


def _alike(row: dict[str, Any]) -> bool:
    return row["difference"] <= max(ALIKE * row["effect"], 1e-4)


def _right(found: dict[str, Any]) -> bool:
    if "nothing" in found:
        return True
    if not all(_alike(row) for row in found["linears"]):
        return False
    if not found["tolerance"]:
        return math.isfinite(found["difference"])
    return found["difference"] <= _limit(found)


def _limit(found: dict[str, Any]) -> float:
    """Return the largest mean difference that rounding alike leaves."""
    part = found["tolerance"][0] if found["tolerance"] else 0.0
    return max(part * found["effect"], FLOOR * found["itself"], 1e-4)


def _says(row: dict[str, Any]) -> str:
    if not row["known"]:
        return "nothing: not a linear of the original"
    return "quantised" if row["expected"] else "ignored"
