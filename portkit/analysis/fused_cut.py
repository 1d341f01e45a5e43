"""Runs an attention's `__init__` and `forward` on numbers, up to where q, k and v are cut apart.

See fused_qkv.py, which reads what comes of it. What is not known stays unknown, and matters only
if the cut needs it.
"""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Any

from portkit.analysis.classes import ClassView, call_name
from portkit.analysis.index_array import IndexArray
from portkit.analysis.number_run import (
    BATCH,
    HEAD_DIM,
    HEADS,
    LENGTH,
    UNKNOWN,
    NumberRun,
    Shaped,
    Sizes,
    is_array,
)
from portkit.analysis.symbolic import CannotTell

if TYPE_CHECKING:
    from portkit.analysis.facts import Linear


class Cutting(NumberRun):
    """One run of one class with one setting of its flags."""

    def __init__(
        self, view: ClassView, linear: Linear, sizes: Sizes, flags: dict[str, bool]
    ) -> None:
        self.view, self.linear, self.sizes, self.flags = view, linear, sizes, flags
        self.asked, self.own, self.config = set(), {}, {}
        init = view.init
        values: dict[str, Any] = {}
        if init is not None:
            values = _defaults(init)
            self.steps(init.body, values)
        width = self.value(ast.parse(linear.out_features, mode="eval").body, values)
        self.width = width if isinstance(width, int) else 0
        if not self.width or self.width % HEAD_DIM:
            raise CannotTell(f"cannot tell how wide self.{linear.attr} is", view.node)

    def known(self) -> dict[str, int]:
        """Numbers of the class, by source."""
        own = {f"self.{n}": v for n, v in self.own.items() if type(v) is int}
        return own | {f"config.{n}": v for n, v in self.config.items()}

    # ---- forward ----------------------------------------------------------------------------

    def run_forward(
        self, roles: tuple[str, str, str]
    ) -> tuple[list[IndexArray], tuple[int, int, tuple[int, ...]]]:
        """Arrays of the three names as soon as all are whole heads, and where the cut stands."""
        forward = self.view.forward
        assert forward is not None
        names = [a.arg for a in forward.args.args]
        self.flat = "positions" in names
        hidden = next(n for n in names if n not in ("self", "positions"))
        values = _defaults(forward)
        tokens = (BATCH * LENGTH,) if self.flat else (BATCH, LENGTH)
        values[hidden] = Shaped((*tokens, HEADS * HEAD_DIM))
        start: int | None = None
        dropped: list[int] = []
        for at, statement in enumerate(forward.body):
            calls = any(call_name(n) == f"self.{self.linear.attr}" for n in ast.walk(statement))
            if calls and start is None:
                start = at
            before = dict(values)
            self.steps([statement], values)
            changed = [v for n, v in values.items() if before.get(n) is not v and is_array(v)]
            if start is not None and changed:
                whole = IndexArray.numbered((*tokens, self.width))
                if not calls and all(
                    c.shape == whole.shape and c.data == whole.data for c in changed
                ):
                    # An element-wise step on the whole projection stays where it is.
                    values |= {n: whole for n, v in values.items() if v in changed}
                    continue
                if any(c.touched for c in changed):
                    raise CannotTell(
                        f"changes self.{self.linear.attr}'s output while it is cut", statement
                    )
                dropped.append(at)
            arrays = [values.get(n) for n in roles]
            if start is not None and all(
                is_array(a) and self.heads_of(a) is not None for a in arrays
            ):
                return arrays, (start, at, tuple(dropped))
        raise CannotTell(
            f"cannot follow how {self.view.name}.forward cuts self.{self.linear.attr}", forward
        )

    def heads_of(self, array: IndexArray) -> tuple[str, list[int]] | None:
        """(layout, first feature of each head) if the array is whole heads of every token."""
        shape, tokens = array.shape, BATCH * LENGTH
        lead = (tokens,) if self.flat else (BATCH, LENGTH)
        rows: IndexArray
        if shape[: len(lead)] == lead and len(shape) == len(lead) + 1 and not shape[-1] % HEAD_DIM:
            layout, rows = "flat", array
        elif shape[: len(lead)] == lead and len(shape) == len(lead) + 2 and shape[-1] == HEAD_DIM:
            layout, rows = "seq_heads", array
        elif (
            not self.flat
            and len(shape) == 4
            and (shape[0], shape[2], shape[3]) == (*lead, HEAD_DIM)
        ):
            layout, rows = "heads_seq", array.transpose(1, 2)
        else:
            return None
        rows = rows.reshape((tokens, -1, HEAD_DIM))
        count = rows.shape[1]
        starts = [rows.data[h * HEAD_DIM] for h in range(count)]
        expected = tuple(
            t * self.width + s + d for t in range(tokens) for s in starts for d in range(HEAD_DIM)
        )
        return (layout, starts) if rows.data == expected else None


def _defaults(function: ast.FunctionDef) -> dict[str, Any]:
    """The parameters: vLLM passes no cache, mask or encoder states, so None and False hold."""
    names = [a.arg for a in function.args.args]
    values: dict[str, Any] = dict.fromkeys(names, UNKNOWN)
    defaults = function.args.defaults
    for name, default in zip(names[len(names) - len(defaults) :], defaults, strict=True):
        if isinstance(default, ast.Constant) and default.value in (None, False):
            values[name] = default.value
    return values
