"""ALiBi slopes for vLLM's Attention: one for each head, in step parallel for this rank's heads."""

from __future__ import annotations

import libcst as cst

from portkit.draft import edit
from portkit.draft.serving.alibi import SLOPES

BIAS = "position_bias"
"""Keyword of the attention call that says what the ALiBi bias is multiplied by."""
_NAME = "alibi_slopes"
SLOPES_ARGUMENT = f"{_NAME}={_NAME}.tolist()"


def slopes_statements(keywords: dict[str, cst.BaseExpression], heads: str) -> list[edit.Statement]:
    """`alibi_slopes = get_alibi_slopes(heads) * factor` if attention adds such a bias."""
    if BIAS not in keywords:
        return []
    factor = edit.flat(keywords[BIAS])
    times = "" if factor == "1" else f" * {factor}"
    return [edit.statement(f"{_NAME} = {SLOPES}({heads}){times}")]


def slopes_of_this_rank(body: list[edit.Statement]) -> list[edit.Statement]:
    """Slopes are made for all heads, then cut to those of the rank."""
    out: list[edit.Statement] = []
    for node in body:
        pair = edit.assigned(node)
        out.append(node)
        if pair is not None and edit.code(pair[0]) == _NAME and SLOPES in edit.code(pair[1]):
            made = edit.find(node, lambda n: edit.is_call(n, SLOPES))[0]
            given = edit.code(made.args[0].value)
            out[-1] = edit.replace_text(
                node, f"{SLOPES}({given})", f"{SLOPES}(self.total_num_heads)"
            )
            out += edit.statements(f"""
first_head = get_tensor_model_parallel_rank() * self.num_heads
{_NAME} = {_NAME}[first_head : first_head + self.num_heads]
""")
    return out
