"""Parameters that are loaded and that nothing depends on."""

from __future__ import annotations

from portkit.checks.base import Check, CheckContext
from portkit.checks.verdict import Table, Verdict
from portkit.live.layers import pattern
from portkit.steps.forward.parity import STEP, evidence


class UsedParameters(Check):
    """Every parameter of the port moves its answer when it is changed.

    Sees what parity cannot: a norm that is never called and whose weight in this checkpoint is all
    ones, a bias of zeros that is never added. A parameter that moves nothing in Transformers either
    is none of the port's faults.
    """

    id = "used_parameters"
    step = STEP
    title = "Every parameter has a say in the answer"
    requires = ("prefill_parity",)

    def run(self, context: CheckContext) -> Verdict:
        job = evidence(context)
        if not job.ok:
            return self.failed_job(job)
        found = job.value.get("influence")
        if found is None:
            return self.skipped("Prefill does not agree with Transformers yet", job=job)
        if "error" in found:
            error = found["error"]
            return self.failed(
                f"The port's code stopped with a parameter changed: {error['what']}",
                where=error["where"],
                next=error["next"],
                log=error["log"],
                job=job,
            )
        kinds: dict[str, list[float]] = {}
        for name, distance in found["moves"].items():
            kinds.setdefault(pattern(name), []).append(distance)
        table = Table(
            "Parameters, each changed by itself",
            ("parameter", "tried", "log-probabilities move by at least"),
            tuple((kind, len(moves), f"{min(moves):.1e}") for kind, moves in kinds.items()),
            "; ".join(f"{r['name']}: {_moves(r['moves_original'])}" for r in found["silent"]),
        )
        left = found["of"] - len(found["moves"])
        rest = f" {left} more were not tried: experts that are packed, or for time." if left else ""
        unused = [row for row in found["silent"] if row["moves_original"] != 0.0]
        if unused:
            first = unused[0]
            more = ", ".join(row["name"] for row in unused[1:4])
            return self.failed(
                f"{first['name']} is loaded, but nothing depends on it: with other values the "
                f"port answers the same."
                + (f" The same holds for {more}{', ...' if unused[4:] else ''}." if more else ""),
                table,
                where=first["where"] or context.port.modeling.name,
                next="Call the module in forward, and use what it returns. If the original has no "
                "such layer, leave it out.",
                causes=(
                    "forward never calls the module that holds it, or drops what it returns; this "
                    "checkpoint's values (ones, zeros) hide that",
                    "the port makes a layer that the original does not have",
                ),
                job=job,
            )
        return self.passed(
            f"Of {len(found['moves'])} parameters, each changed by itself, every one that moves "
            f"Transformers' answer moves the port's.{rest}",
            table,
            job=job,
        )


def _moves(distance: float | None) -> str:
    if distance is None:
        return "Transformers has no parameter of that name"
    if not distance:
        return "it moves nothing in Transformers either"
    return f"in Transformers it moves log-probabilities by {distance:.1e}"
