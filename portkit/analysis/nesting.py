"""Classes that only stand between others: a model around the decoder, a module around attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from portkit.analysis.classes import ClassView, ModuleView, call_name
from portkit.analysis.read_blocks import is_attention, linears_of

if TYPE_CHECKING:
    from portkit.analysis.read import Reader

Step = tuple[str, ClassView]
"""An attribute and the class that it holds."""


def path_to_layers(reader: Reader, lm: ClassView, depth: int = 3) -> list[Step]:
    """The way from the ForCausalLM class to the one with the list of layers; [] if there is none.

    [("model", OPTModel), ("decoder", OPTDecoder)] where a model only holds its decoder.
    """
    direct = reader.submodule(lm, lambda c: reader.layers_of(c) is not None)
    if direct is not None:
        return [] if len(stacks_of(reader.module, lm)) > 1 else [direct]
    for item in lm.assigned if depth > 1 else ():
        held = reader.submodule(
            ClassView(lm.node, (item,), lm.local), lambda c: not linears_of(c) and c is not lm
        )
        rest = path_to_layers(reader, held[1], depth - 1) if held is not None else []
        if held is not None and rest:
            return [held, *rest]
    return []


def stacks_of(module: ModuleView, view: ClassView) -> list[Step]:
    """Submodules that each hold a list of layers: one is a decoder, several run on each other."""
    made = [(i.attr, module.classes.get(call_name(i.value))) for i in view.assigned]
    return [
        (attr, cls)
        for attr, cls in made
        if cls is not None and any(call_name(a.value).endswith("ModuleList") for a in cls.assigned)
    ]


def path_to_attention(reader: Reader, layer: ClassView) -> list[Step]:
    """The way from a layer to its attention, through a module that only calls it; [] if none."""
    direct = reader.submodule(layer, is_attention)
    if direct is not None:
        return [direct]
    around = reader.submodule(
        layer, lambda c: not linears_of(c) and reader.submodule(c, is_attention) is not None
    )
    if around is None:
        return []
    inner = reader.submodule(around[1], is_attention)
    return [around, inner] if inner is not None else []
