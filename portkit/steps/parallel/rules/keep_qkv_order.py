"""QKVParallelLinear's output is q, then k, then v."""

from __future__ import annotations

import re

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule

KIND = re.compile(r"^(?:(q|k|v)|(query|key|value))(?:_?\w*)?$")


class KeepQkvOrder(Rule):
    """Take q, k and v out of the fused projection in this order.

    ## What it does
    Reports `q, v, k = qkv.split(...)` and other orders than q, k, v, for `split` and `chunk`.

    ## Why vLLM wants it
    `QKVParallelLinear` stores q first, then k, then v. K and V have equal shapes: nothing
    crashes when they are swapped, and the text is garbage.

    ## Example
        q, v, k = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)

    ## Use instead
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)

    ## Fix safety
    None: a checkpoint with another order of its own is repacked when loading.

    ## References
    - vllm/model_executor/layers/linear.py (QKVParallelLinear)
    """

    VALID = [
        Valid("q, k, v = qkv.split([4, 4, 4], dim=-1)\n"),
        Valid("query, key, value = qkv.chunk(chunks=3, dim=-1)\n"),
        Valid("a, b, c = x.split([4, 4, 4], dim=-1)\n"),
    ]
    INVALID = [
        Invalid("q, v, k = qkv.split([4, 4, 4], dim=-1)\n", line=1, names="q, v, k"),
        Invalid(
            "key, query, value = qkv.chunk(chunks=3, dim=-1)\n", line=1, names="key, query, value"
        ),
    ]

    def visit_Assign(self, node: cst.Assign) -> None:
        target, value = node.targets[0].target, node.value
        if not (isinstance(target, cst.Tuple) and isinstance(value, cst.Call)):
            return
        if not (
            isinstance(value.func, cst.Attribute) and value.func.attr.value in ("split", "chunk")
        ):
            return
        names = [self.source.code(e.value) for e in target.elements]
        kinds = [(m[1] or m[2][0]) if (m := KIND.match(name)) else "" for name in names]
        if sorted(kinds) == ["k", "q", "v"] and kinds != ["q", "k", "v"]:
            self.report(
                node,
                f"`{', '.join(names)}` is not the order of `{self.source.code(value.func.value)}`: "
                "vLLM's fused projection gives q, k, v.",
            )
