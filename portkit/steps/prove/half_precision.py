"""Check of step `prove`: half precision with a budget per layer, and the module that exceeds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from portkit.checks.base import Check, CheckContext
from portkit.checks.verdict import Table, Verdict
from portkit.live.missing_kernels import NEXT

BUDGET = 2.0
"""How many times Transformers' own loss a layer may lose. Of 95 drafts on a CPU one lost 1.92 times
it (FlexOlmo: vLLM's router for CPUs takes the softmax in bfloat16), the others at most 1.34."""
DEFAULT = (
    "vLLM builds and runs a model under its own dtype: torch.arange(n) / n, torch.ones(n) and "
    "torch.tensor(0.1) in the port are {dtype} there, and float32 only by .float() or dtype=."
)
CAUSES = {
    "angles": "Frequencies or angles of the rotary embedding are {dtype}: whole numbers are exact "
    "up to 256 in bfloat16 only. positions.float() * inv_freq, both float32.",
    "attn": "A mask, slopes (ALiBi), a scale or sinks that the attention takes are {dtype}.",
    "kept": "The original computes this in float32 (.float(), dtype=torch.float32 in its forward) "
    "and the port in {dtype}.",
}


@dataclass(frozen=True)
class OverBudget:
    """The first place, in the original's order, that loses more than its budget."""

    what: str
    where: str
    causes: tuple[str, ...]


def over_budget(value: dict[str, Any]) -> OverBudget | None:
    """Return the first place of a job's value that is over its budget."""
    first = next((row for row in value["rows"] if not row["ratio"] <= BUDGET), None)
    if first is None:
        return None
    role, dtype = first["role"], value["dtype"]
    names = {"q": "queries of", "k": "keys of", "v": "values of", "attn": "attention in"}
    kinds = ["angles"] if role in ("q", "k") else ["attn"] if role == "attn" else []
    return OverBudget(
        f"In {dtype} the {names.get(role, role + 'put of')} {first['path']} "
        f"{'are' if role in 'qkv' else 'is'} {first['ratio']:.1f} times as far from exact as "
        f"Transformers' own in {dtype}; {BUDGET:g} is the budget.",
        first["where"],
        tuple(
            t.format(dtype=dtype) for t in (*(CAUSES[k] for k in kinds), DEFAULT, CAUSES["kept"])
        ),
    )


class HalfPrecision(Check):
    """In the precision that vLLM chooses by itself, each layer loses no more than its budget.

    The budget is twice what Transformers' own layer loses in that precision, from the same input:
    both against that layer computed in float32, over 400 tokens and four decoded ones. What is
    right in float32 and rounded too often, or built in the wrong dtype, is named by module. Eager:
    compiled code may keep in float32 what forward rounds. The whole model's loss, compiled, is for
    `as_users_run_it`.
    """

    id = "half_precision"
    step = "prove"
    title = "Half precision, layer by layer"

    def run(self, context: CheckContext) -> Verdict:
        job = self.job(context, "half_precision", loader=context.loader or "port")
        if not job.ok and job.next == NEXT:
            return self.skipped(f"It cannot be judged on this machine. {job.what}. {NEXT}", job=job)
        if not job.ok:
            return self.failed_job(job)
        value = job.value
        table = _table(value)
        if found := over_budget(value):
            return self.failed(
                found.what,
                table,
                where=found.where or context.port.module,
                causes=found.causes,
                next="Compute it in float32 there and convert the result; or use vLLM's own layer.",
                job=job,
            )
        if not value["reaches_the_end"]:
            return self.skipped(
                "The port's last layer does not agree with Transformers in float32 yet: mend that "
                "first (portkit check weights), then what half precision costs can be judged.",
                table,
                job=job,
            )
        worst = max(value["rows"], key=lambda row: row["ratio"])
        return self.passed(
            f"In {value['dtype']}, {len(value['rows'])} places of "
            f"{sum(layer['same'] for layer in value['layers'])} layers lose at most "
            f"{worst['ratio']:.1f} times what Transformers' own lose ({worst['path']}); "
            f"{BUDGET:g} is the budget.",
            table,
            job=job,
        )


def _table(value: dict[str, Any]) -> Table:
    paths = [layer["path"] for layer in value["layers"]]
    rows = []
    for path in paths:
        inside = [r for r in value["rows"] if f"{r['path']}.".startswith(f"{path}.")]
        if not inside:
            rows.append((path, "not comparable", "", "", ""))
            continue
        last, worst = inside[-1], max(inside, key=lambda r: r["ratio"])
        name = worst["path"].removeprefix(path).lstrip(".") or "the layer"
        rows.append(
            (
                path
                if last["path"] == path
                else f"{path}, up to {last['path'].removeprefix(path + '.')}",
                f"{last['ours'][0]:.1e}",
                f"{last['theirs'][0]:.1e}",
                f"{last['ratio']:.2f}",
                f"{worst['ratio']:.2f} ({name}, {worst['role']})",
            )
        )
    apart = [layer["path"] for layer in value["layers"] if not layer["same"]]
    cut = (
        f" The outputs of {len(apart)} layers are cut elsewhere in the port: what comes behind "
        "carries their rounding along, on both sides."
        if apart
        else ""
    )
    return Table(
        f"{value['dtype']}, {value['tokens']} tokens: |value - exact| / |exact| of layers' outputs",
        ("layer", "port", "Transformers", "port / Transformers", "worst place inside"),
        tuple(rows),
        note="Median over the tokens; the ratios are the larger of the median's and the upper "
        f"quartile's. Compared: {len(value['rows'])} of the original's {value['places']} places."
        + cut,
    )
