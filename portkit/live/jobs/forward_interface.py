"""Job: does the port's class have the interface that vLLM asks of a text-generation model?"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm.model_executor.models.interfaces_base import is_text_generation_model, is_vllm_model
from vllm.utils.func_utils import supports_kw

from portkit.live.job import JobRequest
from portkit.live.portmodule import port_class
from portkit.port import Port

WANTED: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (
        "__init__",
        ("vllm_config", "prefix"),
        "vLLM builds every model as cls(vllm_config=..., prefix=...)",
    ),
    (
        "embed_input_ids",
        ("input_ids",),
        "the runner embeds token ids itself when some inputs are embeddings",
    ),
    (
        "forward",
        ("input_ids", "positions", "intermediate_tensors", "inputs_embeds"),
        "the runner passes these by name, flat: one row a token of the whole batch",
    ),
    (
        "compute_logits",
        ("hidden_states",),
        "the runner asks for logits of the rows that it samples from",
    ),
)
LEFT_OVER = (
    "attention_mask",
    "past_key_values",
    "use_cache",
    "labels",
    "position_ids",
    "cache_position",
)
"""Arguments of the original's forward that have no meaning in vLLM."""


def run(request: JobRequest, say: Callable[[str], None]) -> dict[str, Any]:
    """Return {"class", "accepted", "rows": [method, argument, state, why, line]}, and more."""
    say("importing the port")
    cls = port_class(Port(Path(request.port_root)))
    rows = []
    for name, arguments, why in WANTED:
        method = getattr(cls, name, None)
        line = line_of(method)
        if name == "__init__" and "__init__" not in _own(cls):
            method = None
        if not callable(method):
            rows.append([name, "", "missing", why, line_of(cls)])
            continue
        for argument in arguments:
            # Without SupportsPP they are always None: `**kwargs` may swallow them.
            swallowed = argument == "intermediate_tensors"
            there = supports_kw(method, argument, allow_var_kwargs=swallowed)
            state = "there" if there else "missing"
            rows.append([name, argument, state, why, line])
    forward = getattr(cls, "forward", None)
    parameters = inspect.signature(forward).parameters if callable(forward) else {}
    for argument in LEFT_OVER:
        if argument in parameters:
            rows.append(
                ["forward", argument, "left over", "vLLM never passes it", line_of(forward)]
            )
    for name, parameter in parameters.items():
        known = (*WANTED[2][1], "self", *LEFT_OVER)
        if (
            name not in known
            and parameter.default is parameter.empty
            and parameter.kind
            not in (
                parameter.VAR_POSITIONAL,
                parameter.VAR_KEYWORD,
            )
        ):
            rows.append(
                [
                    "forward",
                    name,
                    "unknown",
                    "vLLM does not pass it, and it has no default",
                    line_of(forward),
                ]
            )
    return {
        "class": f"{cls.__module__}.{cls.__qualname__}",
        "is_vllm_model": bool(is_vllm_model(cls)),
        "is_text_generation_model": bool(is_text_generation_model(cls)),
        "bases": [f"{b.__module__}.{b.__qualname__}" for b in cls.__mro__[1:-1]],
        "rows": rows,
    }


def line_of(thing: Any) -> int:
    """Return the line where a class or function of the port is defined, or 0."""
    try:
        return inspect.getsourcelines(inspect.unwrap(thing))[1]
    except (OSError, TypeError):
        return 0


def _own(cls: type) -> set[str]:
    """Return the names that the class, a base of the same file or one of vLLM's defines."""
    return {
        name
        for base in cls.__mro__
        if base.__module__ == cls.__module__ or base.__module__.startswith("vllm.")
        for name in vars(base)
    }
