"""The rehearsals of step `parallel`: the port on 1, 2 and 4 ranks, beside Transformers."""

from __future__ import annotations

import ast
from typing import Any, ClassVar

from portkit.checks.base import Check, CheckContext, place
from portkit.checks.verdict import Table, Verdict
from portkit.errors import PortkitError
from portkit.live import rank_layout
from portkit.live.checkpoint import open_checkpoint
from portkit.live.evidence import gather, run_with_a_loader
from portkit.live.job import JobResult
from portkit.live.missing_kernels import EXPERTS, NEXT
from portkit.live.rank_counts import possible, refusal

STEP = "parallel"

NOT_DIVIDED = (
    "a size still counts all heads: divide num_heads and num_kv_heads by the TP size before q_size "
    "and kv_size are computed"
)
KV_COPIES = (
    "there are fewer KV heads than ranks: each rank then keeps a copy of one of them, num_kv_heads "
    "= max(1, total_num_kv_heads // tp_size), as QKVParallelLinear does"
)
LOGITS_BY_HAND = (
    "compute_logits does without LogitsProcessor, which gathers the rows of the vocabulary that "
    "the ranks hold and cuts the padding off"
)
LOGITS_OF_A_RANK = (
    "a rank's head has its rows of the vocabulary alone, weight and bias: what LogitsProcessor "
    "returns is gathered, all of them. It adds the head's bias before that if it is handed over: "
    "self.logits_processor(self.lm_head, hidden_states, self.lm_head.bias)"
)
SPLIT_ORDER = (
    "qkv is split in another order, or by other sizes, than [q_size, kv_size, kv_size] of this rank"
)
NOT_REDUCED = (
    "a RowParallelLinear has reduce_results=False, and nothing all-reduces its partial sums"
)


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

        def start(loader: str) -> JobResult:
            return gather(
                context,
                self.id,
                "rehearsal",
                timeout=self.timeout,
                ranks=self.ranks,
                loader=loader,
            )

        job = run_with_a_loader(context, start, wrong_cases)
        if not job.ok and self.ranks > 1 and EXPERTS in job.what:
            return self.skipped(
                f"This build of vLLM has no kernel for what experts leave each of {self.ranks} "
                f"ranks at this size. {NEXT}",
                job=job,
            )
        if not job.ok:
            return self._stopped(context, job, layout)
        found = job.value
        tables = [cases_table(found)]
        talks = []
        if layout.ok and self.ranks > 1:
            talks = rank_layout.talks(layout.value, found["collectives"][0])
            tables += [talk_table(talks), rank_table(found), _share_table(layout.value, self.ranks)]
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
            whole, part = rank_layout.held(layout.value, self.ranks)
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
        by_hand = 0
        if self.ranks > 1:
            causes = (
                NOT_DIVIDED,
                SPLIT_ORDER,
                "a layer that divides its output is followed by one that expects all of it: "
                "Column before Row, "
                "and input_is_parallel left at True",
            )
            kv_heads = open_checkpoint(context.port.checkpoint).config.get("num_key_value_heads")
            if isinstance(kv_heads, int) and kv_heads < self.ranks:
                causes = (KV_COPIES, *causes)
            by_hand = _logits_by_hand(context.port.source)
            if by_hand:
                causes = (LOGITS_BY_HAND, *causes)
            elif "in compute_logits" in job.where:
                causes = (LOGITS_OF_A_RANK, *causes)
            if job.status == "timeout":
                causes = (
                    "a collective is called on some ranks only: the others wait for it for ever",
                )
        elif "packed_modules_mapping" in job.next or "no tensor of the checkpoint" in job.what:
            causes = (
                "a fused layer's parts are missing in packed_modules_mapping",
                "a layer has another attribute name than in Transformers",
            )
        where = job.where or place(context.port, by_hand)
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
        talks: list[rank_layout.Talk],
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
            causes.insert(0, NOT_REDUCED)
            next = (
                "Leave reduce_results at its default (True), or all-reduce the sum where the "
                "branches meet."
            )
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
            next = (
                "TP=1 is right, so look at what depends on the TP size: head counts, splits, "
                "reductions."
            )
        else:
            causes += [
                "q, k and v are split in another order than they were packed",
                "gate and up are swapped: SiluAndMul applies silu to the first half",
                "packed_modules_mapping lists the parts in another order than the layer has them",
            ]
            next = (
                "Mend that place; `forward` was right before this step, so compare with it: "
                "git diff."
            )
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


def wrong_cases(value: dict[str, Any]) -> int:
    """Return how many prompts differ, fewer the further the first diverging module."""
    bad = sum(not case["ok"] for case in value["cases"])
    return bad and 10_000 * bad - min((value.get("divergence") or {}).get("walked", 0), 9_999)


def cases_table(found: dict[str, Any]) -> Table:
    return Table(
        "Against Transformers",
        ("prompt", "positions", "largest difference", "within tolerance"),
        tuple(
            (c["name"], c["rows"], f"{c['max_abs']:.1e}", "yes" if c["ok"] else "NO")
            for c in found["cases"]
        ),
        f"Tolerance {found['tolerance'][0]:g}: {found['tolerance'][1]}.",
    )


def rank_table(found: dict[str, Any]) -> Table:
    """Return what each rank holds: bytes, heads, copies of KV heads, rows of the vocabulary."""
    rows = tuple(
        (
            f"{s['rank']}" + (f" of stage {s['stage']}" if found.get("stages", 1) > 1 else ""),
            f"{s['bytes'] / (1 << 20):.2f}",
            s["attentions"],
            s["heads"],
            f"{s['kv_heads']}" + (f" (a copy on {s['kv_copies']})" if s["kv_copies"] > 1 else ""),
            s["vocab_rows"],
            s["summed_biases"],
        )
        for s in found["sizes"]
    )
    padding = max(s["vocab_padding"] for s in found["sizes"])
    return Table(
        "What each rank holds",
        (
            "rank",
            "weights, MiB",
            "attentions",
            "heads",
            "KV heads",
            "rows of the vocabulary",
            "biases after a sum",
        ),
        rows,
        f"The vocabulary is padded by {padding} rows, which LogitsProcessor cuts off. A bias after "
        "a sum over ranks is added by the first rank alone.",
    )


def talk_table(talks: list[rank_layout.Talk]) -> Table:
    return Table(
        "Collectives in one forward",
        ("module", "modules", "each calls", "each needs"),
        tuple((t.path, t.modules, t.counted, t.needed) for t in talks),
    )


def _share_table(layout: dict[str, Any], ranks: int) -> Table:
    try:
        rows = rank_layout.shares(layout, ranks)
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


def _logits_by_hand(source: str) -> int:
    """Return the line of a compute_logits that calls no module of the port; 0 if none."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name == "compute_logits":
            calls = [ast.unparse(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)]
            if not any(name.startswith("self.") for name in calls):
                return node.lineno
    return 0
