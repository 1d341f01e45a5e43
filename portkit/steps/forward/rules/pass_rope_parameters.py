"""get_rope must be told theta and scaling."""

from __future__ import annotations

import libcst as cst

from portkit.lint.edits import with_keyword
from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule
from portkit.lint.source import argument, parameters, unpacks


class PassRopeParameters(Rule):
    """Give `get_rope` the config's `rope_parameters`.

    ## What it does
    Reports a `get_rope` call without `rope_parameters`, or with None.

    ## Why vLLM wants it
    Theta, scaling (llama3, yarn, longrope) and the rotated part of a head all come in that
    dictionary. Without it theta is 10000: short prompts look right, long ones do not.

    ## Example
        get_rope(self.head_dim, max_position=4096, is_neox_style=True)

    ## Use instead
        get_rope(self.head_dim, max_position=4096, rope_parameters=config.rope_parameters,
                 is_neox_style=True)

    ## Fix safety
    Unsafe: it changes theta and scaling to the config's. Offered where `config` is at hand.

    ## References
    - vllm/model_executor/layers/rotary_embedding/__init__.py
    - vLLM issues 9490, 9502; pull request 29111
    """

    fix_safety = "unsafe"

    VALID = [
        Valid("rope = get_rope(64, 4096, rope_parameters=config.rope_parameters)\n"),
        Valid("rope = get_rope(64, 4096, True, parameters)\n"),
        Valid("rope = get_rope(64, **options)\n"),
    ]
    INVALID = [
        Invalid("rope = get_rope(64, 4096)\n", line=1, names="rope_parameters"),
        Invalid(
            """
            class ToyAttention(nn.Module):
                def __init__(self, config):
                    self.rotary_emb = get_rope(64, 4096, rope_parameters=None)
            """,
            line=3,
            names="rope_parameters",
            fixed="""
            class ToyAttention(nn.Module):
                def __init__(self, config):
                    self.rotary_emb = get_rope(64, 4096, rope_parameters=config.rope_parameters)
            """,
        ),
    ]

    def visit_Call(self, node: cst.Call) -> None:
        if self.source.vllm_name(node.func) != "get_rope" or unpacks(node):
            return
        given = argument(node, 3, "rope_parameters")
        if given is not None and self.source.code(given) != "None":
            return
        function = self.source.function_of(node)
        near = function is not None and "config" in parameters(function)
        self.report(
            node,
            "`get_rope` is called without `rope_parameters`: theta falls back to 10000 and "
            "scaling is lost; pass config.rope_parameters.",
            replacement=with_keyword(node, "rope_parameters", "config.rope_parameters")
            if near
            else None,
        )
