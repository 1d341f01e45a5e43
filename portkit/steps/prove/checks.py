"""Checks of step `prove`: the engine as users run it, how fast it is, and the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from portkit.analysis.classes import view_module
from portkit.analysis.facts import facts_of
from portkit.analysis.traced import decided_by_python
from portkit.checks.base import Check, CheckContext, place
from portkit.checks.verdict import Table, Verdict
from portkit.live.job import JobResult
from portkit.live.missing_kernels import NEXT
from portkit.port import Port, write_atomically
from portkit.report.html import page
from portkit.report.markdown import to_markdown
from portkit.report.proof import Proof, proof_report
from portkit.steps.prove.gather import gather
from portkit.steps.prove.half_precision import HalfPrecision, over_budget
from portkit.steps.prove.judging import CARRIED, Judgement, how, judge
from portkit.steps.register import tree

TOKENS = 24
ALONE = (
    "One rank is right: a rank's part is taken for the whole (a sum that is not reduced, heads "
    "that are not divided)."
)
FIXED = (
    "Eager passes and compiled does not: a Python branch or value in forward (a number of tokens, "
    "a first call, an attribute kept between calls) was fixed when vLLM traced it."
)


def _suspect(context: CheckContext) -> str:
    """Return the first line where Python decides in a forward; the module if none does."""
    lines = decided_by_python(context.port.source)
    return place(context.port, lines[0]) if lines else context.port.module


def _inner_model(context: CheckContext) -> str:
    """Return the line of the class that vLLM compiles, the one below the ForCausalLM class."""
    port = context.port
    view = view_module(port.source).classes.get(facts_of(port.source, port.architecture).model)
    return place(port, view.line) if view else port.module


class _AsUsers(Check):
    """What both proofs of parity share."""

    step = "prove"
    timeout = 600.0

    def live(self, context: CheckContext, **args: Any) -> JobResult:
        """Run the job `prove_run`; vLLM's own rule comes from its source, unpacked once."""
        rule = context.port.state_dir / "vllm-source"
        if not (rule / "tests" / "models" / "utils.py").is_file():
            tree.unpack(rule)
        return self.job(
            context,
            "prove_run",
            rule=str(rule),
            tokens=TOKENS,
            **args,
        )

    def right(self, context: CheckContext, **args: Any) -> bool:
        """Whether a simpler run is right: that narrows a failure down."""
        job = self.live(context, **args)
        return job.ok and not judge(job.value).problem


class AsUsersRunIt(_AsUsers):
    """Compiled, with prefix caching and vLLM's own settings, the port agrees with Transformers.

    By vLLM's own rule (`check_logprobs_close` of its tests/models/utils.py: each side's token is
    in the other's top 5) and by distance: in float32 within 1e-3, and in the precision that vLLM
    chooses by itself no further from float32 than twice what Transformers is in that precision.
    """

    id = "as_users_run_it"
    title = "Compiled, cached, in vLLM's own precision"

    def run(self, context: CheckContext) -> Verdict:
        tables = []
        for dtype in ("float32", "auto"):
            job = self.live(context, tensor_parallel_size=1, eager=False, dtype=dtype)
            if not job.ok:
                return self.failed_job(job)
            found = judge(job.value)
            tables.append(found.table)
            if not job.value["compiled"]:
                return self.failed(
                    "vLLM did not compile the port.",
                    *tables,
                    job=job,
                    where=_inner_model(context),
                    next="Put @support_torch_compile on the inner model class (step 3).",
                )
            if found.problem:
                return self.explained(context, job, found, tables)
        return self.passed(
            f"{', '.join(job.value['compiled'])} compiled ({how(job.value)}); vLLM's rule holds "
            f"and the distances are rounding, in float32 and in {job.value['dtype']}.",
            *tables,
            job=job,
        )

    def explained(
        self, context: CheckContext, job: JobResult, found: Judgement, tables: Sequence[Table]
    ) -> Verdict:
        """Narrow the failure down: to compilation, to half precision, or to neither."""
        dtype = "float32" if job.value["dtype"] == "float32" else "auto"
        where, causes = context.port.module, (found.cause,) if found.cause else ()
        next = "It is wrong without compilation too: portkit check weights"
        if self.right(context, tensor_parallel_size=1, eager=True, dtype=dtype):
            where, causes = _suspect(context), (FIXED,)
            next = "Decide in __init__ what can be decided there; say the rest in tensors."
        elif dtype == "auto":
            layers = self.job(context, "half_precision")
            if layers.ok and (first := over_budget(layers.value)):
                where, causes, next = first.where or where, first.causes, first.what
        return self.failed(
            found.problem,
            *tables,
            job=job,
            where=where,
            causes=causes,
            next=next,
            log=found.log,
        )


