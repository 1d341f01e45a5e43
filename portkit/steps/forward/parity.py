"""The shared evidence of step `forward`, and what its parity checks have in common.

One engine start gathers the evidence of all of them (live/jobs/forward_parity.py); each check
reads its own part. The evidence is taken again whenever the port's code or checkpoint changed.
"""

from __future__ import annotations

from typing import Any, ClassVar

from portkit.analysis.traced import kept_between_calls
from portkit.checks.base import Check, CheckContext
from portkit.checks.results import source_hash
from portkit.checks.verdict import Verdict
from portkit.live.evidence import run_with_a_loader
from portkit.live.job import JobResult
from portkit.port import Port
from portkit.steps.forward.evidence import cases_table, edit, numbers, top_table, walk_table

STEP = "forward"
EVIDENCE: dict[str, tuple[str, JobResult]] = {}
"""Port folder -> (hash of what was judged, evidence): what one run's checks share."""


def evidence(context: CheckContext, *, afresh: bool = False) -> JobResult:
    """Return the result of the job `forward_parity` for the port as it stands now."""
    loader = context.loader or "portkit"
    root, state = f"{context.port.root} {loader}", source_hash(context.port)
    held = EVIDENCE.get(root)
    if held and held[0] == state and not afresh:
        return held[1]

    def start(loader: str) -> JobResult:
        return context.live.run(
            "forward_parity", timeout=300.0, progress=context.progress, loader=loader
        )

    result = run_with_a_loader(context, start, _wrong)
    if result.ok:
        EVIDENCE[root] = (state, result)
    else:
        EVIDENCE.pop(root, None)
    return result


def held_evidence(port: Port, loader: str) -> JobResult | None:
    """Return the evidence that checks gathered on the port as it is now, or None."""
    held = EVIDENCE.get(f"{port.root} {loader}")
    return held[1] if held and held[0] == source_hash(port) else None


def _wrong(value: dict[str, Any]) -> int:
    """Return how much of the evidence is wrong: the earlier the first module, the more."""
    starts = value["starts"]
    if "error" in starts or starts["load"].get("left_over"):
        return 100_000
    stages = [part for part in value.values() if isinstance(part, dict) and part is not starts]
    failed = [s for s in stages if "error" in s or not all(c["ok"] for c in s.get("cases", ()))]
    walked = min((s.get("divergence", {}).get("walked", 0) for s in failed), default=0)
    return 10_000 * len(failed) - min(walked, 9_999)


class Parity(Check):
    """What the checks on the shared evidence have in common."""

    step = STEP
    stage: ClassVar[str]

    def run(self, context: CheckContext) -> Verdict:
        job = evidence(context)
        if not job.ok:
            return self.failed_job(job)
        found = job.value.get(self.stage)
        if found is None:
            return self.skipped("vLLM does not start on the port (see `starts`)", job=job)
        if "error" in found:
            error = found["error"]
            return self.failed(
                f"The port's code stopped: {error['what']}",
                where=error["where"],
                next=error["next"],
                log=error["log"],
                job=job,
                causes=self.crash_causes(),
            )
        if "beyond_vllm" in found:
            return self.skipped(f"{found['beyond_vllm']}.", job=job)
        bad = [case for case in found["cases"] if not case["ok"]]
        value, reason = job.value["tolerance"]
        if bad:
            return self._differs(context.port, bad, found, job)
        reason_not = self.not_exercised(found)
        if reason_not:
            return self.failed(
                reason_not,
                job=job,
                next="This is a limit of the checkpoint: use one with room for it.",
            )
        worst = max(case["max_abs"] for case in found["cases"])
        rows = sum(case["rows"] for case in found["cases"])
        return self.passed(
            f"{self.proof(found)} Largest difference of a log-probability: {worst:.1e} "
            f"(tolerance {value:g}), over {rows} positions and the whole vocabulary.",
            cases_table(found["cases"], f"Tolerance {value:g}: {reason}."),
            job=job,
        )

    def proof(self, found: dict[str, Any]) -> str:
        """Say what was run, from the scheduler's own numbers."""
        return f"{len(found['cases'])} prompts agree with Transformers."

    def not_exercised(self, found: dict[str, Any]) -> str:
        """Return why the evidence does not show what this check is about, or ""."""
        return ""

    def crash_causes(self) -> tuple[str, ...]:
        return ()

    def situation(self) -> tuple[str, ...]:
        """Causes that the situation itself suggests, when the simpler ones have passed."""
        return ()

    def _differs(
        self, port: Port, bad: list[dict[str, Any]], found: dict[str, Any], job: JobResult
    ) -> Verdict:
        case = found["cases"][found["shown"]]
        texts = job.value.get("texts", {})
        trace = found.get("divergence", {})
        what = (
            f"{len(bad)} of {len(found['cases'])} comparisons differ. "
            f"{case['name'][0].upper()}{case['name'][1:]}: "
            f"from position {case['position']} on ({case['beyond']} of {case['rows']} "
            f"positions), by up to "
            f"{case['max_abs']:.3g} in a log-probability."
        )
        tables = [top_table(case, texts)]
        if trace.get("what"):
            what += f" First diverging module: {trace['what']}, {numbers(trace)}."
            tables.append(walk_table(trace))
        elif trace.get("error"):
            what += f" (The trace stopped: {trace['error']['what']})"
        elif "steps" in trace:
            what += " Module by module, with one request traced, nothing differs."
        tables.append(cases_table(found["cases"]))
        causes = tuple(trace.get("causes", ()))
        proven = int(trace.get("proven", 0))
        kept = (
            f"forward sets self.{name} (line {line}): what is kept between calls comes from "
            "other tokens, of other requests too."
            for name, line in kept_between_calls(port.source)
        )
        merged = (*causes[:proven], *kept, *self.situation(), *causes[proven:])
        return self.failed(
            what,
            *tables,
            where=trace.get("where", "") or trace.get("path", ""),
            job=job,
            causes=tuple(dict.fromkeys(merged)),
            next=edit(trace, merged),
        )
