"""Adapters: what a LoRA adapter of the original model does to the port."""

from __future__ import annotations

import re
from typing import Any

from portkit.checks.base import Check, CheckContext, place
from portkit.checks.verdict import Table, Verdict
from portkit.live.checkpoint import open_checkpoint
from portkit.live.evidence import gather, has_load_weights
from portkit.live.job import JobResult
from portkit.live.rank_counts import refusal
from portkit.steps.parallel.rehearsals import STEP
from portkit.steps.weights.parity import line_of_loading

MAPPING = "packed_modules_mapping"
CAUSES = (
    f"{MAPPING} does not name a fused layer's parts, or in another order than the layer has them",
    "a layer has another name than in Transformers, and no hf_to_vllm_mapper on the class says so",
    "load_weights puts a layer's rows in another order, which vLLM does not do with an adapter",
)
ON_RANKS = (
    "load_weights deals a weight's rows or columns out to the ranks in another way than one piece "
    "to each, which is how vLLM cuts an adapter",
    "several layers of the checkpoint are one ColumnParallelLinear: a rank's piece is of one of "
    "them, where a MergedColumnParallelLinear has a piece of each",
    "forward cuts or gathers a layer's output by rank itself",
)
CUT_BY_HAND = (
    "Give that layer the class that cuts it as vLLM cuts adapters (QKVParallelLinear, "
    "MergedColumnParallelLinear), or leave SupportsLoRA out."
)


