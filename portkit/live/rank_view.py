"""What one tensor-parallel rank says to the others. Runs inside the ranks.

Every function here takes the rank's model: `Engine.on_model` calls it on each rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from vllm.distributed.parallel_state import GroupCoordinator

COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gatherv",
    "reduce_scatter",
    "reduce_scatterv",
    "gather",
    "broadcast",
)

_counting: dict[str, Any] = {}
"""While this rank counts: the calls, the module stack, the hooks and the original methods."""


def start_counting(model: nn.Module) -> None:
    """Count this rank's collectives from now on, by the module that makes them."""
    stack: list[str] = []
    calls: dict[str, dict[str, int]] = {}
    hooks = []
    for path, module in model.named_modules():

        def enter(module: nn.Module, args: Any, path: str = path) -> None:
            stack.append(path)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            stack.pop()

        hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    originals = {
        n: getattr(GroupCoordinator, n) for n in COLLECTIVES if hasattr(GroupCoordinator, n)
    }
    for name, original in originals.items():
        setattr(GroupCoordinator, name, _counted(name, original, stack, calls))
    _counting.update(calls=calls, hooks=hooks, originals=originals)


def stop_counting(model: nn.Module) -> dict[str, dict[str, int]]:
    """Stop; return module path -> collective -> calls since `start_counting`."""
    for hook in _counting["hooks"]:
        hook.remove()
    for name, original in _counting["originals"].items():
        setattr(GroupCoordinator, name, original)
    calls = _counting["calls"]
    _counting.clear()
    return calls


def _counted(
    name: str, original: Callable[..., Any], stack: list[str], calls: dict[str, dict[str, int]]
) -> Callable[..., Any]:
    def counted(self: GroupCoordinator, *args: Any, **kwargs: Any) -> Any:
        # The engine's own groups (world, pipeline, data parallel) are none of the model's business.
        if self.unique_name.startswith("tp:") and stack:
            own = calls.setdefault(stack[-1], {})
            own[name] = own.get(name, 0) + 1
        return original(self, *args, **kwargs)

    return counted
