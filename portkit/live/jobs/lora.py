"""Job: run the port with LoRA adapters, beside Transformers with the same change of its weights.

args: "loader", "portkit" (default) or "port"; "ranks", tensor-parallel (default 1).
value: how (where the ranks run), layers (what an adapter of all linears adapts, by path), effect
(how far the random adapter moves Transformers' log-probabilities), tolerance, by_layer (float16 and
routers: the prompt in the middle is compared, not all), unadapted (max_abs and ok of the port
without an adapter; None but in float16), zero and all (error, max_abs, median, ok; all also
furthest, of linears), linears (each on its own input, live/adapted_linears.py; one rank), parts
(only if `all` differs: per layer name, an adapter of that alone: ours, theirs, max_abs, error,
like: another layer name whose change the port made instead), repeated (only if `all` differs on
ranks: names of layers of which a block of vLLM's own repeats rows for ranks), halved (the same: of
which it would cut an adapter in two halves); "nothing" with a reason instead, if there is no linear
to adapt or the class takes no adapters.
"""

from __future__ import annotations

import copy
import itertools
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from vllm.config.model import _FLOAT16_NOT_SUPPORTED_MODELS
from vllm.lora.request import LoRARequest
from vllm.model_executor.models.interfaces import supports_lora

from portkit.live import adapters
from portkit.live.adapted_linears import by_hand, halved_in_blocks, rows_in_blocks, watched
from portkit.live.checkpoint import Checkpoint, open_checkpoint
from portkit.live.device import find_device
from portkit.live.engine import Engine
from portkit.live.failure import chain
from portkit.live.fused import fused_parts, stacked_parts
from portkit.live.job import JobRequest
from portkit.live.missing_kernels import missing_kernel
from portkit.live.portmodule import port_class
from portkit.live.profile import Tolerance
from portkit.live.prompts import noise_prompt, prompts_for
from portkit.live.quantised import is_stack, logprobs
from portkit.live.reference import Reference, load_model, original_class
from portkit.live.rehearsal import how, rehearse
from portkit.port import Port

REFUSED = "does not support LoRA"
"""What vLLM says of a class without SupportsLoRA (v1/worker/lora_model_runner_mixin.py)."""
HALF = 4
"""How often Transformers' own rounding to float16 the port may be away from it: both round."""
LAYER = 0.05
"""How far what an adapter adds to a layer may be from what it should add, as a part of that: the
sum is rounded to the engine's dtype (float16: a thousandth of the output, which is ten times what
is added)."""
SHOWS = 3
"""How many tolerances an adapter must move the model by for the comparison to tell anything."""
ROWS = 8
"""Prompts; each is judged by the distribution after its last token. vLLM's CPU build cannot give
those after the other tokens where the head takes adapters too."""


def run(request: JobRequest, say: Callable[[str], None]) -> dict[str, Any]:
    """Adapt, run, compare; what vLLM or the port raises passes through."""
    port = Port(Path(request.port_root))
    checkpoint = open_checkpoint(port.checkpoint)
    if find_device()[0] == "cpu" and "FusedMoE" in port.source:
        return {"nothing": "experts beside adapters run on a Triton kernel, which needs a GPU"}
    ranks, loader = int(request.args.get("ranks", 1)), request.args.get("loader", "portkit")
    say(f"starting vLLM with LoRA on {how(ranks)}")
    try:
        return {"how": how(ranks), **_with_engine(port, checkpoint, ranks, loader, say)}
    except Exception as error:
        # Without adapters the port ran.
        if kernel := next(filter(None, map(missing_kernel, chain(error))), ""):
            return {"nothing": kernel}
        refused = isinstance(error, ValueError) and REFUSED in str(error)
        if not refused and supports_lora(port_class(port)):  # one without may stop by itself
            raise
        return {"nothing": "the class does not say SupportsLoRA, so vLLM takes no adapter for it"}


