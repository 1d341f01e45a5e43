"""Job: one engine start that gathers the evidence for all live checks of step `forward`.

The port runs in vLLM's own model runner with a paged KV cache, float32, and is compared with
Transformers on the same tokens: prefill, prefill in chunks, decode, ragged batches, positions far
out, inputs_embeds. If something differs, the first diverging module is found in that situation.
What to make of the evidence is the checks' business.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from portkit.live import engine as live_engine
from portkit.live.engine import Engine, Generated, Prompt
from portkit.live.failure import describe
from portkit.live.float32_kernels import what_is_opened
from portkit.live.ignored import ignored_by
from portkit.live.job import JobRequest
from portkit.live.locate import place_of
from portkit.live.parity import Comparison, compare, compare_decode
from portkit.live.prompts import CELLS, Prompts, noise_prompt, prompts_for, random_ids, texts_of
from portkit.live.reference import Reference
from portkit.live.trace import BeforeForward
from portkit.port import Port

STAGES = ("prefill", "chunked", "decode", "ragged", "far", "embeds", "influence")
DECODED = 8
"""Tokens that the decode stage generates for each prompt."""
TRIED = 17
"""Tokens of the prompt on which every parameter is changed in turn."""


def run(request: JobRequest, say: Callable[[str], None]) -> dict[str, Any]:
    """Return {"starts": ..., and for each of STAGES its evidence}; see `_Evidence`.

    `request.args`: "loader", "portkit" (default) or "port"; "trace": False leaves the search for
    the diverging module and for parameters of no influence out; "stages": only these.
    """
    port = Port(Path(request.port_root))
    say("starting vLLM on the port")
    with live_engine.start(port.root, loader=request.args.get("loader", "portkit")) as engine:
        stages = tuple(request.args.get("stages") or STAGES)
        return _Evidence(engine, say, request.args.get("trace", True)).gather(stages)


class _Situation:
    """How to run the failing prompt again, for the trace."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        which: int,
        max_tokens: int,
        ids: Sequence[int],
        embeds: bool = False,
    ) -> None:
        self.prompts = prompts
        self.which = which
        self.max_tokens = max_tokens
        self.ids = ids
        self.embeds = embeds


