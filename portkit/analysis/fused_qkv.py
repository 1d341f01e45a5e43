"""Where a fused projection keeps queries, keys and values, found by cutting numbers as it does.

A checkpoint may store one linear for all three as [q | k | v], as (q, k, v) for each head, for each
group of heads that shares a KV head, or for each of some blocks, in any order. The author's view,
split, index and permute statements say which: `fused_qkv_of` runs them on a numbered projection of
a model of known sizes and looks where the numbers ended. Every choice that a config flag makes is
tried; a layout that one description cannot say is refused with the line.

What it does not know: cuts that depend on the data, and linears that are sliced by weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby, product
from typing import TYPE_CHECKING

from portkit.analysis.classes import ClassView
from portkit.analysis.fused_cut import Cutting
from portkit.analysis.number_run import HEAD_DIM, HEADS, KV_HEADS, Sizes
from portkit.analysis.symbolic import CannotTell

if TYPE_CHECKING:
    from portkit.analysis.facts import Linear

MAX_FLAGS = 4


@dataclass(frozen=True)
class FusedQkv:
    """Rows of the projection: [groups, parts in `order`, heads of the part per group, head_dim]."""

    attr: str
    groups: str
    """ "1": all queries, then all keys, ...; "heads", "kv_heads": for each of them; else a number
    as source."""
    order: str
    """The parts in memory: "qkv", or e.g. "qvk"."""
    num_heads: str
    """Total numbers as written in the class, e.g. "self.num_heads" or "config.n_head"."""
    num_kv_heads: str
    head_dim: str
    names: tuple[str, str, str]
    """Names that hold query, key and value in `forward` when the cut is done."""
    layouts: tuple[str, str, str]
    """Their shapes then: "flat", "seq_heads" or "heads_seq", as in draft/attention_values.py."""
    first: int
    """Number of the statement of `forward` that calls the projection; `last`: that ends the cut."""
    last: int
    dropped: tuple[int, ...]
    """Numbers of the statements of `forward` that only cut."""

    @property
    def is_plain(self) -> bool:
        """Is it what vLLM's QKVParallelLinear loads as it is?"""
        return self.groups == "1" and self.order == "qkv"


@dataclass(frozen=True)
class _Found:
    """One run: what the numbers say."""

    heads: int
    kv_heads: int
    groups: int
    order: str
    layouts: tuple[str, str, str]
    span: tuple[int, int, tuple[int, ...]]
    known: dict[str, int]
    """Values of self.x and config.x, by source."""


def fused_qkv_of(view: ClassView, linear: Linear, roles: tuple[str, str, str]) -> FusedQkv:
    """Layout of `linear`; `roles` are the names that attention calls query, key and value.

    Raises CannotTell where the statements cannot be followed or no one layout describes them.
    """
    settings = _all_runs(view, linear, roles)
    try:
        # Fewer KV heads than heads tell the two apart, where the code allows it.
        return _described(view, linear, roles, [runs[:1] for runs in settings])
    except CannotTell:
        return _described(view, linear, roles, settings)


def _described(view, linear, roles, settings: list[list[_Found]]) -> FusedQkv:
    heads = _name_of(view, settings, lambda run: run.heads, "head")
    settings = [[r for r in runs if r.known[heads] == r.heads] for runs in settings]
    if all(run.heads == run.kv_heads for runs in settings for run in runs):
        kv_heads = heads
    else:
        kv_heads = _name_of(view, settings, lambda run: run.kv_heads, "head")
    settings = [[r for r in runs if r.known[kv_heads] == r.kv_heads] for runs in settings]
    if not all(settings):
        raise CannotTell(f"{view.name} names no expression for its KV heads", view.node)
    runs = [runs[0] for runs in settings]
    first = runs[0]
    for field in ("order", "layouts", "span"):
        if any(getattr(run, field) != getattr(first, field) for run in runs):
            raise CannotTell(f"{view.name} cuts self.{linear.attr} in ways that differ", view.node)
    head_dim = _name_of(view, settings, lambda run: HEAD_DIM, "")
    if all(run.groups == 1 for run in runs):
        groups = "1"
    elif all(run.groups == run.heads for run in runs):
        groups = "heads"
    elif all(run.groups == run.kv_heads for run in runs):
        groups = "kv_heads"
    elif len({run.groups for run in runs}) == 1:
        groups = str(first.groups)
    else:
        raise CannotTell(f"{view.name} cuts self.{linear.attr} in ways that differ", view.node)
    start, end, dropped = first.span
    return FusedQkv(
        linear.attr,
        groups,
        first.order,
        heads,
        kv_heads,
        head_dim,
        roles,
        first.layouts,
        start,
        end,
        dropped,
    )