class TensorParallel(_AsUsers):
    """Two ranks give what one gives, with prefix caching, in float32.

    Compiled where each rank has a GPU of its own; ranks that share one device run eagerly.
    """

    id = "tensor_parallel"
    title = "On two ranks"

    def run(self, context: CheckContext) -> Verdict:
        job = self.live(context, tensor_parallel_size=2, eager=True, dtype="float32")
        if not job.ok:
            return self.failed_job(job)
        found = judge(job.value)
        if found.problem:
            one = self.right(context, tensor_parallel_size=1, eager=True, dtype="float32")
            return self.failed(
                found.problem,
                found.table,
                job=job,
                where=_suspect(context) if found.cause == CARRIED else context.port.module,
                causes=tuple(filter(None, [ALONE if one else found.cause])),
                next="portkit check parallel: its rehearsals say which module differs."
                if one
                else "It is wrong on one rank too: portkit check weights",
                log=found.log,
            )
        return self.passed(
            "Two ranks agree with Transformers: rule and distance.", found.table, job=job
        )


class Speed(Check):
    """Tokens per second of the port, of Transformers' generate and of vLLM's other ways.

    It fails if the port does not run at these sizes; a slow port is said, not failed, since a busy
    machine is slow too.
    """

    id = "speed"
    step = "prove"
    title = "Tokens per second"
    timeout = 400.0

    WAYS = ("port", "native", "transformers_backend", "transformers")
    BATCHES = (1, 8)

    def run(self, context: CheckContext) -> Verdict:
        jobs = self._rates(context)
        if jobs["port"].next == NEXT:  # a kernel that takes no float32, which a CPU is asked for
            jobs = self._rates(context, dtype="bfloat16")
        port = jobs["port"]
        if not port.ok:
            return self.failed_job(port)
        rates = {
            w: {r["batch"]: r["rates"] for r in j.value["rows"]} for w, j in jobs.items() if j.ok
        }
        rows = tuple(
            (way, *(cell for b in self.BATCHES for cell in _rate(rates[way][b], rates["port"][b])))
            for way in rates
        )
        how = port.value["how"]
        absent = "; ".join(f"{way}: {job.what}" for way, job in jobs.items() if not job.ok)
        table = Table(
            f"Generated tokens per second, {how['dtype']}, "
            f"{'eager' if how['eager'] else 'compiled'}, 32 in, 48 out",
            (
                "way",
                *(c for b in self.BATCHES for c in (f"batch {b}: median (min-max)", "port / way")),
            ),
            rows,
            note="Median of three runs in one session; another machine, another number. " + absent,
        )
        largest = {way: median(by_batch[self.BATCHES[-1]]) for way, by_batch in rates.items()}
        slower = [way for way, rate in largest.items() if largest["port"] < rate]
        if slower:
            table = replace(
                table,
                note=f"{table.note} At batch {self.BATCHES[-1]} the port is slower than "
                f"{', '.join(slower)}: measure on a quiet machine; if it stays so, look for Python "
                "loops over tokens or layers.",
            )
        return self.passed(
            "; ".join(f"{row[0]}: {row[1]} and {row[3]} tokens/s" for row in rows), table, job=port
        )

    def _rates(self, context: CheckContext, **args: Any) -> dict[str, JobResult]:
        """Run each way; the port first, and alone if it does not run."""
        jobs: dict[str, JobResult] = {}
        for way in self.WAYS:
            jobs[way] = self.job(
                context,
                "tokens_per_second",
                way=way,
                batches=list(self.BATCHES),
                tokens_in=32,
                tokens_out=48,
                repeats=3,
                **args,
            )
            if not jobs["port"].ok:
                break
        return jobs


class ReportWritten(Check):
    """The report stands in the port, as HTML for reading and as Markdown for a pull request.

    It holds the latest verdict of every check. It fails if one of them is a failure; what was never
    run, or judged another state of the port, it says.
    """

    id = "report"
    step = "prove"
    title = "The report"
    requires = ("as_users_run_it", "half_precision", "tensor_parallel", "speed")

    def run(self, context: CheckContext) -> Verdict:
        port = context.port
        proof = gather(port)
        written = write_report(port, proof)
        if proof.failed:
            failed = ", ".join(v.check for v in proof.failed)
            return self.failed(
                f"The report is written, and it says that these failed: {failed}.",
                where=str(written[0]),
                next="Mend the port and run those checks: portkit check all",
            )
        open_questions = [*proof.missing, *proof.stale]
        said = (
            f" It says that these were not run on this port as it is: {', '.join(open_questions)}."
            if open_questions
            else ""
        )
        return self.passed(
            f"Written: {' and '.join(str(p.relative_to(port.root)) for p in written)}.{said}"
        )


CHECKS = (AsUsersRunIt, HalfPrecision, TensorParallel, Speed, ReportWritten)


def write_report(port: Port, proof: Proof) -> tuple[Path, Path]:
    """Write report/<name>.html and .md in the port and return their paths."""
    report = proof_report(proof)
    html, markdown = (port.root / "report" / f"{port.name}.{kind}" for kind in ("html", "md"))
    # It is made to be shown to others: where the ports lie on this machine is not their business.
    here = str(port.root)
    written = page(report.blocks, f"{port.architecture} in vLLM")
    write_atomically(html, written.replace(escape(here), port.name))
    write_atomically(markdown, to_markdown(report.blocks).replace(here, port.name))
    return html, markdown


def _rate(rates: list[float], ours: list[float]) -> tuple[str, str]:
    return (
        f"{median(rates):.0f} ({min(rates):.0f}-{max(rates):.0f})",
        f"{median(ours) / median(rates):.2f}",
    )
