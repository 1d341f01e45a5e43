"""Job: run the port on N tensor-parallel ranks and compare with Transformers.

args: "ranks"; "stages", of a pipeline (default 1); "loader", "portkit" (default) or "port".
value: how, ranks, stages, tolerance, cases (parity.Comparison), sizes (per rank), collectives (per
rank: module -> call -> count, of one forward of one prompt), load (the portkit loader's report, one
rank only), divergence (if something differs: the first module that does).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from portkit.live.engine import Engine
from portkit.live.job import JobRequest
from portkit.live.parity import Comparison, compare, compare_decode
from portkit.live.profile import Tolerance
from portkit.live.prompts import noise_prompt, prompts_for
from portkit.live.rank_sizes import sizes
from portkit.live.rank_view import start_counting, stop_counting
from portkit.live.reference import Reference
from portkit.live.rehearsal import how, rehearse
from portkit.port import Port

TEXTS = 6
DECODED = 6


def run(request: JobRequest, say: Callable[[str], None]) -> dict[str, Any]:
    """Rehearse and compare; what the port's code raises passes through."""
    args = request.args
    ranks, stages = int(args["ranks"]), int(args.get("stages", 1))
    port = Port(Path(request.port_root))
    place = how(ranks * stages)
    say(f"starting vLLM on {place}")
    with rehearse(port.root, ranks, stages=stages, loader=args.get("loader", "portkit")) as engine:
        say(f"comparing with Transformers on {place}")
        cases, prompts, tolerance = compare_with_reference(engine)
        value: dict[str, Any] = {
            "how": place,
            "ranks": ranks,
            "stages": stages,
            "tolerance": [tolerance.value, tolerance.reason],
            "cases": [case.to_dict() for case in cases],
        }
        value["sizes"] = engine.on_model(sizes)
        if stages > 1:
            return value
        engine.on_model(start_counting)
        engine.generate([prompts[0]])
        value["collectives"] = engine.on_model(stop_counting)
        if ranks == 1:
            report = getattr(engine.model, "portkit_load_report", None)
            value["load"] = report.to_dict() if report else {}
        value["divergence"] = diverges_at(engine, cases, prompts)
    return value


def compare_with_reference(
    engine: Engine,
) -> tuple[list[Comparison], list[Sequence[int]], Tolerance]:
    """Compare prefill, in one batch, and greedy decoding with Transformers, float32.

    Returns the comparisons (one per prompt: its prefill, or its decoding if only that differs), the
    prompts and the tolerance.
    """
    longest = int(engine.llm.llm_engine.model_config.max_model_len)
    prompts = list(prompts_for(engine.port, engine.checkpoint, longest=longest).short[:TEXTS])
    answers = engine.generate(prompts, DECODED, prompt_logprobs=True)
    reference = Reference(engine.port, engine.checkpoint, device=engine.profile.device)
    tolerance = engine.profile.allowed(reference.noise(noise_prompt(engine.vocab_size)))
    limit = tolerance.value
    cases = []
    for ids, answer in zip(prompts, answers, strict=True):
        found = compare(f"prompt of {len(ids)} tokens", answer.rows, reference.logprobs(ids), limit)
        if found.ok:
            tokens, rows = reference.greedy(ids, DECODED)
            decoded = compare_decode(
                f"{DECODED} tokens after a prompt of {len(ids)}",
                answer,
                tokens,
                rows,
                limit,
                start=len(ids) - 1,
            )
            found = found if decoded.ok and decoded.max_abs < found.max_abs else decoded
        cases.append(reference.second_look(found, ids, engine.profile))
    return cases, prompts, tolerance


def diverges_at(
    engine: Engine, cases: Sequence[Comparison], prompts: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Return the first diverging module on the shortest prompt that differs; {} if none does."""
    failed = [ids for case, ids in zip(cases, prompts, strict=True) if not case.ok]
    if not failed:
        return {}
    from portkit.live.divergence import first_divergence
    from portkit.live.rank_divergence import first_on_ranks

    ids = min(failed, key=len)
    reference = Reference(engine.port, engine.checkpoint, device=engine.profile.device)
    try:
        if engine.tensor_parallel_size > 1:
            return first_on_ranks(engine, reference.model, ids)
        return first_divergence(engine, reference.model, [ids], 0, 1, ids)
    except Exception as error:  # The comparison stands; only its explanation is lacking.
        engine.recover()
        return {"path": "", "what": "", "causes": [], "where": "", "failed": repr(error)}