class _Evidence:
    def __init__(self, engine: Engine, say: Callable[[str], None], trace: bool) -> None:
        self.engine = engine
        self.say = say
        self.trace = trace
        self.root = str(engine.port.root)
        self.longest = int(engine.llm.llm_engine.model_config.max_model_len)
        self.prompts: Prompts = prompts_for(engine.port, engine.checkpoint, longest=self.longest)
        self.reference = Reference(engine.port, engine.checkpoint, device=engine.profile.device)
        self.vocab = engine.vocab_size
        noise = self.reference.noise(noise_prompt(self.vocab))
        self.limit = engine.profile.measured(noise)
        self.usual = engine.profile.allowed(noise)

    def gather(self, stages: Sequence[str]) -> dict[str, Any]:
        value: dict[str, Any] = {
            "starts": self._starts(),
            "tolerance": [self.limit.value, self.limit.reason],
        }
        if value["starts"].get("error"):
            return value
        for stage in stages:
            if stage == "influence" and not self._worth_it(value):
                continue
            self.say(f"running: {stage}")
            value[stage] = self._guarded(getattr(self, f"_{stage}"))
        ids = {
            token
            for stage in STAGES
            for case in value.get(stage, {}).get("cases", ())
            if not case["ok"]
            for side in ("ours", "theirs")
            for token, _ in case[side]
        }
        value["texts"] = texts_of(self.engine.checkpoint, ids)
        return value

    def _worth_it(self, value: dict[str, Any]) -> bool:
        """Whether to look for parameters of no influence: parity has found nothing simpler."""
        cases = value.get("prefill", {}).get("cases", ())
        return self.trace and all(case["ok"] for case in cases)

    def _guarded(self, stage: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Run a stage; an exception in the port becomes {"error": {what, where, next, log}}."""
        try:
            return stage()
        except Exception as error:
            log = "".join(traceback.format_exception(error))[-6000:]
            self.engine.recover()
            return {"error": {**describe(error, self.root), "log": log}}

    # ---- the stages -----------------------------------------------------------------------------

    def _starts(self) -> dict[str, Any]:
        engine = self.engine
        config = engine.llm.llm_engine.vllm_config
        report = getattr(engine.model, "portkit_load_report", None)
        left = dict(report.left_over) if report else {}
        ignored = ignored_by(self.reference.model_class, engine.checkpoint, left) if left else ()
        left = {name: shape for name, shape in left.items() if name not in ignored}
        from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

        # State-space layers and latent attention keep their state in the cache as Attention does.
        attentions = [
            (p, m) for p, m in engine.model.named_modules() if isinstance(m, AttentionLayerBase)
        ]

        def answer() -> dict[str, Any]:
            generated = engine.generate([random_ids(self.vocab, 5, seed=5)], 2)[0]
            return {
                "tokens": list(generated.tokens),
                "finite": bool((generated.logprobs == generated.logprobs).all()),
            }

        return {
            "class": f"{type(engine.model).__module__}.{type(engine.model).__qualname__}",
            "expected": f"{engine.port.module}.{engine.port.architecture}",
            "runner": type(engine.runner).__name__,
            "attention_layers": len(attentions),
            "attention_backend": _backend(attentions[0][1]) if attentions else "",
            "opened": what_is_opened(engine.model, engine.profile.device),
            "block_size": config.cache_config.block_size,
            "blocks": config.cache_config.num_gpu_blocks,
            "max_model_len": self.longest,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "load": {**report.to_dict(), "left_over": left} if report else {},
            "ignored": list(ignored),
            "left_over_at": self._made_at(next(iter(left), "")),
            **self._guarded(answer),
        }

    def _made_at(self, tensor: str) -> str:
        place = place_of(self.engine.model, tensor.rpartition(".")[0]) if tensor else None
        return str(place) if place else ""

    def _prefill(self) -> dict[str, Any]:
        cases = []
        with self.engine.recorded_schedule() as steps:
            for ids in self.prompts.short:
                ours = self.engine.prompt_logprobs([ids])[0]
                cases.append((self._compare(ids, ours, ids), _Situation([ids], 0, 1, ids)))
        return self._judged(cases, steps)

    def _chunked(self) -> dict[str, Any]:
        ids = self.prompts.long
        with self.engine.recorded_schedule() as steps:
            ours = self.engine.prompt_logprobs([ids])[0]
        chunks = [n for step in steps for n in step.values()]
        found = self._judged([(self._compare(ids, ours, ids), _Situation([ids], 0, 1, ids))], steps)
        return {**found, "chunks": chunks, "tokens": len(ids)}

    def _decode(self) -> dict[str, Any]:
        block = int(self.engine.llm.llm_engine.vllm_config.cache_config.block_size)
        # Decoding from inside one block into the next, and from a block's very end.
        prompts = [
            *self.prompts.short,
            random_ids(self.vocab, block - 3, seed=400),
            random_ids(self.vocab, block, seed=401),
        ]
        prompts = [p for p in prompts if len(p) + DECODED <= self.longest]
        cases = []
        with self.engine.recorded_schedule() as steps:
            for ids in prompts:
                tokens, rows = self.reference.greedy(ids, DECODED)
                generated = self.engine.generate([ids], DECODED)[0]
                found = compare_decode(
                    f"after a prompt of {len(ids)} tokens",
                    generated,
                    tokens,
                    rows,
                    self.limit.value,
                    start=len(ids) - 1,
                )
                cases.append((found, _Situation([ids], 0, DECODED, ids)))
        single = sum(1 for step in steps if list(step.values()) == [1])
        return {**self._judged(cases, steps), "decode_steps": single, "block_size": block}

    def _ragged(self) -> dict[str, Any]:
        """Lengths together, then a chunked prompt among decoding ones; each against alone."""
        long = random_ids(self.vocab, min(120, self.longest - 16), seed=500)
        batches: list[list[tuple[int, ...]]] = [
            list(self.prompts.ragged),
            [self.prompts.ragged[0], long, *self.prompts.ragged[1:4]],
        ]
        cases = []
        with self.engine.recorded_schedule() as steps:
            for batch in batches:
                together = self.engine.generate(batch, 4, prompt_logprobs=True)
                for which, ids in enumerate(batch):
                    alone = self.engine.generate([ids], 4, prompt_logprobs=True)[0]
                    cases.append(
                        (
                            self._together(ids, together[which], alone, which, len(batch)),
                            _Situation(batch, which, 4, ids),
                        )
                    )
        sizes = sorted({len(step) for step in steps}, reverse=True)
        mixed = sum(1 for step in steps if 1 in step.values() and max(step.values()) > 1)
        return {
            **self._judged(cases, steps),
            "requests_in_a_step": sizes[0] if sizes else 0,
            "mixed_steps": mixed,
        }

    def _together(
        self, ids: Sequence[int], ours: Generated, alone: Generated, which: int, count: int
    ) -> Comparison:
        name = f"request {which + 1} of {count} ({len(ids)} tokens) against the same alone"
        prompt = compare(name, ours.rows, alone.rows, self.engine.profile.itself.value)
        if not prompt.ok:
            return prompt
        return compare_decode(
            name + ", decoding",
            ours,
            alone.tokens,
            alone.logprobs,
            max(self.engine.profile.itself.value, self.usual.value),
            start=len(ids) - 1,
        )

    def _far(self) -> dict[str, Any]:
        ids, further = self.prompts.far, self.prompts.further
        limit = self.usual.value  # angles round more, the further out
        whole = len(ids) * self.vocab <= CELLS
        with self.engine.recorded_schedule() as steps:
            generated = self.engine.generate([ids], further, prompt_logprobs=whole)[0]
        situation = _Situation([ids], 0, further, ids)
        tokens, rows = self.reference.greedy(ids, further)
        cases = []
        if whole:
            cases.append((self._compare(ids, generated.rows, ids, limit=limit), situation))
        cases.append(
            (
                compare_decode(
                    f"decoding at positions {len(ids) - 1} and on",
                    generated,
                    tokens,
                    rows,
                    limit,
                    start=len(ids) - 1,
                ),
                situation,
            )
        )
        config = self.engine.checkpoint.config
        return {
            **self._judged(cases, steps),
            "reached": len(ids) + further - 1,
            "max_model_len": self.longest,
            "max_position_embeddings": config.get("max_position_embeddings"),
            "sliding_window": config.get("sliding_window"),
        }

    def _embeds(self) -> dict[str, Any]:
        """Embeddings in place of ids: made by the port, and handed in by the caller."""
        wide = self.reference.embeddings(self.prompts.short[0]).shape[-1]
        room = self.engine.llm.llm_engine.model_config.get_inputs_embeds_size()
        if wide != room:
            # An OPT with word_embed_proj_dim: its projection comes after the embeddings.
            return {
                "beyond_vllm": f"the embeddings of this model are {wide} wide and its layers "
                f"{room}; vLLM's runner keeps inputs_embeds as wide as the layers "
                "(ModelConfig.get_inputs_embeds_size), so it cannot be given these"
            }
        seen: list[tuple[bool, bool]] = []

        def watch(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            seen.append((ids is None, kwargs.get("inputs_embeds") is not None))

        cases = []
        handle = BeforeForward(self.engine.model, watch)
        try:
            with self.engine.recorded_schedule() as steps, self.engine.embedding_inputs(True):
                for ids in self.prompts.short[:3]:
                    ours = self.engine.prompt_logprobs([ids])[0]
                    cases.append(
                        (
                            self._compare(ids, ours, ids, "embedded by embed_input_ids"),
                            _Situation([ids], 0, 1, ids, embeds=True),
                        )
                    )
                ids = self.prompts.short[0]
                given = self.reference.embeddings(ids).to(torch.float32)
                tokens, rows = self.reference.greedy(ids, 4)
                generated = self.engine.generate([given], 4)[0]
                cases.append(
                    (
                        compare_decode(
                            "embeddings of Transformers as the prompt",
                            generated,
                            tokens,
                            rows,
                            self.limit.value,
                            start=len(ids) - 1,
                        ),
                        _Situation([given], 0, 4, ids, embeds=True),
                    )
                )
        finally:
            handle.remove()
        used = sum(1 for without_ids, with_embeds in seen if without_ids and with_embeds)
        return {**self._judged(cases, steps), "calls": len(seen), "calls_with_embeds": used}

    def _influence(self) -> dict[str, Any]:
        """What no comparison shows if the checkpoint's values hide it."""
        from portkit.live.influence import influence

        ids = max(self.prompts.short, key=len)[:TRIED]
        return {"cases": [], **influence(self.engine, self.reference.model, ids)}

    # ---- comparing ------------------------------------------------------------------------------

    def _compare(
        self,
        ids: Sequence[int],
        ours: Any,
        reference: Sequence[int],
        how: str = "",
        limit: float = 0.0,
    ) -> Comparison:
        name = f"prompt of {len(ids)} tokens" + (f", {how}" if how else "")
        return compare(name, ours, self.reference.logprobs(reference), limit or self.limit.value)

    def _judged(
        self, cases: list[tuple[Comparison, _Situation]], steps: list[dict[str, int]]
    ) -> dict[str, Any]:
        """Return the comparisons as plain values and, if one failed, where it first diverges."""
        look = self.reference.second_look
        cases = [(look(found, s.ids, self.engine.profile), s) for found, s in cases]
        computed = sum(n for step in steps for n in step.values())
        evidence: dict[str, Any] = {"steps": len(steps), "tokens_computed": computed}
        evidence["cases"] = [case.to_dict() for case, _ in cases]
        failed = [(case, situation) for case, situation in cases if not case.ok]
        if failed:
            worst = max(case.max_abs for case, _ in failed)

            def telling(pair: tuple[Comparison, _Situation]) -> tuple[int, bool, bool, int]:
                # Short enough to read, long enough that a cause that is tried cannot fit by chance;
                # and a prompt that hardly shows the bug leads to where it is amplified.
                case, tried = pair
                faint = case.max_abs < worst / 10
                return len(tried.prompts), len(tried.ids) < 8, faint, len(tried.ids)

            shown = min(failed, key=telling)
            evidence["shown"], situation = cases.index(shown), shown[1]
        if failed and self.trace:
            from portkit.live.divergence import first_divergence

            self.say("looking for the first diverging module")
            with self.engine.embedding_inputs(situation.embeds):
                evidence["divergence"] = self._guarded(
                    lambda: first_divergence(
                        self.engine,
                        self.reference.model,
                        situation.prompts,
                        situation.which,
                        situation.max_tokens,
                        situation.ids,
                    )
                )
        return evidence


def _backend(attention: Any) -> str:
    """Return vLLM's name of the attention backend, and what it was kept from."""
    name = attention.get_attn_backend().get_name()
    expanded = os.environ.get("VLLM_MLA_DISABLE") == "1"
    return f"{name}, latents expanded by VLLM_MLA_DISABLE=1" if expanded else name
