"""Checks of step `parallel`: vLLM's layers, their names, and N ranks on whatever devices there are.

Weights are still loaded by portkit (live/loader.py). Two jobs give most of the evidence: `layout`
builds the port's layers without weights, for every number of ranks; `rehearsal` runs them.
"""

from __future__ import annotations

from portkit.analysis.facts import facts_of
from portkit.checks.base import Check, CheckContext, place
from portkit.checks.verdict import Table, Verdict
from portkit.live import layers
from portkit.live.checkpoint import open_checkpoint
from portkit.live.evidence import gather, run_with_a_loader, works_with
from portkit.live.job import JobResult
from portkit.live.missing_kernels import NEXT
from portkit.steps.parallel.lora import LoraAdapters
from portkit.steps.parallel.pipeline import RehearsalPp2
from portkit.steps.parallel.quantised import QuantisedRun
from portkit.steps.parallel.rehearsals import (
    STEP,
    RehearsalTp1,
    RehearsalTp2,
    RehearsalTp4,
    wrong_cases,
)


class LayerClasses(Check):
    """Every layer with weights is of the class that vLLM's guide has for its role.

    Built by the port's own constructors, without weights: no nn.Linear, no nn.Embedding of the
    vocabulary, no large ReplicatedLinear is left. Proves nothing about what they compute.
    """

    id = "layer_classes"
    step = STEP
    title = "vLLM's parallel layers stand where they belong"

    def run(self, context: CheckContext) -> Verdict:
        job = gather(context, self.id, "layout")
        if not job.ok:
            return self.failed_job(job, next=layers.advice_on_start(job.what))
        found = job.value
        rows = []
        kinds = (*layers.VLLM_KINDS, "logits", "nn.Linear", "nn.Embedding")
        part = next(
            (found["ranks"][n]["shapes"][0] for n in ("2", "4") if found["ranks"][n]["shapes"]), {}
        )
        for path, count, row in layers.grouped(found["modules"], kinds):
            name = f"{row['path']}.weight"
            rows.append(
                (
                    path,
                    count,
                    row["class"],
                    layers.ROLES.get(row["class"], ""),
                    _shape(row["weights"].get("weight")),
                    _shape(part.get(name)),
                )
            )
        table = Table(
            "Layers of the port",
            ("module", "count", "class", "role", "weight", "on one of two ranks"),
            tuple(rows),
        )
        problems = layers.class_problems(
            found, facts_of(context.port.source, context.port.architecture)
        )
        if problems:
            first = problems[0]
            more = (
                f" {len(problems) - 1} more: {', '.join(p.path for p in problems[1:])}."
                if problems[1:]
                else ""
            )
            return self.failed(
                f"{first.what}.{more}",
                table,
                where=place(context.port, first.line),
                next=first.next,
                causes=tuple(f"{p.path}: {p.next}" for p in problems[1:5]),
                job=job,
            )
        if not any(row["kind"] == "logits" for row in found["modules"]):
            return self.failed(
                "There is no LogitsProcessor: the logits of the other ranks' rows of the "
                "vocabulary would be lost.",
                table,
                where=context.port.modeling.name,
                job=job,
                next="Make self.logits_processor = LogitsProcessor(config.vocab_size) and return "
                "self.logits_processor(self.lm_head, hidden_states) from compute_logits.",
            )
        return self.passed(
            f"{sum(row[1] for row in rows)} layers, all of vLLM's classes.", table, job=job
        )