def _with_engine(
    port: Port, checkpoint: Checkpoint, ranks: int, loader: str, say: Callable[[str], None]
) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if find_device()[0] == "cuda":
        # vLLM's LoRA kernels for GPUs take no float32 (lora/ops/triton_ops/lora_expand_op.py). It
        # refuses float16 for models whose published weights leave its range: seen for those at
        # hand. A job is a process of its own: nothing has to be put back.
        _FLOAT16_NOT_SUPPORTED_MODELS.clear()
        options["dtype"] = "float16"
    with rehearse(
        port.root,
        ranks,
        loader=loader,
        enable_lora=True,
        max_lora_rank=adapters.RANK,
        enable_prompt_embeds=False,
        **options,
    ) as engine:
        # Not before: ranks are forks of a process that has computed nothing yet.
        original = load_model(original_class(port), checkpoint)
        paths = adapters.adaptable(original, set(checkpoint.names))
        if not paths:
            return {"nothing": "the original has no linear layer that its checkpoint names"}
        folder = port.state_dir / "cache" / "lora"
        shutil.rmtree(folder, ignore_errors=True)
        packed = fused_parts(engine.port_class)
        if loader == "port":
            # vLLM deals adapters out by packed_modules_mapping: loading did not need it.
            packed |= stacked_parts(engine.port_class)
        comparison = _Comparison(engine, original, folder, packed, half="dtype" in options)
        if not math.isfinite(comparison.limit.value):
            return {
                "nothing": "Transformers' model is not finite in float16, which vLLM needs here"
            }
        return comparison.gather(paths, say)


