"""Checks of step `weights`: the port loads its own checkpoint, all of it, and nothing wrongly.

vLLM's own check is blind to most of this: it exempts every module with a quantisation method (all
parallel linears, embeddings, heads), ignores unexpected biases, and is off when load_weights
returns None. Three jobs give the evidence: `coverage` follows headers through load_weights, `load`
starts the engine on parameters full of NaN, `rehearsal` runs two ranks.
"""

from __future__ import annotations

from typing import Any

from portkit.checks.base import Check, CheckContext, place
from portkit.checks.verdict import Table, Verdict
from portkit.live import loads
from portkit.live.checkpoint import open_checkpoint
from portkit.live.coverage_problems import (
    UNFILLED,
    coverage_problems,
    coverage_table,
    left_out,
)
from portkit.live.evidence import gather
from portkit.live.job import JobResult
from portkit.live.layers import advice_on_start, pattern
from portkit.live.odd_tensors import odd_tensors
from portkit.steps.weights.parity import (
    STEP,
    LoadParity,
    LoadParityTp2,
    TiedHead,
    line_of_loading,
)
from portkit.steps.weights.reload import Reload

TWICE = (
    "load_weights makes a dict of what it gets (dict(weights)): of two tensors of one name the "
    "last one stays, and all of them stay in memory",
)
"""Why nobody notices a tensor that comes twice."""


class CoverageCheck(Check):
    """Every tensor of the checkpoint goes somewhere, once and whole; every parameter is filled.

    From the shards' headers through the port's own load_weights: each write into a parameter is
    followed back to the tensor it came from, on one rank and on two. No tensor is read. Shows
    nothing about order: that q landed in q's place is for `load_parity`.
    """

    id = "coverage"
    step = STEP
    title = "Each tensor is loaded once, each parameter filled"

    def run(self, context: CheckContext) -> Verdict:
        job = gather(context, self.id, "coverage")
        if not job.ok:
            return self.failed_job(job, next=advice_on_start(job.what))
        found = job.value
        table = coverage_table(found["whole"])
        checkpoint = open_checkpoint(context.port.checkpoint)
        if odd := odd_tensors(checkpoint):
            return self.failed(
                f"{odd[0].what}."
                + (f" {len(odd) - 1} more tensors are as odd." if odd[1:] else ""),
                where=str(checkpoint.root),
                next=odd[0].next,
                causes=odd[0].causes,
                job=job,
            )
        if found["whole"]["error"]:
            return self.raised(context, found, job)
        problems = coverage_problems(found)
        if problems:
            first = problems[0]
            more = (
                f" {len(problems) - 1} more: {'; '.join(p.what for p in problems[1:4])}."
                if problems[1:]
                else ""
            )
            where = place(context.port, first.line) if first.line else line_of_loading(context.port)
            return self.failed(
                f"{first.what}.{more}",
                table,
                where=where,
                next=first.next,
                causes=first.causes,
                job=job,
            )
        whole = found["whole"]
        ranks = " on one rank and on each of two" if found["ranks"] else ""
        left = left_out(found)
        return self.passed(
            f"All {len(whole['tensors']) - len(left)} tensors went somewhere, once and whole; all "
            f"{sum(f['required'] for f in whole['parameters'].values())} parameters were "
            f"filled{ranks}.{loads.said_left_out(left)}",
            table,
            job=job,
        )

    def raised(self, context: CheckContext, found: dict[str, Any], job: JobResult) -> Verdict:
        error = found["whole"]["error"]
        return self.failed(
            loads.stopped(error),
            where=error["where"] or line_of_loading(context.port),
            next=loads.advice_on(error["what"], error.get("tensor", ""), found["ignored"]),
            causes=loads.causes_of(error["what"]),
            job=job,
            log=job.log_tail,
        )


