"""Live checks of step `forward`: the port in vLLM's own model runner, beside Transformers.

One engine start gathers the evidence of all of them (live/jobs/forward_parity.py); each check
reads its own part. The evidence is taken again whenever the port's code or checkpoint changed.
"""

from __future__ import annotations

from typing import Any, ClassVar

from portkit.checks.base import Check, CheckContext
from portkit.checks.results import source_hash
from portkit.checks.verdict import Table, Verdict
from portkit.live.job import JobResult

STEP = "forward"
_EVIDENCE: dict[str, tuple[str, JobResult]] = {}
"""Port folder -> (hash of what was judged, evidence): what one run's checks share."""


def evidence(context: CheckContext, *, afresh: bool = False) -> JobResult:
    """Return the result of the job `forward_parity` for the port as it stands now."""
    root, state = str(context.port.root), source_hash(context.port)
    held = _EVIDENCE.get(root)
    if held and held[0] == state and not afresh:
        return held[1]
    result = context.live.run("forward_parity", timeout=300.0, progress=context.progress)
    if result.ok:
        _EVIDENCE[root] = (state, result)
    else:
        _EVIDENCE.pop(root, None)
    return result


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
            f"What vLLM calls on {context.port.architecture}", ("method", "argument", "state", "why"),
            tuple((method, argument or "(itself)", state, why) for method, argument, state, why, _ in found["rows"]),
        )
        wrong = [row for row in found["rows"] if row[2] != "there"]
        hugging = [b for b in found["bases"] if b.startswith("transformers.")]
        if wrong:
            method, argument, state, why, line = wrong[0]
            parts = [f"{m}({a})" if a else m for m, a, *_ in wrong]
            return self.failed(
                f"{len(wrong)} of the things that vLLM calls are not as it needs them: "
                + ", ".join(f"{p} is {row[2]}" for p, row in zip(parts, wrong, strict=True)) + ".",
                table, where=f"{file}:{line}, {context.port.architecture}.{method}", job=job,
                next=_interface_edit(method, argument, state, why),
                causes=("The original's signature was kept: Transformers passes a batch with masks and a cache, "
                        "vLLM one flat row of tokens with their positions.",),
            )
        if not (found["is_vllm_model"] and found["is_text_generation_model"]):
            return self.failed(
                "vLLM's own predicates (is_vllm_model, is_text_generation_model) refuse the class.", table,
                where=file, next="Compare it with vllm/model_executor/models/llama.py.", job=job,
            )
        if hugging:
            return self.failed(
                f"The class still derives from {hugging[0]}.", table, where=f"{file}, {context.port.architecture}",
                next="Derive from torch.nn.Module: vLLM loads weights, caches and samples itself.", job=job,
            )
        return self.passed("All that vLLM calls is there; its own predicates accept the class.", table, job=job)


def _interface_edit(method: str, argument: str, state: str, why: str) -> str:
    if state == "missing":
        added = f"the argument `{argument}` to {method}" if argument else f"the method `{method}`"
        return f"Add {added}: {why}."
    return f"Remove `{argument}` from {method}: {why}."


