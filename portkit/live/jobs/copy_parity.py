"""Job: does the copied class compute, bit by bit, what the original computes?

Both are loaded on the same checkpoint in one process, float32, eager attention, and given the same
tokens: logits with and without a cache, a padded batch, and `generate`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from portkit.live.checkpoint import open_checkpoint
from portkit.live.job import JobRequest
from portkit.live.portmodule import port_class
from portkit.live.prompts import prompts_for
from portkit.live.reference import load_model, original_class
from portkit.port import Port

LONGEST = 256
GENERATED = 12


def run(request: JobRequest, say: Callable[[str], None]) -> dict[str, Any]:
    """Return {"copy", "original", "rows": [what, shape, equal, max_abs, first position]}."""
    port = Port(Path(request.port_root))
    checkpoint = open_checkpoint(port.checkpoint)
    say("importing the port")
    copied_class = port_class(port)
    original = original_class(port)
    if copied_class.__module__ == original.__module__:
        raise AssertionError("the port's class is the original itself")
    if original.__module__.startswith("transformers."):
        # Of custom code Transformers leaves buffers of modules without weights as they are.
        copied_class.is_custom_code = staticmethod(original.is_custom_code)
    say("loading the checkpoint into both classes")
    models = [load_model(cls, checkpoint) for cls in (copied_class, original)]
    parameters = [{n: tuple(p.shape) for n, p in m.named_parameters()} for m in models]
    prompts = prompts_for(port, checkpoint, longest=LONGEST)
    rows: list[list[Any]] = [
        [
            "names and shapes of the parameters",
            [len(parameters[1])],
            parameters[0] == parameters[1],
            0.0,
            -1,
        ]
    ]
    say("comparing outputs")
    with torch.inference_mode():
        for ids in (*prompts.short, prompts.long):
            tokens = torch.tensor([ids])
            rows.append(
                _row(
                    f"logits of {len(ids)} tokens",
                    *(m(tokens, use_cache=False).logits for m in models),
                )
            )
        halves = [_in_two(m, prompts.long) for m in models]
        if halves[1] is not None:
            rows.append(_row("logits with a cache, in two parts", *halves))
        rows.append(_row("logits of a padded batch", *(_padded(m, prompts.ragged) for m in models)))
        first = torch.tensor([prompts.short[0]])
        rows.append(
            _row(
                f"generate, {GENERATED} tokens",
                *(
                    m.generate(
                        first,
                        attention_mask=torch.ones_like(first),
                        max_new_tokens=GENERATED,
                        min_new_tokens=GENERATED,
                        do_sample=False,
                        pad_token_id=0,
                    )
                    for m in models
                ),
            )
        )
    return {
        "copy": f"{copied_class.__module__}.{copied_class.__qualname__}",
        "original": f"{original.__module__}.{original.__qualname__}",
        "file": sys.modules[copied_class.__module__].__file__,
        "rows": rows,
    }


def _in_two(model: Any, ids: tuple[int, ...]) -> torch.Tensor | None:
    """Return the logits of the first half, and of the second from the first's cache, if it has
    one."""
    half = len(ids) // 2
    first = model(torch.tensor([ids[:half]]), use_cache=True)
    if getattr(first, "cache_params", None) is not None:  # a state takes one token at a time
        last = torch.tensor([ids[half : half + 1]])
        second = model(last, cache_params=first.cache_params, use_cache=True)
    elif getattr(first, "past_key_values", None) is None:
        return None
    else:
        rest = torch.tensor([ids[half:]])
        second = model(rest, past_key_values=first.past_key_values, use_cache=True)
    return torch.cat([first.logits, second.logits], dim=1)


def _padded(model: Any, prompts: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    """Return the logits of a left-padded batch, zero where the padding is."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return model(tokens, attention_mask=mask, use_cache=False).logits * mask[..., None]


def _row(what: str, copied: torch.Tensor, original: torch.Tensor) -> list[Any]:
    if copied.shape != original.shape:
        return [what, list(original.shape), False, float("inf"), 0]
    # NaN equals NaN here: a bit-equal copy has it in the same places.
    equal = torch.equal(copied.nan_to_num(), original.nan_to_num()) and torch.equal(
        copied.isnan(), original.isnan()
    )
    distance = (copied.float() - original.float()).abs().nan_to_num()
    flat = (
        distance.reshape(*distance.shape[:2], -1).amax(dim=(0, 2))
        if distance.dim() > 1
        else distance
    )
    position = int((flat > 0).nonzero()[0]) if bool((flat > 0).any()) else -1
    return [what, list(original.shape), equal, float(distance.max()), position]