class LoraAdapters(Check):
    """LoRA adapters do to the port what they do to Transformers' model.

    One that trains start from (B is zero) changes nothing; a random one on all linear layers moves
    every log-probability as Transformers with W + scale * B @ A is moved. Both are in peft's
    format and name layers as Transformers does. If they differ, one adapter per layer name says
    which goes astray. The same on two ranks, where each takes its part of A or of B. Proves
    nothing about adapters of embeddings, head and experts.
    """

    id = "lora"
    step = STEP
    title = "LoRA adapters reach the layers they are for"
    requires = ("rehearsal_tp1",)

    def run(self, context: CheckContext) -> Verdict:
        job, loader = self._job(context)
        port = context.port
        if not job.ok:
            return self.failed(
                f"With LoRA switched on the port stopped: {job.what}",
                where=job.where or port.modeling.name,
                next=job.next
                or "Without LoRA it runs: each linear is wrapped in a layer of "
                "vLLM's then, so call it and leave its inside alone.",
                causes=("forward reads a linear's weight itself instead of calling it", *CAUSES),
                log=job.log_tail,
                job=job,
            )
        found = job.value
        if "nothing" in found:
            return self.skipped(f"No adapter can be tried: {found['nothing']}.", job=job)
        tables = _tables(found)
        if _off_in_half(found):
            return self.skipped(
                f"No adapter can be judged: without one the port is away from Transformers by "
                f"{found['unadapted']['max_abs']:.3g} in float16 (tolerance "
                f"{found['tolerance'][0]:.2g}: {found['tolerance'][1]}). In float32 it is right.",
                *tables,
                job=job,
            )
        if not found["zero"]["ok"] and not found["zero"]["error"]:
            return self.failed(
                f"An adapter that changes nothing moves the log-probabilities by "
                f"{found['zero']['max_abs']:.3g} (tolerance {found['tolerance'][0]:g}).",
                *tables,
                where=port.modeling.name,
                next="Without LoRA the port is right: look for code that asks for a linear's "
                "class or weight.",
                causes=("forward reads a linear's weight itself instead of calling it",),
                job=job,
            )
        astray = [row for row in found["parts"] if not row["ok"]]
        if astray:
            return self._astray(context, job, astray, tables)
        if not found["all"]["ok"]:
            return self.failed(
                f"Each layer's adapter alone is right, all of them together differ from "
                f"Transformers by {found['all']['max_abs']:.3g}.",
                *tables,
                where=port.modeling.name,
                causes=CAUSES,
                job=job,
            )
        said = (
            f"An adapter of {len(found['layers'])} linear layers moves log-probabilities by up to "
            f"{found['effect']:.2g}, "
            + f"as Transformers' to {_near(found)} (tolerance {found['tolerance'][0]:.2g}); each "
            f"layer adds scale * B @ A of its own input, to {found['all']['furthest']:.1e} of it; "
            "one with B = 0 moves none."
        )
        if reason := refusal(open_checkpoint(port.checkpoint).config, 2):
            return self.passed(f"{said} Two ranks: {reason}.", *tables, job=job)
        two = gather(context, self.id, "lora", loader=loader, ranks=2)
        if loader == "port" and not context.loader and two.ok and not _loaded_right(two.value):
            # What load_weights does on two ranks is for `load_parity_tp2` to say.
            two = gather(context, self.id, "lora", loader="portkit", ranks=2)
        wrong = self._on_ranks(context, two)
        return wrong or self.passed(f"{said} {_alike(two.value)}", *tables, job=job)

    def _on_ranks(self, context: CheckContext, job: JobResult) -> Verdict | None:
        """Return what is wrong on two ranks; None if nothing is. On one, all was right."""
        where = context.port.modeling.name
        if not job.ok:
            return self.failed(
                f"Adapters are right on one rank; on two the port stopped: {job.what}",
                where=job.where or where,
                next=job.next or CUT_BY_HAND,
                causes=ON_RANKS,
                log=job.log_tail,
                job=job,
            )
        found = job.value
        if "nothing" in found or _off_in_half(found):
            return None
        if found["zero"]["ok"] and found["all"]["ok"]:
            return None
        tables = _tables(found)
        if not found["zero"]["ok"] and not found["zero"]["error"]:
            return self.failed(
                f"Adapters are right on one rank; on two, one that changes nothing moves the "
                f"log-probabilities by {found['zero']['max_abs']:.3g}.",
                where=where,
                next="Does `rehearsal_tp2` pass? Without adapters the ranks must agree first.",
                job=job,
            )
        astray = [row for row in found["parts"] if not row["ok"]]
        if astray and {row["name"] for row in astray} <= {*found["repeated"], *found["halved"]}:
            return None  # not the port's: _alike says so
        names = ", ".join(row["name"] for row in astray) or "all layers together"
        by = astray[0]["max_abs"] if astray else found["all"]["max_abs"]
        error = astray[0]["error"] if astray else found["all"]["error"]
        return self.failed(
            "Adapters are right on one rank; on two, "
            + (f"vLLM cannot take one of {names}: {error}" if error else "")
            + ("" if error else f"one of {names} differs from Transformers by {by:.2g}."),
            *tables,
            where=self._place(context, astray[0]) if astray else where,
            next=CUT_BY_HAND,
            causes=ON_RANKS,
            job=job,
        )

    def _job(self, context: CheckContext) -> tuple[JobResult, str]:
        """Return what the job found with the port's own load_weights, if right, and the loader.

        What it does, packed_modules_mapping need not do: portkit's loader would be misled by the
        same mistake that misleads adapters.
        """
        own = context.loader or ("port" if has_load_weights(context.port) else "portkit")
        job = gather(context, self.id, "lora", loader=own)
        if context.loader or own == "portkit" or (job.ok and _loaded_right(job.value)):
            return job, own
        return gather(context, self.id, "lora", loader="portkit"), "portkit"

    def _astray(
        self,
        context: CheckContext,
        job: JobResult,
        astray: list[dict[str, Any]],
        tables: tuple[Table, ...],
    ) -> Verdict:
        first = astray[0]
        name = first["name"]
        ignored = (
            first["ours"] is not None
            and first["ours"] < job.value["tolerance"][0] < first["theirs"]
        )
        next = (
            f"Compare {MAPPING} with the parts of the layer that {name} is fused into, and its "
            "order with that of the output's split."
        )
        causes, where = CAUSES, ""
        if "expected target modules" in first["error"]:
            what = f"vLLM refuses an adapter of {name}: it knows no layer of that name."
            causes = (f"{MAPPING} does not name {name} as a part of a fused layer", *CAUSES[1:])
        elif first["error"]:
            what = f"vLLM cannot take an adapter of {name}: {first['error']}"
        elif first["like"]:
            what = f"The port applies {name}'s adapter to {first['like']}."
            causes = (f"{MAPPING} lists {name} in the place of {first['like']}", *CAUSES[1:])
        elif ignored and self._made(context, first):
            what = f"vLLM ignores an adapter of {name}: that layer of the port takes none."
            causes = (
                f"{MAPPING} does not name {name}: a layer that is fused in the checkpoint already "
                f'needs "{name}": ["{name}"]',
            )
        elif ignored:
            what = f"An adapter of {name} reaches no layer of the port: vLLM ignores it."
            where = line_of_loading(context.port)
            causes = (CAUSES[1], CAUSES[0])
            next = (
                "Adapters go by the names of Transformers' modules: put the renaming into "
                "hf_to_vllm_mapper on the class."
            )
        else:
            what = (
                f"An adapter of {name} moves the port by {first['ours']:.2g}, Transformers by "
                f"{first['theirs']:.2g}; they differ by {first['max_abs']:.2g}, and what a layer "
                f"adds to its own input is {first['furthest']:.2g} of it away from scale * B @ A."
            )
            causes = (CAUSES[2], *CAUSES[:2])
            next = (
                "If load_weights reorders this layer's rows, no adapter of it can be right: leave "
                "SupportsLoRA out, and vLLM refuses adapters in words."
            )
        others = ", ".join(row["name"] for row in astray[1:])
        return self.failed(
            what + (f" As wrong: {others}." if others else ""),
            *tables,
            where=where or self._place(context, first),
            next=next,
            causes=causes,
            job=job,
        )

    def _place(self, context: CheckContext, row: dict[str, Any]) -> str:
        """Return the line of packed_modules_mapping that names the layer, or that makes it."""
        port, name = context.port, row["name"]
        lines = port.source.splitlines()
        begin = next((n for n, text in enumerate(lines, 1) if MAPPING in text), 0)
        for number in range(begin, min(begin + 12, len(lines) + 1)) if begin else ():
            if re.search(rf"[\"']{name}[\"']", lines[number - 1]):
                return place(port, number)
        return place(port, begin or self._made(context, row))

    def _made(self, context: CheckContext, row: dict[str, Any]) -> int:
        """Return the line that makes the layer of that path, 0 if the port has none."""
        layout = gather(context, self.id, "layout")
        rows = layout.value["modules"] if layout.ok else []
        return next((m["line"] for m in rows if m["path"] == row["path"]), 0)