class _Parity(Check):
    """What the checks on the shared evidence have in common."""

    step = STEP
    stage: ClassVar[str]

    def run(self, context: CheckContext) -> Verdict:
        job = evidence(context)
        if not job.ok:
            return self.failed_job(job)
        found = job.value.get(self.stage)
        if found is None:
            return self.skipped("vLLM does not start on the port (see `starts`)", job=job)
        if "error" in found:
            error = found["error"]
            return self.failed(
                f"The port's code stopped: {error['what']}", where=error["where"], next=error["next"],
                log=error["log"], job=job, causes=self.crash_causes(),
            )
        bad = [case for case in found["cases"] if not case["ok"]]
        value, reason = job.value["tolerance"]
        if bad:
            return self._differs(bad, found, job)
        reason_not = self.not_exercised(found)
        if reason_not:
            return self.failed(reason_not, job=job, next="This is a limit of the checkpoint: use one with room for it.")
        worst = max(case["max_abs"] for case in found["cases"])
        rows = sum(case["rows"] for case in found["cases"])
        return self.passed(
            f"{self.proof(found)} Largest difference of a log-probability: {worst:.1e} "
            f"(tolerance {value:g}), over {rows} positions and the whole vocabulary.",
            _cases_table(found["cases"], f"Tolerance {value:g}: {reason}."), job=job,
        )

    def proof(self, found: dict[str, Any]) -> str:
        """Say what was run, from the scheduler's own numbers."""
        return f"{len(found['cases'])} prompts agree with Transformers."

    def not_exercised(self, found: dict[str, Any]) -> str:
        """Return why the evidence does not show what this check is about, or ""."""
        return ""

    def crash_causes(self) -> tuple[str, ...]:
        return ()

    def situation(self) -> tuple[str, ...]:
        """Causes that the situation itself suggests, when the simpler ones have passed."""
        return ()

    def _differs(self, bad: list[dict[str, Any]], found: dict[str, Any], job: JobResult) -> Verdict:
        case = min(bad, key=lambda c: (c["rows"] < 8, c["rows"]))
        texts = job.value.get("texts", {})
        trace = found.get("divergence", {})
        what = (
            f"{len(bad)} of {len(found['cases'])} comparisons differ. {case['name'][0].upper()}{case['name'][1:]}: "
            f"from position {case['position']} on ({case['beyond']} of {case['rows']} positions), by up to "
            f"{case['max_abs']:.3g} in a log-probability."
        )
        tables = [_top_table(case, texts)]
        if trace.get("what"):
            what += f" First diverging module: {trace['what']}, {_numbers(trace)}."
            tables.append(_walk_table(trace))
        elif trace.get("error"):
            what += f" (The trace stopped: {trace['error']['what']})"
        elif "steps" in trace:
            what += " Module by module, with one request traced, nothing differs."
        tables.append(_cases_table(found["cases"]))
        causes = tuple(trace.get("causes", ()))
        proven = int(trace.get("proven", 0))
        merged = (*causes[:proven], *self.situation(), *causes[proven:])
        return self.failed(
            what, *tables, where=trace.get("where", "") or trace.get("path", ""), job=job,
            causes=tuple(dict.fromkeys(merged)), next=_edit(trace, merged),
        )


class Starts(_Parity):
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
        if not job.ok:
            return self.failed_job(job)
        found = job.value["starts"]
        rows = (
            ("class", found["class"]), ("runner", found["runner"]), ("dtype", found["dtype"]),
            ("attention layers", found["attention_layers"]), ("attention backend", found["attention_backend"]),
            ("KV cache", f"{found['blocks']} blocks of {found['block_size']} tokens"),
            ("longest context", found["max_model_len"]),
            ("tensors loaded", len(found["load"].get("written", ()))),
        )
        table = Table("The engine", ("what", "value"), rows)
        if found["class"] != found["expected"]:
            return self.failed(
                f"{found['class']} runs, not the port's {found['expected']}.", table, job=job,
                next='The class must have the name in config.json\'s "architectures".',
            )
        if "error" in found:
            error = found["error"]
            return self.failed(
                f"vLLM starts, but the port's forward stops: {error['what']}", table, where=error["where"],
                next=error["next"], log=error["log"], job=job,
                causes=("Tensors are flat in vLLM: hidden_states is [tokens, hidden], without a batch "
                        "dimension; views and transposes for [batch, heads, tokens, ...] go.",
                        "If it stops inside Attention: the head counts and head size given to it must be those of q, "
                        "k and v (num_kv_heads=)."),
            )
        if not found["attention_layers"]:
            return self.failed(
                "The port has no vLLM Attention layer, so nothing is kept in the KV cache.", table, job=job,
                where=context.port.modeling.name, next="Replace the attention function by vllm's Attention layer.",
            )
        left = found["load"].get("left_over", {})
        if left:
            return self._left_over(left, table, job)
        if not found["finite"]:
            return self.failed(
                "The port answers with NaN.", table, job=job,
                causes=("A buffer or parameter is used before it is filled (torch.empty).",),
            )
        return self.passed(
            f"vLLM runs {found['class']} in its {found['runner']}, {found['attention_layers']} attention layers on "
            f"a paged KV cache ({found['attention_backend']}).", table, job=job,
        )

    def _left_over(self, left: dict[str, Any], table: Table, job: JobResult) -> Verdict:
        names = list(left)
        biases = all(name.endswith(".bias") for name in names)
        shown = Table("Left over", ("tensor", "shape"), tuple((n, list(left[n])) for n in names[:20]))
        return self.failed(
            f"{len(names)} tensors of the checkpoint have no place in the port: {', '.join(names[:4])}"
            + (" ..." if len(names) > 4 else "."),
            shown, table, where=job.value["starts"].get("left_over_at") or names[0], job=job,
            next="Give these layers their bias as the config says (bias=config...)." if biases
            else "Keep the original's attribute names, or name fused layers in packed_modules_mapping.",
            causes=(
                ("A layer is built with bias=False although the checkpoint has biases; vLLM's own loader would not "
                 "say a word.",) if biases else
                ("A module was renamed or left out.", "A fused layer is missing in packed_modules_mapping.")
            ),
        )


