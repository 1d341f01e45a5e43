"""Find the first module whose output differs: both models run on the same tokens, side by side.

vLLM's side is traced inside its runner, in the very situation that failed (chunks, decode, a
batch); the rows of one request are put back into token order. Transformers' side is one plain
forward. Modules are paired by path: the names of the original, through packed_modules_mapping for
fused layers. Everything is cloned when it is seen, because vLLM's fused add-norm overwrites its
inputs in place. One process, one rank.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

from portkit.live.engine import Engine, Prompt

Key = tuple[str, str]
"""Module path and role: "in" and "out" of a module; "q", "k", "v", "attn" of an attention block
(after rotary embedding, before and after the attention itself)."""
TRACED = "portkit_traced"


@dataclass
class Captures:
    """What one side computed, in the order it was computed."""

    values: dict[Key, torch.Tensor] = field(default_factory=dict)
    """float32 [tokens, width] on the CPU."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Positions, scales and the like, for the diagnosis."""


# ---- Transformers' side ------------------------------------------------------------------------


def trace_original(
    model: nn.Module, ids: Sequence[int], handed_on: Mapping[str, torch.Tensor] | None = None
) -> Captures:
    """Run the Transformers model once on `ids` and capture every module's output.

    `handed_on`: module path -> [tokens, width], which that module hands on in place of what it
    computed (and what is captured of it).
    """
    captures = Captures()
    paths = {id(module): path for path, module in model.named_modules()}
    with (
        _hooked(model, captures, len(ids)),
        _replaced(model, handed_on or {}),
        _traced_attention(model, captures, paths),
        torch.inference_mode(),
    ):
        tokens = torch.tensor([list(ids)], device=next(model.parameters()).device)
        captures.extra["logits"] = model(input_ids=tokens, use_cache=False).logits[0].float().cpu()
    return captures


