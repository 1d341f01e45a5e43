"""The rehearsal of step `parallel` that cuts the model by layers instead of by heads."""

from __future__ import annotations

from portkit.checks.base import Check, CheckContext, place
from portkit.checks.verdict import Verdict
from portkit.live.checkpoint import open_checkpoint
from portkit.live.evidence import gather, run_with_a_loader
from portkit.live.job import JobResult
from portkit.port import Port
from portkit.steps.parallel.rehearsals import STEP, cases_table

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
CAUSES = (
    "make_empty_intermediate_tensors names other tensors than forward hands on in "
    "IntermediateTensors",
    "forward runs other layers than self.start_layer to self.end_layer, or embeds and normalises "
    "on every stage",
    "a stage builds or loads what another one holds: PPMissingLayer stands for those parts",
    "what the stage before has computed (the residual, too) is not handed on",
)

NO_CACHE = "get_kv_cache_configs"
NOT_HERE = (
    "another stage has that module, this one a PPMissingLayer in its place. A head that is tied to "
    "the embedding needs it on the last stage too: make it if get_pp_group().is_first_rank or "
    "(config.tie_word_embeddings and get_pp_group().is_last_rank)"
)


class RehearsalPp2(Check):
    """Two pipeline stages, each with half of the layers, give Transformers' log-probabilities.

    The first hands its IntermediateTensors on to the second, process to process. Needs a class that
    says it can (SupportsPP).
    """

    id = "rehearsal_pp2"
    step = STEP
    title = "Two pipeline stages equal Transformers"
    requires = ("rehearsal_tp1",)
    timeout = 240.0

    def run(self, context: CheckContext) -> Verdict:
        port = context.port
        config = open_checkpoint(port.checkpoint).config
        count = next((config[n] for n in LAYERS if isinstance(config.get(n), int)), 2)
        if "SupportsPP" not in port.source:
            return self.skipped("the class does not say SupportsPP, so vLLM would refuse it")
        if count < 2:
            return self.skipped("the checkpoint has one layer, which cannot be cut")

        def start(loader: str) -> JobResult:
            return gather(
                context,
                self.id,
                "rehearsal",
                timeout=self.timeout,
                ranks=1,
                stages=2,
                loader=loader,
            )

        job = run_with_a_loader(
            context, start, lambda found: sum(not c["ok"] for c in found["cases"])
        )
        if not job.ok and NO_CACHE in job.log_tail and "ZeroDivisionError" in job.what:
            return self.skipped(
                "vLLM starts no stage without anything to cache, as one of these two is: its "
                f"layers have neither attention nor a state (v1/core/kv_cache_utils.py, "
                f"{NO_CACHE}). A checkpoint with more layers can be cut.",
                job=job,
            )
        if not job.ok:
            return self.failed(
                f"On two pipeline stages the port stopped: {job.what}",
                where=job.where or self._place(port, job.log_tail),
                next="One stage is right: compare what forward hands on with what it takes.",
                causes=(NOT_HERE, *CAUSES) if "'PPMissingLayer' object" in job.what else CAUSES,
                log=job.log_tail,
                job=job,
            )
        found = job.value
        bad = [case for case in found["cases"] if not case["ok"]]
        if bad:
            worst = max(bad, key=lambda case: case["max_abs"])
            return self.failed(
                f"On two pipeline stages {len(bad)} of {len(found['cases'])} prompts differ from "
                f"Transformers: {worst['name']}, by {worst['max_abs']:.3g}.",
                cases_table(found),
                where=self._place(port),
                next="One stage is right: compare what forward hands on with what it takes.",
                causes=CAUSES[1:] + CAUSES[:1],
                job=job,
            )
        largest = max(case["max_abs"] for case in found["cases"])
        return self.passed(
            f"On two stages of a pipeline, every log-probability equals Transformers' to "
            f"{largest:.1e} (tolerance {found['tolerance'][0]:g}).",
            cases_table(found),
            job=job,
        )

    def _place(self, port: Port, log: str = "") -> str:
        """Return the line that runs this stage's layers; of what is handed on, if a key is lost."""
        words = ["make_layers(", "islice(", "start_layer"]
        if "intermediate" in log or "KeyError" in log:
            words.insert(0, "make_empty_intermediate_tensors_factory(")
        elif "islice(" in port.source:
            words.insert(0, "islice(")
        for word in words:
            for number, text in enumerate(port.source.splitlines(), 1):
                if word in text and text.startswith("    ") and "import" not in text:
                    return place(port, number)
        return port.modeling.name
