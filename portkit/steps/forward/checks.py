"""Live checks of step `forward`: the port in vLLM's own model runner, beside Transformers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from portkit.checks.base import Check, CheckContext
from portkit.checks.verdict import Table, Verdict
from portkit.live.job import JobResult
from portkit.live.loads import said_left_out
from portkit.steps.forward.config_fields import ConfigFields
from portkit.steps.forward.parity import STEP, Parity, evidence
from portkit.steps.forward.stops import SHAPES, causes_of_stop
from portkit.steps.forward.used_parameters import UsedParameters


class Interface(Check):
    """The port's class has what vLLM calls: the constructor's `vllm_config` and `prefix`,
    `embed_input_ids`, a flat `forward`, `compute_logits`; by vLLM's own predicates, and argument
    by argument. Proves nothing about what they compute.
    """

    id = "interface"
    step = STEP
    title = "The class has vLLM's interface"

    def run(self, context: CheckContext) -> Verdict:
        job = context.live.run("forward_interface", progress=context.progress)
        if not job.ok:
            return self.failed_job(job)
        found = job.value
        file = context.port.modeling.name
        table = Table(
            f"What vLLM calls on {context.port.architecture}",
            ("method", "argument", "state", "why"),
            tuple(
                (method, argument or "(itself)", state, why)
                for method, argument, state, why, _ in found["rows"]
            ),
        )
        wrong = [row for row in found["rows"] if row[2] != "there"]
        hugging = [b for b in found["bases"] if b.startswith("transformers.")]
        if wrong:
            method, argument, state, why, line = wrong[0]
            parts = [f"{m}({a})" if a else m for m, a, *_ in wrong]
            return self.failed(
                f"{len(wrong)} of the things that vLLM calls are not as it needs them: "
                + ", ".join(f"{p} is {row[2]}" for p, row in zip(parts, wrong, strict=True))
                + ".",
                table,
                where=f"{file}:{line}, {context.port.architecture}.{method}",
                job=job,
                next=_interface_edit(method, argument, state, why),
                causes=(
                    "The original's signature was kept: Transformers passes a batch with masks "
                    "and a cache, "
                    "vLLM one flat row of tokens with their positions.",
                ),
            )
        if not (found["is_vllm_model"] and found["is_text_generation_model"]):
            return self.failed(
                "vLLM's own predicates (is_vllm_model, is_text_generation_model) refuse the class.",
                table,
                where=file,
                next="Compare it with vllm/model_executor/models/llama.py.",
                job=job,
            )
        if hugging:
            return self.failed(
                f"The class still derives from {hugging[0]}.",
                table,
                where=f"{file}, {context.port.architecture}",
                next="Derive from torch.nn.Module: vLLM loads weights, caches and samples itself.",
                job=job,
            )
        return self.passed(
            "All that vLLM calls is there; its own predicates accept the class.", table, job=job
        )


def _interface_edit(method: str, argument: str, state: str, why: str) -> str:
    if state == "missing":
        added = f"the argument `{argument}` to {method}" if argument else f"the method `{method}`"
        return f"Add {added}: {why}."
    return f"Remove `{argument}` from {method}: {why}."


class Starts(Parity):
    """vLLM starts on the port and answers a prompt, and what runs is the port's own class (vLLM
    serves a class it does not know through its Transformers backend, silently). Every tensor of
    the checkpoint has a place in the port and every parameter is filled.
    """

    id = "starts"
    title = "vLLM starts it, and it is the port that runs"
    requires = ("interface",)
    stage = "starts"

    def run(self, context: CheckContext) -> Verdict:
        job = evidence(context, afresh=True)
        if not job.ok:  # on a GPU vLLM runs forward while it starts, to see what memory it takes
            causes, where = causes_of_stop(context.port, job.what, job.where)
            shapes = SHAPES if ", in forward:" in job.where else ()
            return replace(self.failed_job(job), where=where, causes=causes + shapes)
        found = job.value["starts"]
        backend = "; ".join(filter(None, (found["attention_backend"], found["opened"])))
        rows = (
            ("class", found["class"]),
            ("runner", found["runner"]),
            ("dtype", found["dtype"]),
            ("attention layers", found["attention_layers"]),
            ("attention backend", backend),
            ("KV cache", f"{found['blocks']} blocks of {found['block_size']} tokens"),
            ("longest context", found["max_model_len"]),
            ("tensors loaded", len(found["load"].get("written", ()))),
        )
        table = Table("The engine", ("what", "value"), rows)
        if found["class"] != found["expected"]:
            return self.failed(
                f"{found['class']} runs, not the port's {found['expected']}.",
                table,
                job=job,
                next='The class must have the name in config.json\'s "architectures".',
            )
        if "error" in found:
            error = found["error"]
            causes, where = causes_of_stop(context.port, error["what"], error["where"])
            return self.failed(
                f"vLLM starts, but the port's forward stops: {error['what']}",
                table,
                where=where,
                next=error["next"],
                log=error["log"],
                job=job,
                causes=causes + SHAPES,
            )
        if not found["attention_layers"]:
            return self.failed(
                "The port has no vLLM Attention layer, so nothing is kept in the KV cache.",
                table,
                job=job,
                where=context.port.modeling.name,
                next="Replace the attention function by vllm's Attention layer.",
            )
        left = found["load"].get("left_over", {})
        if left:
            return self._left_over(left, table, job)
        if not found["finite"]:
            return self.failed(
                "The port answers with NaN.",
                table,
                job=job,
                causes=("A buffer or parameter is used before it is filled (torch.empty).",),
            )
        return self.passed(
            f"vLLM runs {found['class']} in its {found['runner']}, {found['attention_layers']} "
            f"attention layers on "
            f"a paged KV cache ({backend})."
            f"{said_left_out(found['ignored'])}",
            table,
            job=job,
        )

    def _left_over(self, left: dict[str, Any], table: Table, job: JobResult) -> Verdict:
        names = list(left)
        biases = all(name.endswith(".bias") for name in names)
        shown = Table(
            "Left over", ("tensor", "shape"), tuple((n, list(left[n])) for n in names[:20])
        )
        return self.failed(
            f"{len(names)} tensors of the checkpoint have no place in the port: "
            f"{', '.join(names[:4])}" + (" ..." if len(names) > 4 else "."),
            shown,
            table,
            where=job.value["starts"].get("left_over_at") or names[0],
            job=job,
            next="Give these layers their bias as the config says (bias=config...)."
            if biases
            else "Keep the original's attribute names, or name fused layers in "
            "packed_modules_mapping.",
            causes=(
                (
                    "A layer is built with bias=False although the checkpoint has biases; "
                    "vLLM's own loader would not "
                    "say a word.",
                )
                if biases
                else (
                    f"The port has no {' or '.join(_modules(names))}: renamed, left out, or made "
                    "only if a field of the config says so, and read by another name it does not.",
                    "A fused layer is missing in packed_modules_mapping.",
                )
            ),
        )


def _modules(names: list[str]) -> list[str]:
    """Return the names of the modules that tensors belong to, two at most."""
    return (
        list(dict.fromkeys(name.split(".")[-2] for name in names if "." in name))[:2] or names[:1]
    )


class PrefillParity(Parity):
    """Prompts of one engine step each: log-probabilities of the whole vocabulary at every
    position, float32, against Transformers. Not covered here: more than one request, more than
    one step.
    """

    id = "prefill_parity"
    title = "Prefill agrees with Transformers"
    requires = ("starts",)
    stage = "prefill"

    def proof(self, found: dict[str, Any]) -> str:
        return (
            f"{len(found['cases'])} prompts, each computed in one engine step ({found['steps']} "
            f"steps, "
            f"{found['tokens_computed']} tokens by the scheduler's count)."
        )

    def not_exercised(self, found: dict[str, Any]) -> str:
        return (
            ""
            if found["steps"] == len(found["cases"])
            else "A short prompt was not computed in one step."
        )


class ChunkedPrefill(Parity):
    """A prompt that the scheduler cuts into chunks (proven by its own numbers) gives what one
    piece gives: later chunks read earlier ones from the KV cache, at their own positions.
    """

    id = "chunked_prefill"
    title = "A prompt cut in chunks gives the same"
    requires = ("prefill_parity",)
    stage = "chunked"

    def proof(self, found: dict[str, Any]) -> str:
        chunks = ", ".join(map(str, found["chunks"]))
        return f"A prompt of {found['tokens']} tokens was computed in chunks of {chunks}."

    def not_exercised(self, found: dict[str, Any]) -> str:
        return (
            ""
            if len(found["chunks"]) > 1
            else "The prompt was not cut: the scheduler took it in one step."
        )

    def situation(self) -> tuple[str, ...]:
        return (
            "One piece is right, chunks are not: the second chunk does not know what came "
            "before. Positions are "
            "recomputed from 0, or keys and values are not taken from vLLM's KV cache.",
        )


class DecodeParity(Parity):
    """Token by token: the tokens that vLLM generates greedily, and the distributions they were
    taken from, against Transformers given the same text anew each time; across block boundaries.
    """

    id = "decode_parity"
    title = "Decoding agrees with Transformers"
    requires = ("prefill_parity",)
    stage = "decode"

    def proof(self, found: dict[str, Any]) -> str:
        return (
            f"{found['decode_steps']} steps of one token each after {len(found['cases'])} "
            f"prompts, across blocks of "
            f"{found['block_size']}; the same greedy tokens."
        )

    def not_exercised(self, found: dict[str, Any]) -> str:
        return "" if found["decode_steps"] else "No step computed a single token."

    def situation(self) -> tuple[str, ...]:
        return (
            "Prefill is right, decoding is not: in a decode step the model gets one token whose "
            "position is not 0. "
            "Positions are recomputed (torch.arange), or the KV cache is not used.",
        )


class RaggedBatch(Parity):
    """Requests of different lengths in one batch, in shuffled order, and a chunked prompt among
    decoding requests: each gives what it gives alone. Sees leaks between requests.
    """

    id = "ragged_batch"
    title = "Requests in a batch do not touch each other"
    requires = ("prefill_parity",)
    stage = "ragged"

    def proof(self, found: dict[str, Any]) -> str:
        return (
            f"{found['requests_in_a_step']} requests of different lengths in one step, "
            f"{found['mixed_steps']} steps "
            "with prefill and decode together; each as alone."
        )

    def not_exercised(self, found: dict[str, Any]) -> str:
        return (
            ""
            if found["requests_in_a_step"] > 1
            else "The scheduler never put two requests into one step."
        )

    def situation(self) -> tuple[str, ...]:
        return (
            "Alone is right, together is not: something in forward treats the flat batch as one "
            "sequence: "
            "positions by torch.arange, a mask or a cumulative sum over all tokens, a value "
            "kept between calls.",
        )


class FarPositions(Parity):
    """A prompt to nearly the last position that the model has: rotary tables, sliding windows and
    scalings that only long texts reach, and many blocks of the KV cache.
    """

    id = "far_positions"
    title = "Positions far out agree with Transformers"
    requires = ("prefill_parity",)
    stage = "far"

    def proof(self, found: dict[str, Any]) -> str:
        window = (
            f", sliding window {found['sliding_window']}" if found.get("sliding_window") else ""
        )
        return f"Position {found['reached']} of {found['max_position_embeddings']} reached{window}."

    def situation(self) -> tuple[str, ...]:
        return (
            "Short prompts are right, long ones are not: max_position or rope_parameters of "
            "get_rope, a rotary "
            "scaling left out, or a sliding window missing.",
        )


class InputsEmbeds(Parity):
    """Embeddings in place of token ids, made by `embed_input_ids` and handed in from outside,
    give what the ids give. The runner's own call is watched: `input_ids` was None each time.
    """

    id = "inputs_embeds"
    title = "inputs_embeds in place of token ids"
    requires = ("prefill_parity",)
    stage = "embeds"

    def proof(self, found: dict[str, Any]) -> str:
        used, calls = found["calls_with_embeds"], found["calls"]
        return f"In {used} of {calls} calls forward was given inputs_embeds and no ids."

    def not_exercised(self, found: dict[str, Any]) -> str:
        if found["calls_with_embeds"] and found["calls"] == found["calls_with_embeds"]:
            return ""
        return f"Only {found['calls_with_embeds']} of {found['calls']} calls used inputs_embeds."

    def crash_causes(self) -> tuple[str, ...]:
        return ("forward uses input_ids although inputs_embeds was given; input_ids is None then.",)

    def situation(self) -> tuple[str, ...]:
        return (
            "forward ignores inputs_embeds, or what is done to embeddings (a scale, a norm) is "
            "done in one of the "
            "two ways only.",
        )


CHECKS: tuple[type[Check], ...] = (
    Interface,
    Starts,
    PrefillParity,
    ChunkedPrefill,
    DecodeParity,
    RaggedBatch,
    FarPositions,
    InputsEmbeds,
    UsedParameters,
    ConfigFields,
)