class Prefixes(Check):
    """Every layer was given its path as `prefix`, and `quant_config`; fused layers are declared.

    A quantised checkpoint says by name which layers it quantised: a layer with another name, or
    without the config, is loaded wrongly or stays as it is, mostly without an error.
    """

    id = "prefixes"
    step = STEP
    title = "Each layer knows its name and the quantisation"

    def run(self, context: CheckContext) -> Verdict:
        job = gather(context, self.id, "layout")
        if not job.ok:
            return self.failed_job(job, next=layers.advice_on_start(job.what))
        rows = [row for row in job.value["modules"] if row["kind"] in layers.VLLM_KINDS]
        table = Table(
            "What each layer was given",
            ("module", "class", "prefix", "quantisable", "made of"),
            tuple(
                (
                    layers.pattern(row["path"]),
                    row["class"],
                    "its path" if row["prefix"] == row["path"] else repr(row["prefix"]),
                    "yes" if row["quant"] is not None else "no",
                    ", ".join(job.value["packed"].get(row["path"].rpartition(".")[2], ())),
                )
                for _, _, row in layers.grouped(job.value["modules"], layers.VLLM_KINDS)
            ),
            "quantisable: the layer asked vllm_config.quant_config how to hold its weight.",
        )
        problems = layers.prefix_problems(job.value, open_checkpoint(context.port.checkpoint).names)
        if not problems and (disputed := layers.order_problems(job.value)):
            # With the wrong order in the mapper, step `weights` has to say so.
            problems = disputed if self._mapper_is_right(context) else []
        if problems:
            first = problems[0]
            more = (
                f" {len(problems) - 1} more: {'; '.join(p.what for p in problems[1:4])}."
                if problems[1:]
                else ""
            )
            return self.failed(
                f"{first.what}.{more}",
                table,
                where=place(context.port, first.line),
                next=first.next,
                job=job,
                causes=()
                if "packed_modules_mapping" in first.what
                else (
                    "`prefix` or `quant_config` is not handed down from the module that holds it",
                ),
            )
        names = [row["prefix"] for row in rows]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            return self.failed(
                f"Two layers are called {twice[0]!r}.",
                table,
                where=context.port.modeling.name,
                job=job,
            )
        asked = sum(row["quant"] is not None for row in rows)
        closed = sorted({row["closed"] for row in rows if row["closed"]})
        return self.passed(
            f"{len(rows)} layers carry their own path; {asked} would follow a quantisation."
            + (
                f" vLLM's {' and '.join(closed)} can be given no quant_config: its linears stay "
                "as they are."
                if closed
                else ""
            ),
            table,
            job=job,
        )

    def _mapper_is_right(self, context: CheckContext) -> bool:
        """Whether the port is right with weights loaded by its own mapper and not otherwise."""

        def start(loader: str) -> JobResult:
            return gather(context, self.id, "rehearsal", timeout=240.0, ranks=1, loader=loader)

        if not works_with(context):
            run_with_a_loader(context, start, wrong_cases)
        return works_with(context) == "port"


class ImpossibleRanks(Check):
    """Rank counts that cannot work are refused with a reason, and no others are.

    For 1 to 8 ranks: what the config rules out, what vLLM says before it starts, what the port's
    constructors say. Nobody should meet a shape error from inside a forward.
    """

    id = "impossible_ranks"
    step = STEP
    title = "Impossible rank counts are refused in words"
    requires = ("layer_classes",)

    def run(self, context: CheckContext) -> Verdict:
        job = gather(context, self.id, "layout")
        if not job.ok:
            return self.failed_job(job, next=layers.advice_on_start(job.what))
        ranks = job.value["ranks"]
        table = Table(
            "Ranks that this model allows",
            ("ranks", "config", "vLLM, before it starts", "the port's constructors"),
            tuple(
                (
                    int(n),
                    f"no: {r['config']}" if r["config"] else "possible",
                    r["vllm"] or "nothing against it",
                    f"{r['error']['what']} ({r['error']['where']})" if r["error"] else "built",
                )
                for n, r in ranks.items()
            ),
        )
        for n, answer in ranks.items():
            error = answer["error"]
            # Without a kernel for a rank's part of the experts here, there may be one elsewhere.
            refused = error and error["next"] != NEXT
            if not answer["config"] and not answer["vllm"] and refused:
                return self.failed(
                    f"{n} ranks are possible by the config, but the port refuses them: "
                    f"{error['what']}",
                    table,
                    where=error["where"],
                    job=job,
                    next="With more ranks than KV heads vLLM copies a head: use max(1, "
                    "total_num_kv_heads // tp_size), "
                    "and assert only what the layers need.",
                    causes=(
                        "an assertion that KV heads divide by the TP size",
                        "a size is divided by the TP size twice",
                    ),
                )
            if answer["config"] and not answer["vllm"] and not error:
                return self.failed(
                    f"{n} ranks cannot work ({answer['config']}), but neither vLLM nor the port "
                    f"says so.",
                    table,
                    where=context.port.modeling.name,
                    job=job,
                    next="Assert it in __init__ with both numbers in the message.",
                    causes=("a layer that should be divided is not a parallel layer",),
                )
            if (
                answer["config"]
                and not answer["vllm"]
                and error["type"] not in ("AssertionError", "ValueError")
            ):
                return self.failed(
                    f"{n} ranks cannot work ({answer['config']}); a user would read: "
                    f"{error['what']}",
                    table,
                    where=error["where"],
                    job=job,
                    next="Assert it in __init__ with both numbers in the message.",
                )
        refused = [n for n, r in ranks.items() if r["config"]]
        allowed = ", ".join(n for n, r in ranks.items() if not r["config"])
        return self.passed(
            f"Of 1 to 8 ranks, this model allows {allowed}; the {len(refused)} others are "
            f"refused with the reason.",
            table,
            job=job,
        )


CHECKS = (
    LayerClasses,
    Prefixes,
    RehearsalTp1,
    RehearsalTp2,
    RehearsalTp4,
    RehearsalPp2,
    ImpossibleRanks,
    LoraAdapters,
    QuantisedRun,
)


def _shape(shape: list[int] | None) -> str:
    return "x".join(map(str, shape)) if shape else ""
