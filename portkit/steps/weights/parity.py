"""The comparisons of step `weights`: after the port's own load_weights, beside Transformers."""

from __future__ import annotations

import re

from portkit.checks.base import Check, CheckContext, place
from portkit.checks.verdict import Table, Verdict
from portkit.live import loads
from portkit.live.checkpoint import open_checkpoint
from portkit.live.evidence import gather
from portkit.live.job import JobResult
from portkit.live.rank_counts import refusal
from portkit.port import Port

STEP = "weights"


def line_of_loading(port: Port) -> str:
    """Return the place of load_weights on the ForCausalLM class (the last one in the file)."""
    lines = [n for n, text in enumerate(port.source.splitlines(), 1) if "def load_weights" in text]
    return place(port, lines[-1] if lines else 0)


def line_of_mapping(port: Port, tensor: str) -> str:
    """Return the place of the mapper's row for a tensor; of load_weights if there is none."""
    for number, text in enumerate(port.source.splitlines(), 1):
        row = re.match(r"""\s*["']([\w.]+)["']:\s*\(?["']""", text)
        if row and f".{row[1].strip('.')}." in f".{tensor}.":
            return place(port, number)
    return line_of_loading(port)


class _Parity(Check):
    """What the comparisons after loading have in common."""

    step = STEP
    ranks = 1

    def differs(
        self, context: CheckContext, job: JobResult, more: tuple[Table, ...] = ()
    ) -> Verdict | None:
        """Return the failed verdict if a comparison is beyond the tolerance."""
        found = job.value
        bad = [case for case in found["cases"] if not case["ok"]]
        if not bad:
            return None
        worst = max(bad, key=lambda c: c["max_abs"])
        trace = found.get("divergence") or {}
        what = (
            f"{len(bad)} of {len(found['cases'])} prompts differ from Transformers: "
            f"{worst['name']}, by "
            f"{worst['max_abs']:.3g} from position {worst['position']} on (tolerance "
            f"{found['tolerance'][0]:g})."
        )
        # Loaded by portkit the same model was right (step parallel), so its modules are.
        where = line_of_mapping(context.port, trace.get("path", ""))
        misplaced = found.get("misplaced") or []
        if misplaced:
            what += f" {misplaced[0][0]}."
            where = line_of_mapping(context.port, misplaced[0][1])
        elif trace.get("what"):
            what += f" First diverging module: {trace['path']}: {trace['what']}."
        causes = [
            *(
                text if "transposed" in text else f"swapped or sent to another name: {text}"
                for text, _ in misplaced[:1]
            ),
            *trace.get("causes", ()),
            *(loads.MISPLACED if self.ranks == 1 else loads.MISPLACED_ON_RANKS),
        ]
        return self.failed(
            what,
            loads.cases_table(found),
            *more,
            where=where,
            causes=tuple(dict.fromkeys(causes)),
            job=job,
            next="Step `parallel` was right with portkit's loading, so look at the mapping: "
            "names, shard ids, order.",
        )


class LoadParity(_Parity):
    """Loaded from the real shards by the port's own load_weights, it gives Transformers' numbers.

    Log-probabilities of the whole vocabulary and greedy tokens: shapes cannot show that k and v,
    or gate and up, were swapped; numbers do.
    """

    id = "load_parity"
    title = "After loading, one rank equals Transformers"
    requires = ("poisoned_load",)

    def run(self, context: CheckContext) -> Verdict:
        job = gather(context, self.id, "load", variant="")
        if not job.ok:
            return self.failed_job(job)
        return self.differs(context, job) or self.passed(
            f"{len(job.value['cases'])} prompts: same greedy tokens, log-probabilities equal to "
            f"{max(c['max_abs'] for c in job.value['cases']):.1e} (tolerance "
            f"{job.value['tolerance'][0]:g}).",
            loads.cases_table(job.value),
            job=job,
        )


