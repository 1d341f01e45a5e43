"""The check of loading once more: into an engine that runs, as trainers do after each step."""

from __future__ import annotations

import ast
import math
from typing import Any

from portkit.checks.base import Check, CheckContext, place
from portkit.checks.verdict import Verdict
from portkit.live.evidence import gather
from portkit.port import Port
from portkit.steps.weights.parity import STEP, line_of_loading

CAUSES = (
    "load_weights writes into a parameter's data itself: while vLLM loads again, or quantises "
    "while loading, a parameter has no data (it is on the meta device), and what is written is "
    "lost",
    "load_weights keeps something from the first time: a flag, a tensor, a copy of a parameter",
    "a tensor that was computed from weights when they were loaded is not computed again",
)


class Reload(Check):
    """Loaded again while it runs, the model gives what it gave before.

    vLLM's `reload_weights`, after all parameters were overwritten with NaN: what reinforcement
    learning does after each step, and sleep mode on waking. vLLM takes every parameter's data away,
    collects what arrives by its weight_loader, and puts it back layer by layer; quantising while
    loading (`quantization="fp8_per_channel"`) works the same way.
    Source: vllm/model_executor/model_loader/reload/layerwise.py.
    """

    id = "reload"
    step = STEP
    title = "It can be loaded again while it runs"
    requires = ("load_parity",)

    def run(self, context: CheckContext) -> Verdict:
        job = gather(context, self.id, "load", variant="")
        if not job.ok:
            return self.failed_job(job)
        found: dict[str, Any] = job.value.get("again") or {}
        if not found:
            return self.skipped("The first load was not right.", job=job)
        if "nothing" in found:
            return self.skipped(f"{found['nothing']}.", job=job)
        if error := found.get("error"):
            return self.failed(
                f"The second time load_weights stopped: {error['what']}",
                where=error["where"] or line_of_loading(context.port),
                next=error["next"],
                causes=CAUSES[1:2],
                log=job.log_tail,
                job=job,
            )
        where, written = _line_of_writing(context.port)
        # What writes past the weight_loader is in the file, or it is not.
        causes = CAUSES if written else CAUSES[1:]
        changed, limit = found["changed"], job.value["tolerance"][0]
        # On a GPU another place in memory can mean another kernel, which sums in another order.
        if changed or not found["difference"] <= limit:
            other = (
                f"other log-probabilities, by up to {found['difference']:.3g}"
                if math.isfinite(found["difference"])
                else "NaN"
            )
            return self.failed(
                f"Loaded again, the same weights give {other}"
                + (
                    f": {changed[0]} is not what it was ({len(changed)} such parameters)."
                    if changed
                    else ", though parameters look as before."
                ),
                where=where,
                next="Call the parameter's weight_loader with each tensor, each time; "
                "AutoWeightsLoader does."
                if changed
                else "Find what is computed from weights, or set, while loading.",
                causes=causes,
                job=job,
            )
        return self.passed(
            "Overwritten with NaN and loaded again while it runs, all parameters are what they "
            f"were; log-probabilities differ by {found['difference']:.1e} (tolerance {limit:g}).",
            job=job,
        )


def _line_of_writing(port: Port) -> tuple[str, bool]:
    """Return the place where load_weights writes into a tensor itself, and that it does.

    Else that of load_weights.
    """
    tree = ast.parse(port.source)
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and function.name.endswith("load_weights"):
            for node in ast.walk(function):
                if isinstance(node, ast.Attribute) and node.attr in ("copy_", "data", "set_"):
                    return place(port, node.lineno), True
    return line_of_loading(port), False
