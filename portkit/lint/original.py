"""Facts about the code as it was copied: what the port must not lose on its way.

Read from text alone. Where the text does not settle a question the answer is None or empty, and
the rules that need it stay silent.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

import libcst as cst

from portkit.errors import PortkitError
from portkit.lint.finding import RotaryLayout
from portkit.lint.source import Source


@dataclass(frozen=True)
class OriginalFacts:
    """What the copied code says about rotation, linears and tying."""

    rotary_layout: RotaryLayout | None = None
    linears: frozenset[str] = frozenset()
    ties: bool | None = None


@lru_cache(maxsize=32)
def original_facts(text: str) -> OriginalFacts:
    """Read the facts from a Transformers modeling file; empty facts if it does not parse."""
    try:
        source = Source(text)
    except PortkitError:
        return OriginalFacts()
    linears = frozenset(
        layer.attribute
        for _, layer in source.layers
        if layer.name in ("Linear", "Conv1D") or layer.name.endswith("Linear")
    )
    return OriginalFacts(rotary_layout(source), linears, ties(source))


def rotary_layout(source: Source) -> RotaryLayout | None:
    """ "interleaved" if pairs are neighbours (x[0::2], x[1::2]), "half" if they are d/2 apart.

    Looks at what the rotating functions do, never at the model's name: get_rope's default
    (is_neox_style=True) is the "half" layout.
    """
    found: set[RotaryLayout] = set()
    functions = list(source.functions.values())
    functions += [f for facts in source.classes.values() for f in facts.methods.values()]
    for function in functions:
        name = function.name.value
        body = source.code(function)
        if re.search(r"view_as_complex|polar\(", body) and "rot" in name:
            found.add("interleaved")
        if not re.search(r"rotate|rotary", name):
            continue
        if re.search(r"\[\s*(\.\.\.|:[^\]]*)\s*,\s*(0?::2|1::2)\s*\]", body):
            found.add("interleaved")
        elif re.search(
            r"shape\[-1\]\s*//\s*2|\.chunk\(2,\s*dim=-1\)|size\(-1\)\s*//\s*2", body
        ) and (re.search(r"torch\.cat|torch\.concat", body) and "rotate" in name):
            found.add("half")
    return found.pop() if len(found) == 1 else None


def ties(source: Source) -> bool | None:
    """Whether the causal LM says its head may be the embedding's weight."""
    if source.top is None:
        return None
    keys = source.top.values.get("_tied_weights_keys")
    return isinstance(keys, (cst.List, cst.Dict, cst.Tuple)) and bool(keys.elements)