class PrefillParity(_Parity):
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
            f"{len(found['cases'])} prompts, each computed in one engine step ({found['steps']} steps, "
            f"{found['tokens_computed']} tokens by the scheduler's count)."
        )

    def not_exercised(self, found: dict[str, Any]) -> str:
        return "" if found["steps"] == len(found["cases"]) else "A short prompt was not computed in one step."


class ChunkedPrefill(_Parity):
    """A prompt that the scheduler cuts into chunks (proven by its own numbers) gives what one
    piece gives: later chunks read earlier ones from the KV cache, at their own positions.
    """

    id = "chunked_prefill"
    title = "A prompt cut in chunks gives the same"
    requires = ("prefill_parity",)
    stage = "chunked"

    def proof(self, found: dict[str, Any]) -> str:
        return f"A prompt of {found['tokens']} tokens was computed in chunks of {', '.join(map(str, found['chunks']))}."

    def not_exercised(self, found: dict[str, Any]) -> str:
        return "" if len(found["chunks"]) > 1 else "The prompt was not cut: the scheduler took it in one step."

    def situation(self) -> tuple[str, ...]:
        return (
            "One piece is right, chunks are not: the second chunk does not know what came before. Positions are "
            "recomputed from 0, or keys and values are not taken from vLLM's KV cache.",
        )


class DecodeParity(_Parity):
    """Token by token: the tokens that vLLM generates greedily, and the distributions they were
    taken from, against Transformers given the same text anew each time; across block boundaries.
    """

    id = "decode_parity"
    title = "Decoding agrees with Transformers"
    requires = ("prefill_parity",)
    stage = "decode"

    def proof(self, found: dict[str, Any]) -> str:
        return (
            f"{found['decode_steps']} steps of one token each after {len(found['cases'])} prompts, across blocks of "
            f"{found['block_size']}; the same greedy tokens."
        )

    def not_exercised(self, found: dict[str, Any]) -> str:
        return "" if found["decode_steps"] else "No step computed a single token."

    def situation(self) -> tuple[str, ...]:
        return (
            "Prefill is right, decoding is not: in a decode step the model gets one token whose position is not 0. "
            "Positions are recomputed (torch.arange), or the KV cache is not used.",
        )


class RaggedBatch(_Parity):
    """Requests of different lengths in one batch, in shuffled order, and a chunked prompt among
    decoding requests: each gives what it gives alone. Sees leaks between requests.
    """

    id = "ragged_batch"
    title = "Requests in a batch do not touch each other"
    requires = ("prefill_parity",)
    stage = "ragged"

    def proof(self, found: dict[str, Any]) -> str:
        return (
            f"{found['requests_in_a_step']} requests of different lengths in one step, {found['mixed_steps']} steps "
            "with prefill and decode together; each as alone."
        )

    def not_exercised(self, found: dict[str, Any]) -> str:
        return "" if found["requests_in_a_step"] > 1 else "The scheduler never put two requests into one step."

    def situation(self) -> tuple[str, ...]:
        return (
            "Alone is right, together is not: something in forward treats the flat batch as one sequence: "
            "positions by torch.arange, a mask or a cumulative sum over all tokens, a value kept between calls.",
        )


class FarPositions(_Parity):
    """A prompt to nearly the last position that the model has: rotary tables, sliding windows and
    scalings that only long texts reach, and many blocks of the KV cache.
    """

    id = "far_positions"
    title = "Positions far out agree with Transformers"
    requires = ("prefill_parity",)
    stage = "far"

    def proof(self, found: dict[str, Any]) -> str:
        window = f", sliding window {found['sliding_window']}" if found.get("sliding_window") else ""
        return f"Position {found['reached']} of {found['max_position_embeddings']} reached{window}."

    def situation(self) -> tuple[str, ...]:
        return (
            "Short prompts are right, long ones are not: max_position or rope_parameters of get_rope, a rotary "
            "scaling left out, or a sliding window missing.",
        )