def _all_runs(view: ClassView, linear: Linear, roles: tuple[str, str, str]) -> list[list[_Found]]:
    """For every setting of the flags that the cut depends on, what it may mean."""
    flags: list[str] = []
    while True:
        settings: list[list[_Found]] = []
        asked: set[str] = set()
        for setting in product((True, False), repeat=len(flags)):
            chosen = dict(zip(flags, setting, strict=True))
            runs, wants = _runs(view, linear, roles, chosen)
            asked |= wants - set(flags)
            settings.append(runs)
        if not asked:
            return settings
        flags += sorted(asked)
        if len(flags) > MAX_FLAGS:
            raise CannotTell(f"{view.name} cuts self.{linear.attr} by many options", view.node)


def _runs(view, linear, roles, chosen) -> tuple[list[_Found], set[str]]:
    """Run with fewer KV heads than heads, and with as many: some code allows only one of these."""
    problem: CannotTell | None = None
    runs: list[_Found] = []
    asked: set[str] = set()
    for kv_heads in (KV_HEADS, HEADS):
        try:
            cutting = Cutting(view, linear, Sizes(kv_heads), chosen)
            runs.append(_one_run(cutting, roles))
            asked |= cutting.asked
        except CannotTell as unknown:
            problem = problem or unknown
    if not runs:
        assert problem is not None
        raise problem
    return runs, asked


def _one_run(cutting: Cutting, roles: tuple[str, str, str]) -> _Found:
    arrays, span = cutting.run_forward(roles)
    where = f"{cutting.view.name} cuts self.{cutting.linear.attr}"
    layouts, offsets = [], []
    for name, array in zip(roles, arrays, strict=True):
        read = cutting.heads_of(array)
        if read is None:
            raise CannotTell(f"{where} into a {name} of unknown shape", cutting.view.node)
        layouts.append(read[0])
        # A KV head that is repeated for its queries counts once.
        offsets.append([k for k, _ in groupby(read[1])])
    slots = sorted((o, letter) for letter, part in zip("qkv", offsets, strict=True) for o in part)
    if [o for o, _ in slots] != [i * HEAD_DIM for i in range(cutting.width // HEAD_DIM)]:
        raise CannotTell(f"{where} into parts that leave some of it out", cutting.view.node)
    if any(part != sorted(part) for part in offsets) or len(offsets[1]) != len(offsets[2]):
        raise CannotTell(f"{where} and reorders the heads", cutting.view.node)
    groups, order = _pattern("".join(letter for _, letter in slots))
    if not groups:
        raise CannotTell(f"{where} in no regular pattern", cutting.view.node)
    return _Found(
        len(offsets[0]),
        len(offsets[1]),
        groups,
        order,
        (layouts[0], layouts[1], layouts[2]),
        span,
        cutting.known(),
    )


def _pattern(letters: str) -> tuple[int, str]:
    """("qkvqkv") -> (2, "qkv"): the most repetitions of one block with a run for each part."""
    for groups in range(len(letters), 0, -1):
        size, rest = divmod(len(letters), groups)
        block = letters[:size]
        runs = "".join(letter for letter, _ in groupby(block))
        if not rest and block * groups == letters and sorted(runs) == ["k", "q", "v"]:
            return groups, runs
    return 0, ""


def _name_of(
    view: ClassView, settings: list[list[_Found]], wanted: Callable[[_Found], int], word: str
) -> str:
    """Source of an expression with the wanted value in every setting: self.x, or else config.x."""
    names = list(settings[0][0].known)
    for name in sorted(names, key=lambda n: not n.startswith("self.")):
        if word in name and all(
            any(run.known.get(name) == wanted(run) for run in runs) for runs in settings
        ):
            return name
    raise CannotTell(f"{view.name} names no expression for its number of heads", view.node)
