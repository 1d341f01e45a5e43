"""Run the port as users run it and compare with Transformers: by vLLM's own rule and by distance.

args: tensor_parallel_size, eager, dtype ("float32" or "auto"), rule (folder of vLLM's source, whose
tests/models/utils.py has the rule), tokens (generated per prompt).
value: compiled, mode, cudagraphs, dtype, routed, scheduled [tokens computed the first time, and
again], kept (whether a prompt fills a block, so that a prefix can be cached), rule {"ok", "text"},
rows [{prompt, tokens, first_mismatch, max, mean, again, again_equal, floor_mean, asked}]:
distances of log-probabilities to Transformers in float32; the floor is Transformers' own distance
from that in the engine's precision (0 in float32), and the rule is asked for as many tokens as
Transformers in that precision keeps it itself.
routed: in half precision, where routers choose experts: rounding gives a token here and there other
ones, in the port and in Transformers, at tokens of their own. Then both are compared on the port's
text, means are those of the token in the middle, and the rule is asked up to one that stands out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from portkit.live.checkpoint import open_checkpoint
from portkit.live.engine import Engine, Generated
from portkit.live.job import JobRequest
from portkit.live.prompts import prompts_for, random_ids
from portkit.live.quantised import is_stack
from portkit.live.reference import Reference
from portkit.live.rehearsal import rehearse
from portkit.port import Port

OUTLIER = 5.0
TOP = 5
"""The k of vLLM's rule: its own model tests ask for five log-probabilities."""

USERS = {
    "enable_prefix_caching": True,
    "enable_prompt_embeds": False,
    "max_num_batched_tokens": 2048,
    "block_size": None,
}
"""What differs from the checks of the earlier steps: vLLM's own defaults."""


def run(request: JobRequest, say: Callable[[str], None]) -> dict[str, Any]:
    """Start the engine as users do, generate twice (then from cached prefixes), compare."""
    args = request.args
    port = Port(Path(request.port_root))
    checkpoint = open_checkpoint(port.checkpoint)
    longest = min(int(checkpoint.config.get("max_position_embeddings") or 512), 512)
    options = {
        **USERS,
        "enforce_eager": args["eager"],
        "dtype": args["dtype"],
        "max_model_len": longest,
        # vLLM would measure how many there is room for, and on a CPU fill them: seconds.
        "num_gpu_blocks_override": 256 if args["eager"] else None,
    }
    if args["dtype"] == "auto":
        options["attention_config"] = None  # vLLM's own choice of kernel
    say(f"starting vLLM as users do ({args['dtype']}, {args['tensor_parallel_size']} ranks)")
    with rehearse(port.root, args["tensor_parallel_size"], loader="port", **options) as engine:
        found = prompts_for(port, checkpoint, longest=longest)
        prompts = [*found.short, found.long]
        block = int(engine.llm.llm_engine.vllm_config.cache_config.block_size)
        # Only whole blocks are kept, and those of a hybrid are as long as its state is large.
        room = longest - args["tokens"]
        if len(found.long) <= block < room:
            prompts.append(random_ids(engine.vocab_size, min(2 * block - 1, room), seed=201))
        say("generating, and again with the prefixes cached")
        with engine.recorded_schedule() as first:
            once = engine.generate(prompts, args["tokens"])
        with engine.recorded_schedule() as second:
            again = engine.generate(prompts, args["tokens"])
        value = {
            **_how(engine),
            "scheduled": [_total(first), _total(second)],
            "kept": any(len(prompt) > block for prompt in prompts),
        }
    say("Transformers on the same prompts")
    reference = Reference(port, checkpoint)
    routed = value["routed"] = value["dtype"] != "float32" and any(
        name.endswith(".experts") or is_stack(module)
        for name, module in reference.model.named_modules()
    )
    if routed:
        expected = [_on_its_text(reference, p, o) for p, o in zip(prompts, once, strict=True)]
        texts = [o.tokens for o in once]
    else:
        expected = [reference.greedy(p, args["tokens"]) for p in prompts]
        texts = [tokens for tokens, _ in expected]
    itself = _in_its_precision(reference, value["dtype"], prompts, texts, expected)
    value["rows"] = [
        {
            **_row(p, e, o, a, np.abs(own - e[1]), routed),
            "asked": _keeps_the_rule(e[1], own),
        }
        for p, e, o, a, own in zip(prompts, expected, once, again, itself, strict=True)
    ]
    if routed:
        for row, at in zip(value["rows"], _stands_out(once, expected), strict=True):
            row["asked"] = min(row["asked"], at)
    asked = [row["asked"] for row in value["rows"]]
    value["rule"] = _by_vllm_rule(Path(args["rule"]), expected, once, asked)
    return value


def _how(engine: Engine) -> dict[str, Any]:
    """Say how the engine really runs; taken from the engine, not from what was asked for."""
    config = engine.llm.llm_engine.vllm_config
    mode = getattr(config.compilation_config.mode, "name", str(config.compilation_config.mode))
    graphs = getattr(config.compilation_config.cudagraph_mode, "name", "NONE")
    compiled = engine.on_model(_compiled_modules)
    return {
        "mode": mode,
        "cudagraphs": graphs,
        "compiled": sorted({name for rank in compiled for name in rank}),
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
    }


