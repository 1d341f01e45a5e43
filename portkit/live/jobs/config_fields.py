"""Job: which config fields Transformers' source reads and the port does not, and do they matter.

Each such field is given another value in a copy of the config, and Transformers' model is built and
run again with the checkpoint's weights: does its answer change?
value: fields (one row each: name, value, other value, usual: a switch or a name that stands at its
default, line and class in the original, effect: how far log-probabilities move, inf where the
model's shapes change or where a token then sees later ones, None where nothing could be tried),
read (fields that the port reads), file (of the original).
"""

from __future__ import annotations

import ast
import copy
import importlib.util
import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers.activations import ACT2FN

from portkit.analysis.config_reads import config_reads
from portkit.live.checkpoint import open_checkpoint
from portkit.live.job import JobRequest
from portkit.live.prompts import random_ids
from portkit.live.quantised import logprobs
from portkit.live.reference import ATTENTION, SECOND_COPY, load_model, original_class
from portkit.port import Port

SECONDS = 8.0
"""After that the fields that are left are listed and not tried."""
TOKENS = 40
PART = 20
"""Of them; what a decoder says about these does not depend on the others."""
ENGINE = {"sliding_window"}
"""Fields that vLLM reads for the port: Attention takes cache_config.sliding_window."""
MODELS = ("vllm.model_executor.models.", "vllm.models.")
ROUNDING = 1e-3
"""A smaller difference of log-probabilities may be sums in another order."""


def run(request: JobRequest, say: Callable[[str], None]) -> dict[str, Any]:
    """Compare the two sources, and try what only one of them reads."""
    port = Port(Path(request.port_root))
    checkpoint = open_checkpoint(port.checkpoint)
    cls = original_class(port)
    original = load_model(cls, checkpoint)
    file = Path(inspect.getsourcefile(cls) or "")
    theirs = config_reads(file.read_text(encoding="utf-8"))
    alias = dict(getattr(type(original.config), "attribute_map", {}))
    ours = {alias.get(name, name) for name in _reads(port.source)} | ENGINE
    fields = set(original.config.to_dict()) | set(alias.values())
    ignored = [
        (name, read)
        for name, read in theirs.items()
        if alias.get(name, name) in fields and alias.get(name, name) not in ours
    ]
    trial = _Trial(original, cls)
    say(f"trying {len(ignored)} fields of the config that the port does not read")
    rows = []
    plain = _default(original.config)
    until = time.monotonic() + SECONDS
    for name, read in ignored:
        value = getattr(original.config, name, None)
        effect, other = trial.effect(name, value) if time.monotonic() < until else (None, None)
        rows.append(
            {
                "name": name,
                "value": _plain(value),
                "usual": isinstance(value, bool | str) and value == getattr(plain, name, None),
                "other": _plain(other),
                "line": read.line,
                "class": read.cls,
                "effect": effect,
            }
        )
    return {"fields": rows, "read": sorted(ours & fields), "file": file.name}


def _reads(source: str) -> set[str]:
    """Return the fields that a port reads, itself or in a model of vLLM that it builds on."""
    found = set(config_reads(source))
    for node in ast.walk(ast.parse(source)):
        module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
        if module.startswith(MODELS) and (spec := importlib.util.find_spec(module)):
            found |= set(config_reads(Path(spec.origin or "").read_text(encoding="utf-8")))
    return found


class _Trial:
    """Transformers' model with one field of its config changed."""

    def __init__(self, original: nn.Module, cls: type) -> None:
        self.original = original
        self.cls = cls
        self.ids = random_ids(int(original.config.vocab_size), TOKENS, seed=TOKENS)
        self.plain = logprobs(original, self.ids)
        self.small = sum(p.numel() for p in original.parameters()) <= SECOND_COPY

    def effect(self, name: str, value: Any) -> tuple[float | None, Any]:
        """Return (how far log-probabilities move, the value that was tried)."""
        largest: tuple[float | None, Any] = (None, None)
        for other in _others(value) if self.small else ():
            moved = self._with(name, other)
            if moved is not None and (largest[0] is None or moved > largest[0]):
                largest = (moved, other)
        return largest

    def _with(self, name: str, other: Any) -> float | None:
        config = copy.deepcopy(self.original.config)
        setattr(config, name, other)
        config._attn_implementation = ATTENTION
        weights = self.original.state_dict()
        try:
            model = self.cls(config).eval()
            own = model.state_dict()
        except Exception:  # a value that this model does not take
            return None
        if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in weights.items()}:
            return float("inf")
        try:
            model.load_state_dict(weights)
            rows = logprobs(model, self.ids)
            if _moved(rows, self.plain) and _moved(logprobs(model, self.ids[:PART]), rows[:PART]):
                return float("inf")  # an encoder: nothing that a decoder has to be
        except Exception:
            return None
        return _moved(rows, self.plain)


def _moved(one: np.ndarray, other: np.ndarray) -> float:
    """Return the largest |difference|, 0 for one that rounding makes; a NaN is infinitely far."""
    distance = float(np.nan_to_num(np.abs(one - other), nan=np.inf).max())
    return distance if distance > ROUNDING else 0.0


def _others(value: Any) -> tuple[Any, ...]:
    """Return values unlike the given one, of its kind."""
    if isinstance(value, bool):
        return (not value,)
    if isinstance(value, int):
        return (max(1, value // 2), value + 1)
    if isinstance(value, float):
        return (value * 1.5 + 0.25,)
    if isinstance(value, str) and value in ACT2FN:
        return tuple(a for a in ("relu", "silu") if a != value)[:1]
    return ()


def _default(config: Any) -> Any:
    """Return a config of the same class as its author meant it; None if it needs arguments."""
    try:
        return type(config)()
    except Exception:
        return None


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) or value is None else str(value)
