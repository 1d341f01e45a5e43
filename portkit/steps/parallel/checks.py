"""Checks of step `parallel`: vLLM's layers, their names, and N ranks on whatever devices there are.

Weights are still loaded by portkit (live/loader.py). Two jobs give most of the evidence: `layout`
builds the port's layers without weights, for every number of ranks; `rehearsal` runs them.
"""

from __future__ import annotations

from typing import Any, ClassVar

from portkit.analysis.facts import facts_of
from portkit.checks.base import Check, CheckContext
from portkit.checks.verdict import Table, Verdict
from portkit.errors import PortkitError
from portkit.live import layers
from portkit.live.checkpoint import open_checkpoint
from portkit.live.evidence import gather
from portkit.live.job import JobResult
from portkit.live.rank_counts import possible, refusal
from portkit.port import Port

STEP = "parallel"

NOT_DIVIDED = "a size still counts all heads: divide num_heads and num_kv_heads by the TP size before q_size and kv_size are computed"
SPLIT_ORDER = (
    "qkv is split in another order, or by other sizes, than [q_size, kv_size, kv_size] of this rank"
)
NOT_REDUCED = (
    "a RowParallelLinear has reduce_results=False, and nothing all-reduces its partial sums"
)


def place(port: Port, line: int) -> str:
    """Return "file:line: the text there" for a line of the port's modeling file."""
    text = port.source.splitlines()
    shown = text[line - 1].strip() if 0 < line <= len(text) else ""
    return f"{port.modeling.name}:{line}: {shown}" if shown else port.modeling.name


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
            return self.failed_job(job)
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
    """Every layer was given its own path as `prefix`, and `quant_config`; fused layers are declared.

    A quantised checkpoint says by name which layers it quantised: a layer with another name, or
    without the config, is loaded wrongly or stays as it is, mostly without an error.
    """

    id = "prefixes"
    step = STEP
    title = "Each layer knows its name and the quantisation"

    def run(self, context: CheckContext) -> Verdict:
        job = gather(context, self.id, "layout")
        if not job.ok:
            return self.failed_job(job, next=_prefix_remedy(job))
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
                causes=(
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
        return self.passed(
            f"{len(rows)} layers carry their own path; {asked} would follow a quantisation.",
            table,
            job=job,
        )


def _prefix_remedy(job: JobResult) -> str:
    if "Duplicate layer name" in job.what:
        return 'Give each Attention its own name: prefix=f"{prefix}.attn", the layer\'s prefix handed down from make_layers.'
    return ""


class _Rehearsal(Check):
    """What the rehearsals have in common."""

    step = STEP
    ranks: ClassVar[int]
    timeout = 240.0

    def run(self, context: CheckContext) -> Verdict:
        port = context.port
        checkpoint = open_checkpoint(port.checkpoint)
        reason = refusal(checkpoint.config, self.ranks)
        if reason:
            allowed = ", ".join(map(str, possible(checkpoint.config)))
            return self.skipped(
                f"This model cannot run on {self.ranks} ranks: {reason}. It allows {allowed}."
            )
        layout = gather(context, self.id, "layout")
        job = gather(
            context,
            self.id,
            "rehearsal",
            timeout=self.timeout,
            ranks=self.ranks,
            loader=loader_of(context),
        )
        if not job.ok:
            return self._stopped(context, job, layout)
        found = job.value
        tables = [_cases(found)]
        talks = []
        if layout.ok and self.ranks > 1:
            talks = layers.talks(layout.value, found["collectives"][0])
            tables += [_talk_table(talks), _share_table(layout.value, self.ranks)]
        bad = [case for case in found["cases"] if not case["ok"]]
        if bad:
            return self._differs(context, job, bad, talks, tables)
        if len({str(rank) for rank in found["collectives"]}) > 1:
            return self.failed(
                "The ranks make different collective calls: on other devices they would wait for "
                "each other for ever.",
                *tables,
                where=port.modeling.name,
                job=job,
                next="Look for a branch on the rank around a layer or a collective.",
            )
        worst = max(case["max_abs"] for case in found["cases"])
        spare = [t.path for t in talks if t.spare]
        share = ""
        if layout.ok and self.ranks > 1:
            whole, part = layers.held(layout.value, self.ranks)
            share = f" Each rank holds {part / whole:.0%} of the parameters."
        note = f" {', '.join(spare)} talk more than they need to." if spare else ""
        return self.passed(
            f"On {found['how']}, every log-probability equals Transformers' to {worst:.1e} "
            f"(tolerance {found['tolerance'][0]:g}).{share}{note}",
            *tables,
            job=job,
        )

    def _stopped(self, context: CheckContext, job: JobResult, layout: JobResult) -> Verdict:
        causes: tuple[str, ...] = ()
        if self.ranks > 1:
            causes = (
                NOT_DIVIDED,
                SPLIT_ORDER,
                "a layer that divides its output is followed by one that expects all of it: "
                "Column before Row, "
                "and input_is_parallel left at True",
            )
            if job.status == "timeout":
                causes = (
                    "a collective is called on some ranks only: the others wait for it for ever",
                )
        elif "packed_modules_mapping" in job.next or "no tensor of the checkpoint" in job.what:
            causes = (
                "a fused layer's parts are missing in packed_modules_mapping",
                "a layer has another attribute name than in Transformers",
            )
        where = job.where or context.port.modeling.name
        if "out of bounds" in job.what and not job.where:
            causes = (
                "compute_logits returns the padded vocabulary: LogitsProcessor cuts the rows "
                "beyond it off",
            )
        what = (
            job.what if self.ranks == 1 else f"On {self.ranks} ranks the port stopped: {job.what}"
        )
        return self.failed(
            what, where=where, next=job.next, causes=causes, log=job.log_tail, job=job
        )

    def _differs(
        self,
        context: CheckContext,
        job: JobResult,
        bad: list[dict[str, Any]],
        talks: list[layers.Talk],
        tables: list[Table],
    ) -> Verdict:
        found = job.value
        worst = max(bad, key=lambda c: c["max_abs"])
        what = (
            f"On {found['how']}, {len(bad)} of {len(found['cases'])} prompts differ from "
            f"Transformers: "
            f"{worst['name']}, by {worst['max_abs']:.3g} from position {worst['position']} on "
            f"(tolerance {found['tolerance'][0]:g})."
        )
        where, next, causes = context.port.modeling.name, "", []
        silent = [t for t in talks if t.missing]
        divergence = found.get("divergence") or {}
        if divergence.get("what"):
            what += f" First diverging module: {divergence['path']}: {divergence['what']}."
            where = divergence["where"] or where
            causes += divergence["causes"]
        if silent:
            what += f" {silent[0].path} makes no all-reduce: its partial sums stay on their rank."
            where = place(context.port, silent[0].line)
            causes.append(NOT_REDUCED)
            next = "Leave reduce_results at its default (True), or all-reduce the sum where the branches meet."
        elif self.ranks > 1:
            spare = [t.path for t in talks if t.spare]
            if spare:
                causes.append(f"{', '.join(spare)} sums over the ranks more than once")
            causes += [
                NOT_DIVIDED,
                SPLIT_ORDER,
                "a norm over all heads (QK-norm) sees this rank's heads only: gather before it",
                "ALiBi slopes, sinks or other per-head values are not cut to this rank's heads",
                "a bias is added on every rank before the all-reduce",
            ]
            next = "TP=1 is right, so look at what depends on the TP size: head counts, splits, reductions."
        else:
            causes += [
                "q, k and v are split in another order than they were packed",
                "gate and up are swapped: SiluAndMul applies silu to the first half",
                "packed_modules_mapping lists the parts in another order than the layer has them",
            ]
            next = "Mend that place; `forward` was right before this step, so compare with it: git diff."
        return self.failed(
            what, *tables, where=where, next=next, causes=tuple(dict.fromkeys(causes)), job=job
        )


class RehearsalTp1(_Rehearsal):
    """The port with vLLM's layers, on one rank, gives Transformers' log-probabilities.

    Prefill in one batch and greedy decoding, float32, the whole vocabulary.
    """

    id = "rehearsal_tp1"
    title = "One rank equals Transformers"
    requires = ("layer_classes",)
    ranks = 1


class RehearsalTp2(_Rehearsal):
    """Two tensor-parallel ranks together give Transformers' log-probabilities.

    Real processes and real collectives: over gloo where there are fewer devices than ranks. Shows
    each rank's share of every weight and what the ranks say to each other in one forward.
    """

    id = "rehearsal_tp2"
    title = "Two ranks equal Transformers"
    requires = ("rehearsal_tp1",)
    ranks = 2


class RehearsalTp4(_Rehearsal):
    """Four tensor-parallel ranks too; with fewer KV heads than ranks, each holds a copy of one."""

    id = "rehearsal_tp4"
    title = "Four ranks equal Transformers"
    requires = ("rehearsal_tp2",)
    ranks = 4


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
            return self.failed_job(job)
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
            if not answer["config"] and not answer["vllm"] and error:
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


class QuantisedRun(Check):
    """A quantised copy of the checkpoint runs: the right layers, the right scales, the right numbers.

    portkit rounds the checkpoint to 8 bits (compressed-tensors, a scale per row, an ignore list
    with the parts of a fused layer) and compares with Transformers computing with the same
    rounding. Proves nothing about the quality that a quantised model has.
    """

    id = "quantised_run"
    step = STEP
    title = "A quantised checkpoint runs as its config says"
    requires = ("rehearsal_tp1",)

    def run(self, context: CheckContext) -> Verdict:
        job = context.live.run("quantised", progress=context.progress, loader=loader_of(context))
        if not job.ok:
            return self.failed(
                f"The quantised copy does not run: {job.what}",
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
            return self.skipped(f"There is nothing to quantise: {found['nothing']}.", job=job)
        table = Table(
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
        wrong = [r for r in found["layers"] if r["known"] and r["expected"] != r["actual"]]
        if wrong:
            first = wrong[0]
            says = "quantised" if first["expected"] else "ignored, as it is"
            return self.failed(
                f"By the config {first['path']} is {says}, but vLLM runs it "
                f"{'quantised' if first['actual'] else 'unquantised'} ({len(wrong)} such layers).",
                table,
                job=job,
                where=first["path"],
                next="The check `prefixes` names the line.",
                causes=(
                    "quant_config is not passed to that layer",
                    "its prefix is not its path",
                    "packed_modules_mapping does not name its parts",
                ),
            )
        part, reason = found["tolerance"]
        limit = max(part * found["effect"], 1e-4)
        cases = Table(
            "Against Transformers, rounded alike",
            ("prompt", "mean difference", "largest", "what quantising changes (mean)"),
            tuple(
                (c["name"], f"{c['mean']:.1e}", f"{c['max']:.1e}", f"{c['effect']:.1e}")
                for c in found["cases"]
            ),
            f"Tolerance: {part:g} of what quantising changes: {reason}.",
        )
        # A NaN is no number below the limit either.
        if not found["difference"] <= limit:
            return self.failed(
                f"Quantised, the log-probabilities differ from Transformers quantised alike by "
                f"{found['difference']:.2g} "
                f"in the mean; quantising itself changes them by {found['effect']:.2g}.",
                table,
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
            f"says; the mean difference "
            f"to Transformers with the same rounding is {found['difference']:.1e} (limit "
            f"{limit:.1e}).",
            table,
            cases,
            job=job,
        )


def _says(row: dict[str, Any]) -> str:
    if not row["known"]:
        return "nothing: not a linear of the original"
    return "quantised" if row["expected"] else "ignored"


CHECKS = (
    LayerClasses,
    Prefixes,
    RehearsalTp1,
    RehearsalTp2,
    RehearsalTp4,
    ImpossibleRanks,
    QuantisedRun,
)


def loader_of(context: CheckContext) -> str:
    """The port's own load_weights once there is one, portkit's loader before."""
    return "port" if "def load_weights" in context.port.source else "portkit"


def _shape(shape: list[int] | None) -> str:
    return "x".join(map(str, shape)) if shape else ""


def _cases(found: dict[str, Any]) -> Table:
    return Table(
        "Against Transformers",
        ("prompt", "positions", "largest difference", "within tolerance"),
        tuple(
            (c["name"], c["rows"], f"{c['max_abs']:.1e}", "yes" if c["ok"] else "NO")
            for c in found["cases"]
        ),
        f"Tolerance {found['tolerance'][0]:g}: {found['tolerance'][1]}.",
    )


def _talk_table(talks: list[layers.Talk]) -> Table:
    return Table(
        "Collectives in one forward",
        ("module", "modules", "each calls", "each needs"),
        tuple((t.path, t.modules, t.counted, t.needed) for t in talks),
    )


def _share_table(layout: dict[str, Any], ranks: int) -> Table:
    try:
        rows = layers.shares(layout, ranks)
    except (KeyError, IndexError) as error:
        raise PortkitError(
            f"The shares of {ranks} ranks are not known.", "", "Run the check again."
        ) from error
    return Table(
        f"A rank's share of each weight, {ranks} ranks",
        ("parameter", "class", "whole", "on a rank", "fraction", "note"),
        tuple(rows),
        "Whole sizes include the vocabulary's padding to a multiple of 64.",
    )