def _compiled_modules(model: Any) -> list[str]:
    """Runs on each rank: the modules that @support_torch_compile compiled."""
    return [
        type(m).__name__ for m in model.modules() if getattr(m, "do_not_compile", True) is False
    ]


def _total(schedule: Sequence[dict[str, int]]) -> int:
    return sum(sum(step.values()) for step in schedule)


def _row(
    prompt: Sequence[int],
    expected: tuple[tuple[int, ...], np.ndarray],
    once: Generated,
    again: Generated,
    floor: np.ndarray,
    routed: bool,
) -> dict[str, Any]:
    tokens, rows = expected
    mismatch = next(
        (i for i, (a, b) in enumerate(zip(tokens, once.tokens, strict=True)) if a != b), None
    )
    # Behind a first other token the two sides are asked different questions.
    until = len(tokens) if mismatch is None or routed else mismatch + 1
    gap = np.abs(once.logprobs[:until] - rows[:until])
    middle = np.median if routed else np.mean
    return {
        "prompt": len(prompt),
        "tokens": len(tokens),
        "first_mismatch": mismatch,
        "max": float(gap.max()),
        "mean": float(middle(gap.mean(1))),
        "floor_mean": float(middle(floor[:until].mean(1))),
        "again": float(np.abs(once.logprobs[:until] - again.logprobs[:until]).max()),
        "again_equal": once.tokens == again.tokens,
    }


def _on_its_text(
    reference: Reference, prompt: Sequence[int], found: Generated
) -> tuple[tuple[int, ...], np.ndarray]:
    """Return Transformers' first choices, and distributions, along the text that the port wrote."""
    rows = reference.logprobs([*prompt, *found.tokens[:-1]])[len(prompt) - 1 :]
    return tuple(int(token) for token in rows.argmax(1)), rows


def _stands_out(
    found: Sequence[Generated], expected: Sequence[tuple[tuple[int, ...], np.ndarray]]
) -> list[int]:
    """Return per prompt the first token whose distance is OUTLIER times that of the middle one."""
    gaps = [np.abs(g.logprobs - rows).max(1) for g, (_, rows) in zip(found, expected, strict=True)]
    limit = OUTLIER * np.median(np.concatenate(gaps))
    return [int(np.argmax([*(gap > limit), True])) for gap in gaps]


def _in_its_precision(
    reference: Reference,
    dtype: str,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    expected: Sequence[tuple[tuple[int, ...], np.ndarray]],
) -> list[np.ndarray]:
    """Return, per prompt, Transformers' log-probabilities in `dtype` along the texts."""
    if dtype == "float32":
        return [rows for _, rows in expected]
    model = reference.model_class.from_pretrained(
        str(reference.checkpoint.root), dtype=getattr(torch, dtype), local_files_only=True
    ).eval()
    found = []
    with torch.inference_mode():
        for prompt, tokens in zip(prompts, texts, strict=True):
            ids = torch.tensor([[*prompt, *tokens[:-1]]])
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].float()
            found.append(torch.log_softmax(logits, -1).numpy())
    return found


def _keeps_the_rule(rows: np.ndarray, own: np.ndarray) -> int:
    """Return for how many tokens each side's first choice is among the other's TOP.

    A router that rounds to another expert breaks the rule in Transformers itself.
    """
    for at, (one, other) in enumerate(zip(rows, own, strict=True)):
        first, second = (np.argsort(row)[::-1][:TOP] for row in (one, other))
        if first[0] not in second or second[0] not in first:
            return at
    return len(rows)


def _by_vllm_rule(
    source: Path,
    expected: Sequence[tuple[tuple[int, ...], np.ndarray]],
    found: Sequence[Generated],
    asked: Sequence[int],
) -> dict[str, Any]:
    """Apply check_logprobs_close of vLLM's tests/models/utils.py to so many tokens of each."""
    sys.path.append(str(source))
    from tests.models.utils import check_logprobs_close

    try:
        check_logprobs_close(
            outputs_0_lst=[
                _as_vllm_tests(tokens[:n], rows[:n])
                for (tokens, rows), n in zip(expected, asked, strict=True)
            ],
            outputs_1_lst=[
                _as_vllm_tests(g.tokens[:n], g.logprobs[:n])
                for g, n in zip(found, asked, strict=True)
            ],
            name_0="transformers",
            name_1="vllm",
            warn_on_mismatch=False,
        )
    except AssertionError as error:
        return {"ok": False, "text": str(error)[:1500]}
    return {"ok": True, "text": ""}


def _as_vllm_tests(
    tokens: Sequence[int], rows: np.ndarray
) -> tuple[list[int], str, list[dict[int, float]]]:
    tops = [np.argsort(row)[::-1][:TOP] for row in rows]
    tables = [{int(i): float(row[i]) for i in top} for row, top in zip(rows, tops, strict=True)]
    return list(tokens), " ".join(map(str, tokens)), tables