class PoisonedLoad(Check):
    """Of parameters that were all NaN before, none is after load_weights; its answer says so.

    The real engine, the real shards. vLLM believes the names that load_weights returns, and asks
    nothing when it returns None.
    """

    id = "poisoned_load"
    step = STEP
    title = "Nothing is left of what was there before"
    requires = ("coverage",)

    def run(self, context: CheckContext) -> Verdict:
        job = gather(context, self.id, "load", variant="")
        if not job.ok:
            return self.failed_job(job, next=advice_on_start(job.what))
        found = job.value
        port = context.port
        left = loads.nan_rows(found)
        table = Table(
            "Parameters with NaN after loading", ("parameter", "NaN", "of", "from"), tuple(left)
        )
        if left:
            name, count, total, sources = left[0]
            own = found["coverage"]["parameters"].get(name, {})
            stored = own.get("full", False)
            return self.failed(
                f"{name}: {count} of {total} elements are NaN after load_weights ({len(left)} "
                f"such parameters).",
                table,
                where=line_of_loading(port),
                job=job,
                next="The checkpoint itself holds NaN there: is it damaged?"
                if stored
                else "Find why no tensor reaches it: `coverage` lists what went where.",
                causes=(f"the tensors {sources} hold NaN",) if stored else UNFILLED,
            )
        if found.get("error"):
            error = found["error"]
            return self.failed(
                loads.stopped(error),
                where=error["where"] or line_of_loading(port),
                next=loads.advice_on(error["what"]),
                causes=loads.causes_of(error["what"]),
                job=job,
                log=job.log_tail,
            )
        if found["returned"] is None:
            return self.failed(
                'load_weights returns None: vLLM takes that for "do not check" and asks nothing.',
                where=line_of_loading(port),
                job=job,
                causes=("the `return` before loader.load_weights(...) is missing",),
                next="Return the set of names: return loader.load_weights(weights, mapper=...).",
            )
        parameters = {n for n, f in found["coverage"]["parameters"].items() if f["required"]}
        unsaid = sorted(
            n
            for n in parameters
            if n not in found["returned"] and found["coverage"]["parameters"][n]["sources"]
        )
        if unsaid:
            return self.failed(
                f"load_weights loaded {unsaid[0]} but does not say so ({len(unsaid)} such names).",
                where=line_of_loading(port),
                job=job,
                next="Add each parameter's name to the returned set: vLLM stops at norms that "
                "are not in it.",
            )
        return self.passed(
            f"{len(parameters)} parameters were NaN before, none has a NaN after; load_weights "
            f"returned "
            f"{len(found['returned'])} names.",
            job=job,
        )


class BadCheckpoints(Check):
    """A checkpoint with one thing wrong is noticed: by an error, or by portkit's audit, by name.

    The port's duty: not to reshape a tensor that does not fit, and to return only names that it
    loaded. portkit's audit: what is missing, left over, cut, written twice, or NaN.
    """

    id = "bad_checkpoints"
    step = STEP
    title = "Bad checkpoints do not load in silence"
    requires = ("coverage",)

    def run(self, context: CheckContext) -> Verdict:
        job = gather(context, self.id, "coverage")
        if not job.ok:
            return self.failed_job(job, next=advice_on_start(job.what))
        cases = [*job.value["bad"]]
        live = gather(context, self.id, "load", variant="")
        nan = live.value.get("nan_case") if live.ok else None
        if nan:
            seen = ", ".join(nan["seen"])
            cases.append(
                {
                    "kind": "nan",
                    "what": f"{nan['tensor']} holds a NaN",
                    "raised": nan["raised"],
                    "where": "",
                    "audit": f"{seen} has NaN" if seen else "",
                    "duty": "" if seen or nan["raised"] else "the NaN is gone",
                }
            )
        table = Table(
            "One thing wrong",
            ("checkpoint", "load_weights", "portkit's audit", "verdict"),
            tuple(
                (
                    c["what"],
                    c["raised"][:100] or "says nothing",
                    c["audit"] or ("" if c["raised"] else "sees nothing"),
                    f"NOT GOOD: {c['duty']}" if c["duty"] else "noticed",
                )
                for c in cases
            ),
            "Every checkpoint that you give portkit is audited like this by `coverage` and "
            "`poisoned_load`.",
        )
        bad = [c for c in cases if c["duty"]]
        if bad:
            first = bad[0]
            return self.failed(
                f"{first['what']}, and {first['duty']}."
                + (f" {len(bad) - 1} more such cases." if bad[1:] else ""),
                table,
                where=first["where"] or line_of_loading(context.port),
                job=job,
                next="Leave the writing to each parameter's weight_loader, and return what "
                "AutoWeightsLoader returns.",
                causes=(
                    *(TWICE if first["what"].endswith("comes twice") else ()),
                    "load_weights reshapes or slices tensors until they fit",
                    "load_weights returns the names of all parameters instead of those it loaded",
                ),
            )
        silent = sum(not c["raised"] for c in cases)
        return self.passed(
            f"{len(cases)} bad checkpoints: {len(cases) - silent} raise, {silent} pass vLLM in "
            f"silence and are named by "
            "the audit.",
            table,
            job=job,
        )


