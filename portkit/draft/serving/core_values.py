"""What names stand for while a hand-written attention is read (attention_core.py).

Axes are letters: b(atch), s(equence), h(eads), d(imension of a head), w(idth of a projection),
t(he three of query, key and value in a fused projection);
`("bh", "s", "d")` is a tensor whose first axis is batch * heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import libcst as cst

from portkit.draft import edit

Axes = tuple[str, ...]
HEADS: Axes = ("b", "h", "s", "d")


@dataclass(frozen=True)
class Value:
    """A value of the original forward."""

    kind: str
    """"tensor" (axes known), "scores", "probs", "context", "shape", "size", "mask", "bias" (ALiBi),
    "plain" (numbers, settings), "other"."""
    axes: Axes = ()
    canonical: str = ""
    """For a tensor by heads: expression of the same tensor as [b, h, s, d]."""
    items: tuple[str, ...] = ()
    """For a shape: letters of each axis, "-1" or the source of the number."""
    text: str = ""
    """For a size: its source; for a context: the name that holds it."""
    parts: tuple[Value, ...] = ()
    factor: str = ""
    """For scores: what they are multiplied by; "" if nothing."""
    bias: str = ""
    """For scores: factor on the ALiBi bias that was added ("1" if plain); "" if none was."""


OTHER = Value("other")
PLAIN = Value("plain")
ZEROS = Value("plain", text="0")
MASK = Value("mask")


def viewed(axes: Axes, items: tuple[str, ...], names: dict[str, str]) -> Axes | None:
    """Axes after view(items), for a tensor whose letters only regroup; None if that is not so.

    An item is letters, "-1" or source text; `names` has the letter of text whose meaning is known.
    One item at most may be unknown: it takes the letters that are left.
    """
    letters = "".join(axes)
    known = [i if _lettered(i) else _named(i, names) for i in items]
    if known.count("") > 1:
        return None
    if "" not in known:
        return tuple(known) if "".join(known) == letters else None
    at = known.index("")
    left, right = "".join(known[:at]), "".join(known[at + 1 :])
    if not (letters.startswith(left) and letters.endswith(right)):
        return None
    if len(left) + len(right) >= len(letters):
        return None
    known[at] = letters[len(left) : len(letters) - len(right)]
    return tuple(known)


def _lettered(item: str) -> bool:
    return bool(item) and set(item) <= set("bshdw")


def _named(item: str, names: dict[str, str]) -> str:
    """ "bh" for `b * self.num_heads`; "" if a part of the item is unknown."""
    letters = [i if _lettered(i) else names.get(i, "") for i in item.split(" * ")]
    return "".join(letters) if all(letters) else ""


def dimension(node: cst.BaseExpression | None) -> int | None:
    """A literal dimension such as -1."""
    try:
        return int(edit.code(node))
    except ValueError:
        return None