class InputsEmbeds(_Parity):
    """Embeddings in place of token ids, made by `embed_input_ids` and handed in from outside,
    give what the ids give. The runner's own call is watched: `input_ids` was None each time.
    """

    id = "inputs_embeds"
    title = "inputs_embeds in place of token ids"
    requires = ("prefill_parity",)
    stage = "embeds"

    def proof(self, found: dict[str, Any]) -> str:
        return f"In {found['calls_with_embeds']} of {found['calls']} calls forward was given inputs_embeds and no ids."

    def not_exercised(self, found: dict[str, Any]) -> str:
        if found["calls_with_embeds"] and found["calls"] == found["calls_with_embeds"]:
            return ""
        return f"Only {found['calls_with_embeds']} of {found['calls']} calls used inputs_embeds."

    def crash_causes(self) -> tuple[str, ...]:
        return ("forward uses input_ids although inputs_embeds was given; input_ids is None then.",)

    def situation(self) -> tuple[str, ...]:
        return (
            "forward ignores inputs_embeds, or what is done to embeddings (a scale, a norm) is done in one of the "
            "two ways only.",
        )


CHECKS: tuple[type[Check], ...] = (
    Interface, Starts, PrefillParity, ChunkedPrefill, DecodeParity, RaggedBatch, FarPositions, InputsEmbeds,
)


# ---- tables ---------------------------------------------------------------------------------------


def _numbers(trace: dict[str, Any]) -> str:
    if trace["kind"] == "never called":
        return "which the port never computes"
    if trace["kind"] == "shape":
        return "has another shape"
    agree = f"positions 0 to {trace['first_ok'] - 1} agree, " if trace["first_ok"] else "already at position 0, "
    return (
        f"{agree}then it differs by up to {trace['max_abs']:.3g} ({100 * trace['relative']:.2g} % of its largest value); "
        f"vLLM {_few(trace['ours'])}, Transformers {_few(trace['theirs'])}"
    )


def _few(values: list[float]) -> str:
    return "[" + ", ".join(f"{v:.4g}" for v in values) + "]"


def _edit(trace: dict[str, Any], causes: tuple[str, ...]) -> str:
    if trace.get("where"):
        return f"Look at {trace['where'].split(': ')[0]} in the port" + (f": {causes[0]}" if causes else ".")
    return causes[0] if causes else "Compare forward with the original's, line by line."


def _top_table(case: dict[str, Any], texts: dict[str, str]) -> Table:
    def cell(pair: list[Any]) -> str:
        text = texts.get(str(pair[0]))
        return f"{pair[0]}" + (f" {text!r}" if text is not None else "") + f"  {pair[1]:.4f}"

    rows = tuple(
        (rank + 1, cell(ours), cell(theirs))
        for rank, (ours, theirs) in enumerate(zip(case["ours"], case["theirs"], strict=True))
    )
    return Table(
        f"Most likely next tokens at position {case['position']} ({case['name']})",
        ("", "vLLM (token, log-probability)", "the other side"), rows,
        note=f"Largest difference there: token {case['token']}.",
    )


def _walk_table(trace: dict[str, Any]) -> Table:
    roles = {"in": "input", "out": "output", "attn": "attention output"}
    rows = [
        (path, roles.get(role, role), " x ".join(map(str, shape)), f"{worst:.1e}", f"{relative:.1e}", "yes" if ok else "NO")
        for path, role, shape, worst, relative, ok in trace["steps"]
    ]
    if trace["kind"] != "value":
        rows.append((trace["path"], roles.get(trace["role"], trace["role"]), "", trace["kind"], "", "NO"))
    return Table(
        "Module by module, in the original's order", ("module", "what", "tokens x width", "max |Δ|", "relative", "agrees"),
        tuple(rows), note=f"In the port: {trace['where']}" if trace.get("where") else "",
    )


def _cases_table(cases: list[dict[str, Any]], note: str = "") -> Table:
    return Table(
        "Comparisons", ("what", "positions", "max |Δ log-prob|", "agrees"),
        tuple((c["name"], c["rows"], f"{c['max_abs']:.1e}", "yes" if c["ok"] else "NO") for c in cases), note=note,
    )