def _loaded_right(found: dict[str, Any]) -> bool:
    """Whether the port is right as long as an adapter changes nothing."""
    return "nothing" in found or found["zero"]["ok"] or bool(found["zero"]["error"])


def _off_in_half(found: dict[str, Any]) -> bool:
    """Whether the port, in the float16 that a GPU's LoRA kernels take, is off by itself."""
    return found["unadapted"] is not None and not found["unadapted"]["ok"]


def _alike(found: dict[str, Any]) -> str:
    if "nothing" in found:
        return f"On two ranks none can be tried: {found['nothing']}."
    if _off_in_half(found):
        return "On two ranks none can be judged: in float16 the port is off without one."
    if halved := ", ".join(n for n in found["halved"] if n in _wrong(found)):
        return (
            f"On two ranks those of {halved} go wrong, in any port: vLLM's own block makes one "
            "merged layer of what is one tensor of the checkpoint, and its LoRA cuts an adapter of "
            "such a layer as if it were gate and up (lora/layers/column_parallel_linear.py, "
            "slice_lora_b). Serve adapters on one rank."
        )
    if astray := ", ".join(_wrong(found)):
        return (
            f"On two ranks those of {astray} go wrong, in any port: vLLM's own block repeats parts "
            "of that layer for ranks (fewer groups than ranks) and cuts adapters as if it did not. "
            "Serve adapters on one rank, or on as many as divide the groups."
        )
    return f"On two ranks ({found['how']}) to {_near(found)}."


def _wrong(found: dict[str, Any]) -> list[str]:
    return [row["name"] for row in found["parts"] if not row["ok"]]


def _near(found: dict[str, Any]) -> str:
    """Say how near the port under an adapter is to Transformers under it."""
    if not found["by_layer"]:
        return f"{found['all']['max_abs']:.1e}"
    return (
        f"{found['all']['median']:.1e} on the prompt in the middle ({found['all']['max_abs']:.1e} "
        "on the furthest: rounding may lead a router to another expert)"
    )


def _tables(found: dict[str, Any]) -> tuple[Table, ...]:
    if not found["parts"]:
        return ()
    return (
        Table(
            "An adapter of one layer name at a time",
            ("layer", "moves Transformers by", "moves the port by", "they differ by", "verdict"),
            tuple(
                (
                    row["name"],
                    f"{row['theirs']:.2g}",
                    "refused" if row["ours"] is None else f"{row['ours']:.2g}",
                    f"{row['max_abs']:.1e}",
                    "alike" if row["ok"] else f"as {row['like']}'s" if row["like"] else "NOT ALIKE",
                )
                for row in found["parts"]
            ),
            f"Tolerance {found['tolerance'][0]:g}: {found['tolerance'][1]}.",
        ),
    )
