"""Config fields: what Transformers' source reads and the port does not."""

from __future__ import annotations

import math
import re
from typing import Any

from portkit.checks.base import Check, CheckContext, place
from portkit.checks.verdict import Table, Verdict
from portkit.live.evidence import gather
from portkit.steps.forward.parity import STEP


class ConfigFields(Check):
    """Every config field that Transformers' source reads is read by the port, or changes nothing.

    Fields that the port leaves out are given other values: Transformers' model is built with each
    and run. One that moves the answer is a fault that this checkpoint may hide, since it may have
    the value that does nothing (a scale of 1). Switches and names at their default are only told.
    Not covered: fields that change the weights' shapes (loading sees those) or make it no decoder.
    """

    id = "config_fields"
    step = STEP
    title = "No field of the config is passed over"
    requires = ("interface",)

    def run(self, context: CheckContext) -> Verdict:
        job = gather(context, self.id, "config_fields")
        if not job.ok:
            return self.failed_job(job)
        found = job.value
        rows = found["fields"]
        table = Table(
            f"Fields that {found['file']} reads and the port does not",
            ("field", "value", "read in", "tried", "log-probabilities move by"),
            tuple(
                (
                    row["name"],
                    str(row["value"]),
                    f"{row['class']}, line {row['line']}",
                    "" if row["effect"] is None else str(row["other"]),
                    _moved(row["effect"]),
                )
                for row in rows
            ),
            "With another value, and this checkpoint's weights, in Transformers.",
        )
        moving = [r for r in rows if r["effect"] and r["effect"] < math.inf]
        passed_over = [r for r in moving if not r["usual"]]
        if not passed_over:
            rest = "".join(
                f" config.{row['name']} is not read: the port is for {row['value']} alone."
                for row in moving
            )
            return self.passed(
                f"The port reads {len(found['read'])} fields of the config; beside them "
                f"{found['file']} reads {len(rows) - len(moving)}, of which none moves the answer."
                f"{rest}",
                table,
                job=job,
            )
        first = max(passed_over, key=lambda row: row["effect"])
        names = ", ".join(row["name"] for row in passed_over if row is not first)
        return self.failed(
            f"The port never reads config.{first['name']} ({first['value']} here): with "
            f"{first['other']} Transformers' log-probabilities move by up to {first['effect']:.2g}."
            + (f" Passed over as well: {names}." if names else ""),
            table,
            where=_place(context, first),
            next=f"Read it as {found['file']} does in line {first['line']} ({first['class']}), or "
            "refuse other values in __init__: a checkpoint that has another one would be served "
            "wrongly, without a word.",
            causes=(
                f"config.{first['name']} is left out: a multiplier, a cap or a switch that this "
                "checkpoint does not use, or uses with a value that hides it",
                "the port has the value as a constant, or reads a field of another name",
            ),
            job=job,
        )


def _moved(effect: float | None) -> str:
    if effect is None:
        return "not tried"
    return "another kind of model" if math.isinf(effect) else f"{effect:.1e}"


def _place(context: CheckContext, row: dict[str, Any]) -> str:
    """Return the line of the port's class of the same name as the one that reads the field."""
    port = context.port
    for number, text in enumerate(port.source.splitlines(), 1):
        if re.match(rf"class {row['class']}\b", text):
            return place(port, number)
    return port.modeling.name