class LoadMemory(Check):
    """Loading streams: at no time are more tensors held than one decoder layer has.

    And the memory used beyond what was there stays below the model, its largest shard and 256 MiB.
    `dict(weights)` or a list of them holds the whole checkpoint beside the model.
    """

    id = "load_memory"
    step = STEP
    title = "Loading streams through the checkpoint"
    requires = ("poisoned_load",)
    SLACK = 256 << 20

    def run(self, context: CheckContext) -> Verdict:
        job = gather(context, self.id, "load", variant="")
        if not job.ok:
            return self.failed_job(job, next=advice_on_start(job.what))
        memory = job.value["memory"]
        allowed = max(memory["largest_layer"], memory["largest_tensor"]) + memory["largest_tensor"]
        limit = memory["model"] + memory["largest_shard"] + self.SLACK
        table = Table(
            "Memory while loading",
            ("what", "MiB", "limit, MiB"),
            (
                ("checkpoint tensors held at once", loads.mib(memory["held"]), loads.mib(allowed)),
                ("memory used beyond the start", loads.mib(memory["peak"]), loads.mib(limit)),
                ("the checkpoint", loads.mib(memory["checkpoint"]), ""),
                (
                    f"its largest shard, of {memory['shards']}",
                    loads.mib(memory["largest_shard"]),
                    "",
                ),
                ("its largest layer", loads.mib(memory["largest_layer"]), ""),
            ),
            f"Used: {memory['how']}. One layer's tensors may wait for each other, for example to "
            f"be fused.",
        )
        if memory["held"] > allowed:
            return self.failed(
                f"load_weights held {loads.mib(memory['held'])} MiB of tensors at once, of a "
                f"checkpoint of "
                f"{loads.mib(memory['checkpoint'])} MiB: "
                f"{', '.join(map(pattern, memory['held_then'][:4]))}, ...",
                table,
                where=line_of_loading(context.port),
                job=job,
                next="Take the tensors from the iterator one by one and let each go: a large "
                "model's would fill the memory.",
                causes=(
                    "dict(weights) or list(weights)",
                    "tensors are kept on self or in a list until the end",
                ),
            )
        if memory["peak"] > limit:
            return self.failed(
                f"Loading used {loads.mib(memory['peak'])} MiB more than before it, "
                f"{loads.mib(limit)} would do.",
                table,
                where=line_of_loading(context.port),
                job=job,
                next="Look for copies: .clone(), .float(), torch.cat of large tensors.",
            )
        return self.passed(
            f"At most {loads.mib(memory['held'])} MiB of the checkpoint's "
            f"{loads.mib(memory['checkpoint'])} MiB were held "
            "at once.",
            table,
            job=job,
        )


CHECKS = (
    CoverageCheck,
    PoisonedLoad,
    LoadParity,
    LoadParityTp2,
    TiedHead,
    BadCheckpoints,
    LoadMemory,
    Reload,
)