class LoadParityTp2(_Parity):
    """The same with two tensor-parallel ranks, each taking its part of every shard."""

    id = "load_parity_tp2"
    title = "After loading, two ranks equal Transformers"
    requires = ("load_parity",)
    timeout = 240.0
    ranks = 2

    def run(self, context: CheckContext) -> Verdict:
        reason = refusal(open_checkpoint(context.port.checkpoint).config, 2)
        if reason:
            return self.skipped(f"This model cannot run on 2 ranks: {reason}.")
        job = gather(context, self.id, "rehearsal", timeout=self.timeout, ranks=2, loader="port")
        if not job.ok:
            return self.failed(
                f"On two ranks the port stopped: {job.what}",
                where=job.where,
                next=job.next,
                log=job.log_tail,
                job=job,
                causes=loads.MISPLACED_ON_RANKS,
            )
        return self.differs(context, job) or self.passed(
            f"On {job.value['how']}: log-probabilities equal to "
            f"{max(c['max_abs'] for c in job.value['cases']):.1e} (tolerance "
            f"{job.value['tolerance'][0]:g}).",
            loads.cases_table(job.value),
            job=job,
        )


class TiedHead(_Parity):
    """Checkpoints with a tied head and with one of its own both load as their config says.

    From headers: tied without a stored head, tied with a stored copy, untied. And the variant that
    the port's checkpoint is not runs in the engine, beside Transformers.
    """

    id = "tied_head"
    title = "The head is tied when the config says so, and only then"
    requires = ("coverage",)

    def run(self, context: CheckContext) -> Verdict:
        headers = gather(context, self.id, "coverage")
        if not headers.ok:
            return self.failed_job(headers)
        tied = headers.value["tied"]
        if not tied:
            return self.skipped(
                "the original cannot share one weight between embedding and head", job=headers
            )
        table = Table(
            "Heads, from headers",
            ("checkpoint", "the head's tensor goes to", "the embedding's goes to", "unfilled"),
            tuple(
                (
                    name,
                    ", ".join(v["head_from"]) or "nowhere",
                    ", ".join(v["embedding_from"]) or "nowhere",
                    v["error"].get("what") or ", ".join(v["unwritten"]),
                )
                for name, v in tied["variants"].items()
            ),
        )
        problem = loads.head_problem(tied)
        if problem:
            lines = [
                n
                for n, text in enumerate(context.port.source.splitlines(), 1)
                if "tie_word_embeddings" in text
            ]
            made = headers.value["lines"].get(tied["head"], 0)
            return self.failed(
                problem.what,
                table,
                where=place(context.port, lines[-1] if lines else made),
                next=problem.next,
                causes=problem.causes,
                job=headers,
            )
        limits = "".join(
            f" Limit: with a head that is {name}, the port stops ({what.split('.')[0]})."
            for name, what in loads.refused_heads(tied).items()
        )
        variant = "untied" if headers.value["ties"] else "tied"
        if variant in loads.refused_heads(tied):
            return self.passed(
                f"The head is as this checkpoint's config says.{limits}", table, job=headers
            )
        job = gather(context, self.id, "load", variant=variant)
        if not job.ok:
            return self.failed_job(job)
        if refused := job.value.get("refused"):
            return self.passed(
                f"The head is as this checkpoint's config says. With {loads.VARIANTS[variant]} "
                f"Transformers itself does not take it: {refused}",
                table,
                job=job,
            )
        if job.value.get("error"):
            error = job.value["error"]
            return self.failed(
                f"With {loads.VARIANTS[variant]}: {loads.stopped(error)}",
                table,
                job=job,
                where=error["where"] or line_of_loading(context.port),
                next=loads.advice_on(error["what"]),
            )
        failed = self.differs(context, job, (table,))
        return failed or self.passed(
            f"Tied and untied checkpoints load as their config says; {loads.VARIANTS[variant]} "
            f"equals Transformers to "
            f"{max(c['max_abs'] for c in job.value['cases']):.1e}.{limits}",
            table,
            loads.cases_table(job.value),
            job=job,
        )
