"""Checks of step 0: does the environment work, and is a port of this model worth it?"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from portkit.analysis.facts import facts_of
from portkit.checks.base import Check, CheckContext
from portkit.checks.verdict import Table, Verdict
from portkit.create import decision
from portkit.errors import PortkitError
from portkit.port import Port
from portkit.steps.choose import doctor
from portkit.steps.choose.difficulty import difficulties
from portkit.steps.copy.draft import original_of

GUIDE = "https://docs.vllm.ai/en/v0.32.0"


class _Check(Check):
    step: ClassVar[str] = "choose"


class Environment(_Check):
    """The machine and the installed packages can do what the steps ask.

    Versions and sizes are measured without importing anything big; then torch and vLLM are
    imported in the worker and a small product is computed on the device that vLLM chose.
    """

    id = "environment"
    title = "The environment works"

    def run(self, context: CheckContext) -> Verdict:
        found = doctor.examine()
        rows = tuple((f.name, f.value, _word(f), "" if f.ok else f.remedy) for f in found)
        table = Table("What the doctor measured", ("what", "measured", "", "remedy"), rows)
        short = [f for f in found if not f.ok and f.required]
        if short:
            return self.failed(
                f"{short[0].name}: {short[0].value}.",
                table,
                where="the environment",
                next=short[0].remedy,
                causes=tuple(f"{f.name}: {f.value}" for f in short[1:]),
            )
        job = self.job(context, "environment")
        if not job.ok:
            return self.failed_job(job, next=job.next or doctor.SETUP)
        value = job.value
        if not math.isclose(value["product"], value["expected"]):
            return self.failed(
                f"A product of two matrices on {value['device']} is {value['product']} and "
                f"should be {value['expected']}.",
                table,
                where="torch",
                next=doctor.SETUP,
                job=job,
            )
        live = Table(
            "What the worker imported",
            ("what", "value"),
            tuple((key, str(value[key])) for key in ("vllm", "torch", "transformers", "platform")),
        )
        lacks = [f.name for f in found if not f.ok]
        what = (
            f"vLLM {value['vllm']} imports and computes on {value['device']} ({value['reason']})."
        )
        if lacks:
            what += f" Not at its best: {', '.join(lacks)}."
        return self.passed(what, table, live, job=job)


def _word(finding: doctor.Finding) -> str:
    return "ok" if finding.ok else "too little" if finding.required else "limits"


class Architecture(_Check):
    """The checkpoint is whole and of this architecture, and its model can be built.

    The original class is built from config.json on torch's meta device, which takes no memory, and
    its parameters are added up by part. What makes the port easy or hard is read from the source.
    """

    id = "architecture"
    title = "What the model is made of"
    requires = ("environment",)

    def run(self, context: CheckContext) -> Verdict:
        try:
            facts = facts_of(original_of(context.port).text, context.port.architecture)
        except PortkitError as error:
            return self.failed(error.what, where=error.where, next=error.next)
        except SyntaxError as error:
            return self.failed(
                f"The original does not parse: {error.msg}.",
                where=f"line {error.lineno}",
                next="Correct that line in the port's original/ folder.",
            )
        job = self.job(context, "describe_architecture")
        if not job.ok:
            return self.failed_job(job)
        value = job.value
        config = value["config"]
        heads = difficulties(facts, config)
        tied = ", head tied to the embeddings" if value["tied"] else ""
        return self.passed(
            f"{context.port.architecture}: {value['layers']} layers, "
            f"{_count(value['parameters'])} parameters{tied}. {_summary(heads)}",
            self._parts(value),
            Table(
                "What the port has to get right",
                ("what", "in this model", "why it matters"),
                tuple((row.what, row.here, row.why) for row in heads),
                "; ".join(f"line {u.line}: {u.what}" if u.line else u.what for u in facts.unknown),
            ),
            job=job,
        )

    def _parts(self, value: dict[str, Any]) -> Table:
        total = max(value["parameters"], 1)
        rows = tuple(
            (
                part["path"],
                part["class"],
                part["count"],
                _count(part["parameters"] * part["count"]),
                f"{100 * part['parameters'] * part['count'] / total:.1f} %",
            )
            for part in value["parts"]
        )
        columns = ("part", "class", "times", "parameters", "share")
        note = f"Its weights take {_bytes(total * 2)} in bfloat16."
        return Table("Where the parameters are", columns, rows, note)


def _summary(rows: tuple) -> str:
    hard = [row.what for row in rows if row.hard]
    if not hard:
        return "Nothing unusual: vLLM has a layer for each part."
    return f"Take care with: {', '.join(hard)}."


def _count(number: float) -> str:
    for unit, size in (("billion", 1e9), ("million", 1e6), ("thousand", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(int(number))


def _bytes(number: float) -> str:
    unit = "GiB" if number >= 2**30 else "MiB"
    return f"{number / (2**30 if unit == 'GiB' else 2**20):.1f} {unit}"


class Native(_Check):
    """The installed vLLM has been asked whether it knows this architecture already.

    From its own tables (`vllm/model_executor/models/registry.py`), not from memory.
    """

    id = "native"
    title = "Does vLLM have it already?"
    requires = ("environment",)

    def run(self, context: CheckContext) -> Verdict:
        name = context.port.architecture
        job = context.live.run("native_support", timeout=self.timeout, architecture=name)
        if not job.ok:
            return self.failed_job(job)
        value = job.value
        version = value["version"]
        says = {
            "native": f"vLLM {version} has {name} natively ({value['module']}). A port of your own "
            "would be an exercise, or replaces it where it is registered later.",
            "backend": f"vLLM {version} lists {name} and serves it through Transformers' class "
            f"({value.get('class', '')}); a native class would be new.",
            "plugin": f"vLLM {version} knows a plugin for {name}: {value.get('plugin', '')}.",
            "removed": f"vLLM had {name} until {value.get('last', '')} and removed it: that file "
            "is an answer to compare with. The installed vLLM refuses the architecture until your "
            "port registers it.",
            "unknown": f"vLLM {version} does not know {name}; its Transformers backend would be "
            "tried.",
        }
        return self.passed(says[value["answer"]], job=job)


class TransformersBackend(_Check):
    """vLLM's Transformers backend was really run on this checkpoint, next to Transformers.

    vLLM's own advice is to try it before writing a port. That it cannot run the model, or computes
    something else, is an answer too, and no failure of this check.
    """

    id = "transformers_backend"
    title = "Does vLLM's Transformers backend do?"
    requires = ("environment", "architecture")
    timeout = 600.0

    COSTS = Table(
        "What the backend costs, and what it saves",
        ("question", "answer", "from"),
        (
            ("code to write", "none", f"{GUIDE}/models/supported_models/#transformers"),
            (
                "speed",
                "Python between its layers costs most at small batches",
                "step 7 measures it",
            ),
            (
                "tensor parallelism",
                "by the class's plan; without one, what it can fuse, the rest copied to each rank",
                "base.py",
            ),
            (
                "pipeline parallelism",
                "by the class's plan, else inferred from the order of its modules",
                "base.py",
            ),
            (
                "q/k/v, gate/up and norms",
                "fused where a pattern in the traced code is recognised, else left apart",
                "fuser.py",
            ),
            ("quantisation", "of the linears that it replaces; not MXFP4", "base.py"),
            (
                "which attention",
                "full or sliding, called through ALL_ATTENTION_FUNCTIONS",
                f"{GUIDE}/models/supported_models/#writing-custom-models",
            ),
        ),
        "base.py, fuser.py: vllm/model_executor/models/transformers/ of the installed vLLM.",
    )

    def run(self, context: CheckContext) -> Verdict:
        job = self.job(context, "transformers_backend")
        if job.status in ("crashed", "timeout"):
            return self.passed(
                f"No: the backend did not survive this model ({job.what}).",
                self.COSTS,
                next="A native port is what will run.",
                log=job.log_tail,
                job=job,
            )
        if not job.ok:
            return self.failed_job(job)
        value = job.value
        if not value["ran"]:
            return self.passed(
                f"No: vLLM's Transformers backend does not {value['phase']} with this model: "
                f"{value['error']}",
                self.COSTS,
                next="A native port is what will run.",
                log=value["trace"],
                job=job,
            )
        return self._compared(value, job)

    def _compared(self, value: dict[str, Any], job: Any) -> Verdict:
        rows = tuple(
            (
                f"{row['prompt']} tokens",
                f"{row['same_tokens']} of {value['tokens']}",
                f"{row['prefill']:.1e}",
                f"{row['decode']:.1e}",
                "equal" if row["ok"] else "differs",
            )
            for row in value["rows"]
        )
        table = Table(
            "The backend against Transformers",
            ("prompt", "same greedy tokens", "prefill: log-prob. distance", "decode", ""),
            rows,
            f"Distances beyond {value['limit']:g} count as different. {value['model_class']} ran "
            f"at {value['tokens_per_second']:.0f} tokens/s (batch of {value['batch']}, float32, "
            f"eager, this checkpoint); it started in {value['start_seconds']:.0f} s.",
        )
        wrong = [row for row in value["rows"] if not row["ok"]]
        if wrong:
            worst = max(max(row["prefill"], row["decode"]) for row in wrong)
            return self.passed(
                f"No: the backend runs, but computes something else: log-probabilities differ by "
                f"up to {worst:.2g} on {len(wrong)} of {len(rows)} prompts.",
                table,
                self.COSTS,
                next="A native port is worth it, if only to be right.",
                job=job,
            )
        return self.passed(
            f"Yes: it runs and agrees with Transformers on {len(rows)} prompts, at "
            f"{value['tokens_per_second']:.0f} tokens/s here. A native port is for speed at small "
            "batches, quantisation and parallelism, or for learning.",
            table,
            self.COSTS,
            job=job,
        )


class Decision(_Check):
    """It is decided, with a reason, whether the port goes into vLLM's tree or stays a plugin."""

    id = "decision"
    title = "Where the port will live"

    def run(self, context: CheckContext) -> Verdict:
        decided = context.port.meta.get("decisions", {})
        if not decided.get("destination"):
            return self.failed(
                "port.toml does not say yet where the port will live.",
                where="port.toml, [decisions]",
                next=_how(context.port),
            )
        try:
            values = decision(str(decided["destination"]), str(decided.get("reason", "")))
        except PortkitError as error:
            return self.failed(
                error.what, where="port.toml, [decisions]", next=error.next or _how(context.port)
            )
        place = {
            "out_of_tree": "out of tree, as a plugin (step 6)",
            "in_tree": "in vLLM's tree, as a pull request (step 5)",
        }[values["destination"]]
        return self.passed(f"The port will live {place}: {values['reason']}")


def _how(port: Port) -> str:
    return (
        'Under [decisions] write destination = "out_of_tree" (or "in_tree") and reason = "…"; or '
        f'run: portkit decide out_of_tree "why" --port {port.name}'
    )


CHECKS: tuple[type[Check], ...] = (
    Environment,
    Architecture,
    Native,
    TransformersBackend,
    Decision,
)