class _Comparison:
    """The port and Transformers, both with an adapter, on the same prompts."""

    def __init__(
        self,
        engine: Engine,
        original: nn.Module,
        folder: Path,
        packed: dict[str, list[str]],
        *,
        half: bool,
    ) -> None:
        self.engine = engine
        self.packed = packed
        self.original = original
        self.folder = folder
        longest = int(engine.llm.llm_engine.model_config.max_model_len)
        short = prompts_for(engine.port, engine.checkpoint, longest=longest).short
        self.prompts = [ids[:n] for ids in short for n in (len(ids), len(ids) // 2) if n][:ROWS]
        self.plain = self._theirs({})
        self.numbers = itertools.count(1)
        self.half = half
        chooses = any(n.endswith(".experts") or is_stack(m) for n, m in original.named_modules())
        # Rounding leads routers to other experts for a token here and there, and that moves a
        # prompt as far as an adapter does: then layers tell more than prompts.
        self.by_layer = half and chooses
        self.linears: list[dict[str, Any]] = []
        self.limit = self._in_half() if half else self._in_float32()

    def _in_float32(self) -> Tolerance:
        reference = Reference(
            self.engine.port, self.engine.checkpoint, device=self.engine.profile.device
        )
        noise = reference.noise(noise_prompt(self.engine.vocab_size))
        return self.engine.profile.allowed(noise)

    def _in_half(self) -> Tolerance:
        model = copy.deepcopy(self.original).half()
        noise = _distance(np.stack([logprobs(model, ids)[-1] for ids in self.prompts]), self.plain)
        return Tolerance(
            HALF * noise,
            f"float16, which vLLM's LoRA kernels for GPUs take, moves Transformers itself by "
            f"{noise:.1e}; {HALF} times that is allowed",
        )

    def gather(self, paths: Sequence[str], say: Callable[[str], None]) -> dict[str, Any]:
        say("comparing with Transformers, adapted alike")
        zero = self._with(adapters.zero_adapter(self.original, paths))
        adapter = adapters.random_adapter(self.original, paths)
        theirs = self._theirs(adapter)
        effect = _distance(theirs, self.plain)
        if effect < SHOWS * self.limit.value:
            return {
                "nothing": f"a random adapter moves Transformers by {effect:.2g}, which is not "
                f"{SHOWS} times the tolerance of {self.limit.value:.2g} ({self.limit.reason})"
            }
        value: dict[str, Any] = {
            "layers": list(paths),
            "effect": effect,
            "tolerance": [self.limit.value, self.limit.reason],
            "by_layer": self.by_layer,
            "unadapted": None,
            "zero": self._judged(zero, self.plain),
            "parts": [],
            "repeated": [],
            "halved": [],
        }
        if self.half:
            plain = self._answers()
            value["unadapted"] = self._judged(plain, self.plain)
            if self.by_layer:
                value["unadapted"]["ok"] = value["unadapted"]["median"] <= self.limit.value
                value["zero"] = self._judged(zero, plain)  # the port's own: nothing is added
        value["all"] = self._compared(adapter, theirs)[1]
        value["linears"] = list(self.linears)
        if not value["all"]["ok"]:
            say("finding the layers whose adapter goes astray")
            value["parts"] = self._parts(paths)
            if self.engine.tensor_parallel_size > 1:
                rows = self.engine.on_model(rows_in_blocks)[0]
                of = {path.rpartition(".")[2]: len(b) for path, (_, b) in adapter.items()}
                value["repeated"] = [n for n, count in of.items() if rows.get(n, count) != count]
                value["halved"] = self.engine.on_model(halved_in_blocks)[0]
        return value

    def _with(self, adapter: adapters.Adapter) -> np.ndarray | str:
        """Return the port's answers with an adapter, or what vLLM said against it."""
        number = next(self.numbers)
        adapters.write(self.folder / str(number), adapter)
        request = LoRARequest(f"adapter {number}", number, str(self.folder / str(number)))
        self.linears = []
        try:
            self.engine.llm.llm_engine.add_lora(request)
        except (ValueError, RuntimeError, AssertionError) as error:  # sizes that do not fit, too
            return str(error) or repr(error)
        if self.engine.tensor_parallel_size > 1:
            return self._answers(request)
        with watched(self.engine.model) as added:
            answers = self._answers(request)
        self.linears = by_hand(self.engine.model, added, adapter, self.packed)
        return answers

    def _compared(
        self, adapter: adapters.Adapter, theirs: np.ndarray
    ) -> tuple[np.ndarray | str, dict[str, Any]]:
        """Return the port's answers, judged: the whole model, unless only its layers tell."""
        ours = self._with(adapter)
        judged = self._judged(ours, theirs)
        if judged["error"]:
            return ours, judged
        far = max((row["difference"] for row in self._told()), default=0.0)
        whole = judged["median"] <= self.limit.value if self.by_layer else judged["ok"]
        return ours, {**judged, "furthest": far, "ok": whole and far <= LAYER}

    def _told(self) -> list[dict[str, Any]]:
        """Return the layers by hand that say something: where only they do, all of them."""
        return [row for row in self.linears if row["layer"] or self.by_layer]

    def _answers(self, request: LoRARequest | None = None) -> np.ndarray:
        return np.concatenate(
            [g.logprobs for g in self.engine.generate(self.prompts, adapter=request)]
        )

    def _theirs(self, adapter: adapters.Adapter) -> np.ndarray:
        with adapters.adapted(self.original, adapter) as model:
            return np.stack([logprobs(model, ids)[-1] for ids in self.prompts])

    def _judged(self, ours: np.ndarray | str, theirs: np.ndarray) -> dict[str, Any]:
        if isinstance(ours, str):
            return {"error": ours, "max_abs": float("inf"), "median": float("inf"), "ok": False}
        apart = sorted(_distance(one, other) for one, other in zip(ours, theirs, strict=True))
        return {
            "error": "",
            "max_abs": apart[-1],
            "median": apart[len(apart) // 2],
            "ok": apart[-1] <= self.limit.value,
        }

    def _parts(self, paths: Sequence[str]) -> list[dict[str, Any]]:
        names = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
        of = {n: [p for p in paths if p.rpartition(".")[2] == n] for n in names}
        rows = []
        for name in names:
            adapter = adapters.random_adapter(self.original, of[name])
            theirs = self._theirs(adapter)
            ours, judged = self._compared(adapter, theirs)
            row = {
                "name": name,
                "path": of[name][0],
                "theirs": _distance(theirs, self.plain),
                "ours": _distance(ours, self.plain) if not isinstance(ours, str) else None,
                "like": "",
                **judged,
            }
            if not judged["ok"] and not isinstance(ours, str) and not self.by_layer:
                row["like"] = self._like(ours, adapter, [n for n in names if n != name])
            rows.append(row)
        return rows

    def _like(self, ours: np.ndarray, adapter: adapters.Adapter, names: Sequence[str]) -> str:
        """Return the other layer of the same shape that the port applied this adapter to, or ""."""
        for other in names:
            moved = {f"{p.rpartition('.')[0]}.{other}": pair for p, pair in adapter.items()}
            try:
                alike = self._judged(ours, self._theirs(moved))["ok"]
            except (AttributeError, RuntimeError):  # no such layer there, or another shape
                continue
            if alike:
                return other
        return ""


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    """Return the largest |difference| of a log-probability; inf for a NaN."""
    largest = float(np.abs(one - other).max())
    return float("inf") if np.isnan(largest) else largest
