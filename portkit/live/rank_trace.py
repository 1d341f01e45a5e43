"""What one tensor-parallel rank computes, module by module. Runs inside the ranks.

Every function here takes the rank's model: `Engine.on_model` calls it on each rank. For one prompt
that is computed in one step: then the batch's rows are the prompt's tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.attention import Attention

from portkit.live.locate import method_place, place_of
from portkit.live.trace import main_tensor

_tracing: dict[str, Any] = {}
"""While this rank traces: the hooks and what they kept."""


def start_tracing(model: nn.Module) -> None:
    """Keep from now on what each module returns first, and what each attention is given."""
    kept: dict[tuple[str, str], torch.Tensor] = {}
    hooks = []
    for path, module in model.named_modules():
        if path:
            hooks.append(module.register_forward_hook(_keeper(path, kept), with_kwargs=True))
    _tracing.update(hooks=hooks, kept=kept)


def stop_tracing(model: nn.Module) -> dict[str, Any]:
    """Stop; return {"rank", "values": [(path, role, float32 [tokens, width])]} in their order."""
    for hook in _tracing["hooks"]:
        hook.remove()
    values = [(path, role, t.numpy()) for (path, role), t in _tracing["kept"].items()]
    _tracing.clear()
    return {"rank": get_tp_group().rank_in_group, "values": values}


SMALL = 1 << 14
"""Values of a parameter that is sent from a rank to be looked at."""


def places(model: nn.Module, path: str) -> str:
    """Return the line that makes the module at `path`; of one with others inside, its answer's."""
    module = dict(model.named_modules()).get(path)
    own = module is not None and not type(module).__module__.startswith("vllm.")
    if own and any(True for _ in module.children()):
        return str(method_place(type(module), "forward") or "")
    return str(place_of(model, path) or "")


def own_parameters(model: nn.Module, path: str) -> dict[str, Any]:
    """Return the small parameters of the module at `path` and of what it holds, by name below it:
    sinks, slopes, biases. float32 arrays."""
    module = dict(model.named_modules()).get(path)
    return {
        name: parameter.detach().to("cpu", torch.float32, copy=True).numpy()
        for name, parameter in (module.named_parameters() if module is not None else ())
        if parameter.numel() <= SMALL
    }


def _keeper(path: str, kept: dict[tuple[str, str], torch.Tensor]) -> Any:
    def keep(key: tuple[str, str], tensor: Any) -> None:
        if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.is_floating_point():
            rows = tensor.detach().reshape(tensor.shape[0], -1)
            kept.setdefault(key, rows.to("cpu", torch.float32, copy=True))

    def after(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not isinstance(module, Attention):
            keep((path, "out"), main_tensor(module, output))
            return
        block = path.rpartition(".")[0]
        given = [*args, *(kwargs[n] for n in ("query", "key", "value") if n in kwargs)]
        for role, tensor in zip("qkv", given, strict=False):
            keep((block, role), tensor)
        keep((block, "attn"), output)

    return after