@contextmanager
def _hooked(model: nn.Module, captures: Captures, tokens: int) -> Iterator[None]:
    handles = []
    for path, module in model.named_modules():
        if not path:
            continue

        def after(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
            _keep(captures, (path, "out"), output, tokens)

        def before(module: nn.Module, args: Any, kwargs: dict[str, Any], path: str = path) -> None:
            _keep(captures, (path, "in"), _input(args, kwargs), tokens)

        handles.append(module.register_forward_hook(after))
        if _has_input(module):
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _replaced(model: nn.Module, handed_on: Mapping[str, torch.Tensor]) -> Iterator[None]:
    def replace(module: nn.Module, args: Any, output: Any, rows: torch.Tensor) -> Any:
        several = isinstance(output, tuple | list)
        own = output[0] if several else output
        other = rows.to(own.device, own.dtype).reshape(own.shape)
        return type(output)((other, *output[1:])) if several else other

    handles = [
        model.get_submodule(path).register_forward_hook(partial(replace, rows=rows))
        for path, rows in handed_on.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _traced_attention(
    model: nn.Module, captures: Captures, paths: dict[int, str]
) -> Iterator[None]:
    """Have the model call an attention function that keeps q, k, v and the result.

    It hands on to the model file's own eager attention. Models without Transformers' attention
    interface ignore the setting; they are traced by their modules alone.
    """

    def traced(
        module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any
    ) -> Any:
        path = paths.get(id(module), "")
        for role, tensor in (("q", query), ("k", key), ("v", value)):
            captures.values[path, role] = _rows(tensor.transpose(1, 2), batched=True)
        captures.extra[f"{path} attention"] = {
            name: option
            for name, option in options.items()
            if isinstance(option, int | float) or option is None
        } | {"heads": query.shape[1], "kv_heads": key.shape[1]}
        eager = sys.modules[type(module).__module__].eager_attention_forward
        output = eager(module, query, key, value, attention_mask, **options)
        captures.values[path, "attn"] = _rows(output[0], batched=True)
        return output

    file = sys.modules[type(model).__module__]
    if not hasattr(file, "eager_attention_forward"):
        yield
        return
    ALL_ATTENTION_FUNCTIONS.register(TRACED, traced)
    ALL_MASK_ATTENTION_FUNCTIONS.register(TRACED, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation_internal = TRACED
    try:
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name


# ---- vLLM's side -------------------------------------------------------------------------------


def trace_port(
    engine: Engine, prompts: Sequence[Prompt], which: int, max_tokens: int
) -> tuple[Captures, tuple[int, ...]]:
    """Run prompts together in the engine and capture the rows of prompt `which`.

    Returns the captures in token order, and that request's generated tokens. Their rows are the
    prompt and all generated tokens but the last, which was never an input.
    """
    captures = Captures()
    parts: dict[Key, list[torch.Tensor]] = {}
    places = _Places(engine, which)
    handles: list[Any] = [BeforeForward(engine.model, places.enter)]
    for path, module in _every_path(engine.model):
        handles += _hook_port_module(path, module, parts, places)
    try:
        generated = engine.generate(prompts, max_tokens)
    finally:
        for handle in handles:
            handle.remove()
    captures.values = {key: torch.cat(chunks) for key, chunks in parts.items() if chunks}
    captures.extra["positions"] = torch.cat(places.positions).tolist() if places.positions else []
    captures.extra["called again"] = sorted(places.again)
    captures.extra["rotary misread"] = places.misread
    captures.extra["rotary positions"] = {
        path: torch.cat(chunks).tolist() for path, chunks in places.rotary.items()
    }
    return captures, generated[which].tokens


class BeforeForward:
    """Have `watch` called before each forward of a module, until `remove`.

    No hook: a class under @support_torch_compile has a `__call__` of its own, which runs none.
    """

    def __init__(
        self, module: nn.Module, watch: Callable[[nn.Module, Any, dict[str, Any]], None]
    ) -> None:
        self.module, forward = module, module.forward

        def watched(*args: Any, **kwargs: Any) -> Any:
            watch(module, args, kwargs)
            return forward(*args, **kwargs)

        module.forward = watched

    def remove(self) -> None:
        del self.module.forward


class _Places:
    """Which rows of the runner's flat batch belong to the request that is traced."""

    def __init__(self, engine: Engine, which: int) -> None:
        self.engine = engine
        self.which = which
        self.begin = len(engine.schedule)
        self.rows: slice | None = None
        self.total = 0
        self.seen: set[Key] = set()
        """What this forward computed so far: of a module that layers share, the first call counts,
        as on Transformers' side."""
        self.again: set[str] = set()
        """Paths of modules that one forward called more than once."""
        self.positions: list[torch.Tensor] = []
        self.rotary: dict[str, list[torch.Tensor]] = {}
        self.misread = False
        """Whether a rotary embedding was given queries that vLLM's kernel for CPUs misreads."""

    def enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen = list(
            dict.fromkeys(name for step in self.engine.schedule[self.begin :] for name in step)
        )
        scheduled = self.engine.schedule[-1] if self.engine.schedule else {}
        self.seen.clear()
        self.rows = None
        start = 0
        for name in self.engine.runner.input_batch.req_ids:
            count = scheduled.get(name, 0)
            if count and self.which < len(seen) and name == seen[self.which]:
                self.rows = slice(start, start + count)
            start += count
        self.total = start
        positions = kwargs.get("positions", args[1] if len(args) > 1 else None)
        if self.rows is not None and isinstance(positions, torch.Tensor) and positions.dim() == 1:
            self.positions.append(positions[self.rows].clone().cpu())

    def first(self, key: Key) -> bool:
        """Whether this forward had not computed `key` yet."""
        known = key in self.seen
        self.seen.add(key)
        if known and key[1] == "out":
            self.again.add(key[0])
        return not known

    def take(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return this request's rows of a flat tensor, [tokens, width]; None if it is not flat."""
        if self.rows is None or tensor.dim() < 1 or tensor.shape[0] < self.total:
            return None
        return _rows(tensor[self.rows], batched=False)


def _every_path(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return each module once, with its first path."""
    return [(path, module) for path, module in model.named_modules() if path]


def _hook_port_module(
    path: str, module: nn.Module, parts: dict[Key, list[torch.Tensor]], places: _Places
) -> list[Any]:
    def keep(key: Key, tensor: Any) -> None:
        if isinstance(tensor, torch.Tensor):
            rows = places.take(tensor)
            if rows is not None and places.first(key):
                parts.setdefault(key, []).append(rows)

    if isinstance(module, Attention):
        block = path.rpartition(".")[0]

        def attend(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            given = [*args, *(kwargs[n] for n in ("query", "key", "value") if n in kwargs)]
            for role, tensor in zip("qkv", given, strict=False):
                keep((block, role), tensor)
            keep((block, "attn"), output)

        return [module.register_forward_hook(attend, with_kwargs=True)]
    if isinstance(module, RotaryEmbeddingBase):

        def rotate(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            positions = kwargs.get("positions", args[0] if args else None)
            query = kwargs.get("query", args[1] if len(args) > 1 else None)
            if isinstance(query, torch.Tensor) and query.is_cpu and query.dim() == 3:
                places.misread |= query.shape[1] > 1
            rows = places.take(positions) if isinstance(positions, torch.Tensor) else None
            if rows is not None and places.first((path, "positions")):
                places.rotary.setdefault(path, []).append(rows[:, 0].to(torch.int64))

        return [module.register_forward_pre_hook(rotate, with_kwargs=True)]

    def after(module: nn.Module, args: Any, output: Any) -> None:
        keep((path, "out"), main_tensor(module, output))

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        keep((path, "in"), _input(args, kwargs))

    handles = [module.register_forward_hook(after)]
    if _has_input(module):
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
    return handles


def main_tensor(module: nn.Module, output: Any) -> Any:
    """Return what a module computed: vLLM's linears add a bias to return, norms the residual."""
    if not isinstance(output, tuple):
        return output
    tensors = [o for o in output if isinstance(o, torch.Tensor)]
    if not tensors:
        return None
    has_children = any(True for _ in module.children())
    if has_children and len(tensors) == 2 and tensors[0].shape == tensors[1].shape:
        # A decoder layer that hands hidden states and residual on separately; HF adds them.
        return tensors[0].float() + tensors[1].float()
    return tensors[0]


def _keep(captures: Captures, key: Key, output: Any, tokens: int) -> None:
    if isinstance(output, tuple | list):
        output = next((o for o in output if isinstance(o, torch.Tensor)), None)
    if isinstance(output, torch.Tensor) and output.dim() >= 3 and key not in captures.values:
        if output.dim() == 4 and output.shape[2] == tokens:
            if output.shape[1] == tokens:
                return  # as many heads as tokens: either may come first
            output = output.transpose(1, 2)  # heads before tokens: a norm of heads
        captures.values[key] = _rows(output, batched=True)


def _rows(tensor: torch.Tensor, *, batched: bool) -> torch.Tensor:
    """Return a clone as float32 [tokens, width] on the CPU."""
    tensor = tensor.detach()[0] if batched else tensor.detach()
    if batched and tensor.dim() == 3 and tensor.shape[0] == 1 < tensor.shape[1]:
        tensor = tensor[0]  # a latent, viewed as one head in front of the sequence
    return tensor.reshape(tensor.shape[0], -1).to("cpu", torch.float32, copy=True)


def _has_input(module: nn.Module) -> bool:
    """Whether the module is a linear or a norm, whose input is worth comparing too."""
    weight = getattr(module, "weight", None)
    norm = isinstance(weight, torch.Tensor) and weight.dim() == 1
    return norm or isinstance(module, nn.Linear | LinearBase) or type(module).__name__ == "Conv1D"


def _input(args: Any, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Return what a module works on: for a fused add-norm that is its input plus the residual."""
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
    if (
        len(tensors) == 2
        and tensors[0] is not tensors[1]  # a residual that the norm only hands on
        and tensors[0].shape == tensors[1].shape
        and tensors[0].is_floating_point()
    ):
        return tensors[0].float() + tensors[1].float()
    return tensors[0] if tensors else None
