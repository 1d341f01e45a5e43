"""Generation speed of one way to run the model: tokens per second, several repeats.

args: way ("port", "native", "transformers_backend", "transformers"), batches, tokens_in,
tokens_out; repeats and seconds, of each batch and both at least; kv_cache_gib, the size of the KV
cache on a GPU (default: the checks' own); turns, a folder, and ways, all that take turns; dtype
(default: bfloat16 on a GPU, float32 on a CPU).
Each way runs in a process of its own, one after the other. With `turns` all are up at the same time
and take turns, run by run, so that what the machine does meanwhile meets all alike; `repeats` runs.
value: rows [{batch, rates, step_ms}], rates in generated tokens per second; how (dtype, eager,
class). step_ms: time that the GPU computes for one step of the batch, in milliseconds, prompts
included: the sum of its kernels in one more run, under torch.profiler; None on a CPU.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from vllm import LLM, ModelRegistry, SamplingParams

from portkit.errors import PortkitError
from portkit.live.checkpoint import Checkpoint, open_checkpoint
from portkit.live.device import find_device
from portkit.live.job import JobRequest
from portkit.live.portmodule import port_class
from portkit.live.profile import Profile
from portkit.live.prompts import random_ids
from portkit.live.reference import original_class
from portkit.port import Port

PATIENCE = 280.0
"""Seconds to wait for the other ways: they compile and capture first."""
Generate = Callable[[int], int]
"""Generate for one batch size and return the number of tokens made."""


def run(request: JobRequest, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure; raises PortkitError if vLLM does not run the model this way."""
    args = request.args
    port = Port(Path(request.port_root))
    checkpoint = open_checkpoint(port.checkpoint)
    cuda = find_device()[0] == "cuda"
    dtype = args.get("dtype", "bfloat16" if cuda else "float32")
    say(f"starting: {args['way']}")
    if args["way"] == "transformers":
        generate, how = _transformers(port, checkpoint, dtype, args)
    else:
        generate, how = _vllm(port, checkpoint, dtype, not cuda, args)
    turns = _Turns(Path(args["turns"]), args["ways"], args["way"]) if "turns" in args else None
    rows = []
    for batch in args["batches"]:
        generate(batch)  # compiles, captures and fills caches
        rates: list[float] = []
        until = time.perf_counter() + (0.0 if turns else args.get("seconds", 0.0))
        while len(rates) < args["repeats"] or time.perf_counter() < until:
            say(
                f"{args['way']}, batch {batch}, run {len(rates) + 1} (of {args['repeats']} or more)"
            )
            with turns.next() if turns else nullcontext():
                began = time.perf_counter()
                made = generate(batch)
                rates.append(made / (time.perf_counter() - began))
        with turns.next() if turns else nullcontext():
            busy = _busy(generate, batch) / args["tokens_out"] if cuda else None
        rows.append({"batch": batch, "rates": rates, "step_ms": busy})
    return {"rows": rows, "how": {**how, "dtype": dtype}}


class _Turns:
    """Several processes that do one thing at a time, in the order of `ways`, round by round.

    For a way that failed its starter puts `<way>-out` into the folder.
    """

    def __init__(self, folder: Path, ways: Sequence[str], way: str) -> None:
        self.folder, self.way, self.round = folder, way, 0
        self.before = ways[: ways.index(way)]
        self.after = ways[ways.index(way) + 1 :]
        self._done(way, 0).touch()

    @contextmanager
    def next(self) -> Iterator[None]:
        """Wait for this way's next turn. Raises PortkitError if another way never comes to its."""
        self.round += 1
        waited_for = [(way, self._done(way, self.round)) for way in self.before]
        waited_for += [(way, self._done(way, self.round - 1)) for way in self.after]
        until = time.monotonic() + PATIENCE
        while not all(
            mark.exists() or (self.folder / f"{way}-out").exists() for way, mark in waited_for
        ):
            if time.monotonic() > until:
                raise PortkitError(
                    f"Another way did not take its turn in {PATIENCE:.0f} s.",
                    str(self.folder),
                    "See what that way said; leave it out, or measure without turns.",
                )
            time.sleep(0.002)
        yield
        self._done(self.way, self.round).touch()

    def _done(self, way: str, round: int) -> Path:
        return self.folder / f"{way}-{round}"


def _busy(generate: Generate, batch: int) -> float:
    """Return the milliseconds that the GPU's kernels take in one run."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        generate(batch)
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profiler.key_averages()) / 1e3


def _prompts(checkpoint: Checkpoint, count: int, length: int) -> list[list[int]]:
    vocab = int(checkpoint.config["vocab_size"])
    return [list(random_ids(vocab, length, seed=1000 + n)) for n in range(count)]


def _transformers(
    port: Port, checkpoint: Checkpoint, dtype: str, args: dict[str, Any]
) -> tuple[Generate, dict]:
    device = "cuda" if find_device()[0] == "cuda" else "cpu"
    cls = original_class(port)
    model = cls.from_pretrained(
        str(checkpoint.root), dtype=getattr(torch, dtype), local_files_only=True
    )
    model = model.to(device).eval()

    def generate(batch: int) -> int:
        ids = torch.tensor(_prompts(checkpoint, batch, args["tokens_in"]), device=device)
        with torch.inference_mode():
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                eos_token_id=-1,
                max_new_tokens=args["tokens_out"],
                min_new_tokens=args["tokens_out"],
            )
        return int(made.shape[0] * (made.shape[1] - ids.shape[1]))

    return generate, {"class": f"{cls.__module__}.{cls.__qualname__}", "eager": True}


def _vllm(
    port: Port,
    checkpoint: Checkpoint,
    dtype: str,
    eager: bool,
    args: dict[str, Any],
) -> tuple[Generate, dict]:
    way = args["way"]
    native = port.architecture in ModelRegistry.get_supported_archs()
    if way == "native" and not native:
        raise PortkitError(
            f"vLLM has no class of its own for {port.architecture}.", "vLLM's registry", ""
        )
    if way == "port":
        ModelRegistry.register_model(port.architecture, port_class(port))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    if eager:
        torch.compiler.set_stance("force_eager")
    options = Profile.for_device(find_device()[0]).options
    memory = {
        k: options[k] for k in ("gpu_memory_utilization", "kv_cache_memory_bytes") if k in options
    }
    if memory and "kv_cache_gib" in args:
        memory["kv_cache_memory_bytes"] = int(args["kv_cache_gib"]) << 30
    llm = LLM(
        str(checkpoint.root),
        skip_tokenizer_init=True,
        dtype=dtype,
        enforce_eager=eager,
        model_impl="transformers" if way == "transformers_backend" else "vllm",
        # A repeat must compute its prompts again, as Transformers does.
        enable_prefix_caching=False,
        max_model_len=args["tokens_in"] + args["tokens_out"],
        max_num_seqs=max(args["batches"]),
        disable_log_stats=True,
        **memory,
    )
    (served,) = set(
        llm.apply_model(lambda model: f"{type(model).__module__}.{type(model).__qualname__}")
    )
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=args["tokens_out"],
        min_tokens=args["tokens_out"],
        ignore_eos=True,
        detokenize=False,
    )

    def generate(batch: int) -> int:
        prompts = [{"prompt_token_ids": p} for p in _prompts(checkpoint, batch, args["tokens_in"])]
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return generate, {"class": served, "eager": eager}
