"""Two layers of one name are one layer too many."""

from __future__ import annotations

import libcst as cst

from portkit.lint.edits import with_keyword
from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule
from portkit.lint.source import CAUSAL_LM_NAME, keyword, parameters


class KeepPrefixesUnique(Rule):
    """Build each `prefix` from the one that is passed in.

    ## What it does
    Reports a prefix that is a fixed string in a class which takes `prefix`, and two layers of one
    constructor with the same prefix.

    ## Why vLLM wants it
    A class of a decoder layer is built once per layer: with a fixed string all of them get the
    same name, and the engine stops with "Duplicate layer name".

    ## Example
        self.attn = Attention(4, 8, 1.0, prefix="attn")

    ## Use instead
        self.attn = Attention(4, 8, 1.0, prefix=f"{prefix}.attn")

    ## Fix safety
    Safe: the name becomes the module's path. A repeated prefix has no fix: which is wrong?

    ## References
    - vLLM guide, Basic model: 2. Make your code compatible with vLLM, Initialization Code
    """

    fix_safety = "safe"

    VALID = [
        Valid(
            """
            class A(nn.Module):
                def __init__(self, prefix):
                    self.attn = Attention(4, prefix=f"{prefix}.attn")
            """
        ),
        Valid(
            """
            class A(nn.Module):
                def __init__(self, prefix):
                    self.m = M(prefix=maybe_prefix(prefix, "m"))
            """
        ),
        Valid(
            """
            class TForCausalLM(nn.Module):
                def __init__(self, prefix):
                    self.model = M(prefix="model")
            """
        ),
        Valid(
            """
            class A(nn.Module):
                def __init__(self, prefix, cls):
                    if cls:
                        self.attn = One(prefix=f"{prefix}.attn")
                    else:
                        self.other = Two(prefix=f"{prefix}.attn")
            """
        ),
    ]
    INVALID = [
        Invalid(
            """
            class A(nn.Module):
                def __init__(self, prefix=""):
                    self.attn = Attention(4, 8, 1.0, prefix="attn")
            """,
            line=3,
            names='"attn"',
            fixed="""
            class A(nn.Module):
                def __init__(self, prefix=""):
                    self.attn = Attention(4, 8, 1.0, prefix=f"{prefix}.attn")
            """,
        ),
        Invalid(
            """
            class A(nn.Module):
                def __init__(self, prefix=""):
                    self.global_attn = Attention(4, 8, 1.0, prefix=f"{prefix}.attn")
                    self.local_attn = Attention(4, 8, 1.0, prefix=f"{prefix}.attn")
            """,
            line=4,
            names="local_attn",
        ),
    ]

    def visit_Module(self, node: cst.Module) -> None:
        seen: dict[tuple[cst.CSTNode | None, str], str] = {}
        for facts, layer in self.source.layers:
            given = keyword(layer.call, "prefix")
            if given is None:
                continue
            function = self.source.function_of(layer.call)
            text = self.source.code(given.value)
            if isinstance(given.value, cst.SimpleString):
                if facts is self.source.top or CAUSAL_LM_NAME.search(facts.name):
                    continue
                if (
                    function is not None
                    and "prefix" in parameters(function)
                    and given.value.evaluated_value
                ):
                    value = f'f"{{prefix}}.{layer.attribute}"'
                    self.report(
                        layer.call,
                        f"`self.{layer.attribute}` has the fixed prefix {text}, the same in "
                        f"every layer: pass prefix={value}.",
                        replacement=with_keyword(layer.call, "prefix", value),
                    )
                continue
            # Only layers of one block: the other branch of an `if` may well use the name again.
            line = self.source.statement_of(layer.call)
            block = self.source.parents.get(self.source.parents.get(line)) if line else None
            key = (block, text)
            first = seen.setdefault(key, layer.attribute)
            if first != layer.attribute and "prefix" in text:
                self.report(
                    layer.call,
                    f"`self.{layer.attribute}` has the prefix {text} of `self.{first}`: "
                    "each layer needs its own.",
                )
