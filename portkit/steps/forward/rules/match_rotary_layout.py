"""`is_neox_style` must say what the copied code did."""

from __future__ import annotations

import libcst as cst

from portkit.lint.edits import with_keyword
from portkit.lint.finding import Invalid, PortContext, Valid
from portkit.lint.rule import Rule
from portkit.lint.source import argument, unpacks

STYLE = {"half": "True", "interleaved": "False"}
WORDS = {
    "half": "rotates the two halves of a head (x[: d/2], x[d/2 :])",
    "interleaved": "rotates neighbours (x[0::2], x[1::2])",
}


class MatchRotaryLayout(Rule):
    """Set `is_neox_style` to the layout of the copied code.

    ## What it does
    Compares `get_rope(..., is_neox_style=...)` with the rotation in the code as it was copied
    (read from the port's git history). Silent where that code does not settle the question.

    ## Why vLLM wants it
    The two layouts have equal shapes and differ in which numbers pair up. With the wrong one
    position 0 is right, the text starts fluently, and drifts. It is among the commonest bugs of
    ports, and `get_rope`'s default (True) hides it.

    ## Example
        get_rope(self.head_dim, max_position=4096)          # copied code: x[..., 0::2]

    ## Use instead
        get_rope(self.head_dim, max_position=4096, is_neox_style=False)

    ## Fix safety
    Unsafe: it changes what the model computes; right unless the weights were permuted too.

    ## References
    - vllm/model_executor/layers/rotary_embedding
    - vLLM issues 747, 11451, 16904
    """

    fix_safety = "unsafe"

    VALID = [
        Valid(
            "rope = get_rope(64, 4096, is_neox_style=False)\n",
            PortContext(rotary_layout="interleaved"),
        ),
        Valid("rope = get_rope(64, 4096)\n", PortContext(rotary_layout="half")),
        Valid(
            "rope = get_rope(64, 4096, is_neox_style=config.style)\n",
            PortContext(rotary_layout="half"),
        ),
        Valid("rope = get_rope(64, 4096)\n"),
    ]
    INVALID = [
        Invalid(
            "rope = get_rope(64, 4096)\n",
            line=1,
            given=PortContext(rotary_layout="interleaved"),
            fixed="rope = get_rope(64, 4096, is_neox_style=False)\n",
            names="is_neox_style=False",
        ),
        Invalid(
            "rope = get_rope(\n    64,\n    max_position=4096,\n    is_neox_style=False,\n)\n",
            line=1,
            given=PortContext(rotary_layout="half"),
            fixed="rope = get_rope(\n    64,\n    max_position=4096,\n    is_neox_style=True,\n)\n",
            names="is_neox_style=True",
        ),
        Invalid(
            "rope = get_rope(\n    64,\n    max_position=4096,\n)\n",
            line=1,
            given=PortContext(rotary_layout="interleaved"),
            fixed=(
                "rope = get_rope(\n    64,\n    max_position=4096,\n    is_neox_style=False,\n)\n"
            ),
        ),
    ]

    def visit_Call(self, node: cst.Call) -> None:
        layout = self.port.rotary_layout
        if layout is None or self.source.vllm_name(node.func) != "get_rope" or unpacks(node):
            return
        given = argument(node, 2, "is_neox_style")
        written = self.source.code(given) if given is not None else "True"
        if written not in ("True", "False") or written == STYLE[layout]:
            return
        how = (
            f"says `is_neox_style={written}`"
            if given is not None
            else "leaves `is_neox_style` at True"
        )
        keyworded = given is None or any(
            a.keyword and a.keyword.value == "is_neox_style" for a in node.args
        )
        self.report(
            node,
            f"`get_rope` {how}, but the copied code {WORDS[layout]}: set "
            f"is_neox_style={STYLE[layout]}.",
            replacement=with_keyword(node, "is_neox_style", STYLE[layout]) if keyworded else None,
        )
