"""Finds the mixture-of-experts blocks of a decoder layer."""

from __future__ import annotations

from portkit.analysis.classes import ClassView, ModuleView, call_name
from portkit.analysis.experts import is_experts, read_experts
from portkit.analysis.moe_facts import MoeFacts
from portkit.analysis.read_blocks import linears_of
from portkit.analysis.routers import is_router, read_router


def submodules(module: ModuleView, view: ClassView) -> dict[str, ClassView]:
    """Attribute → class of the submodules that `__init__` makes by one call."""
    found = {}
    for item in view.assigned:
        made = module.classes.get(call_name(item.value))
        if made is not None:
            found[item.attr] = made
    return found


def is_moe(module: ModuleView, view: ClassView) -> bool:
    """Holds experts."""
    return view.forward is not None and any(
        is_experts(c) for c in submodules(module, view).values()
    )


def read_moe(module: ModuleView, view: ClassView) -> MoeFacts | None:
    """Facts of the block; None if it holds no router or no experts that portkit understands."""
    made = submodules(module, view)
    experts = next(((a, c) for a, c in made.items() if is_experts(c)), None)
    router = next(((a, c) for a, c in made.items() if is_router(c)), None)
    if experts is None or router is None:
        return None
    shared = [
        c.name
        for c in made.values()
        if c is not experts[1] and c is not router[1] and linears_of(c) and c.forward is not None
    ]
    return MoeFacts(
        view.name,
        view.line,
        router[0],
        read_router(router[1]),
        experts[0],
        read_experts(experts[1]),
        tuple(dict.fromkeys(shared)),
    )
