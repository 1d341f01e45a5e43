"""A layer's prefix is its path in the model."""

from __future__ import annotations

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule
from portkit.lint.source import keyword


class MatchPrefixToAttribute(Rule):
    """End each `prefix` with the name of the attribute that holds the layer.

    ## What it does
    Reports `self.x = Layer(..., prefix=f"{prefix}.y")` and `maybe_prefix(prefix, "y")`, where the
    last part differs from the attribute's name.

    ## Why vLLM wants it
    Quantisation configs list layers by their path in the checkpoint. With a wrong prefix the
    unquantised model is perfect, and a quantised one fails with a KeyError or quantises a layer
    that was to be left alone.

    ## Example
        self.short_conv = ColumnParallelLinear(8, 8, prefix=f"{prefix}.conv")

    ## Use instead
        self.short_conv = ColumnParallelLinear(8, 8, prefix=f"{prefix}.short_conv")

    ## Fix safety
    Safe: only the name changes, to the module's own path.

    ## References
    - vLLM guide, Basic model: 2. Make your code compatible with vLLM, Initialization Code
    - vLLM pull requests 11795, 51495
    """

    fix_safety = "safe"

    VALID = [
        Valid(
            """
            class A(nn.Module):
                def __init__(self, prefix):
                    self.mlp = M(prefix=f"{prefix}.mlp")
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
            class A(nn.Module):
                def __init__(self, prefix):
                    self.m = M(prefix=f"{prefix}.layers.{i}")
            """
        ),
    ]
    INVALID = [
        Invalid(
            """
            class A(nn.Module):
                def __init__(self, prefix):
                    self.short_conv = M(8, prefix=f"{prefix}.conv")
            """,
            line=3,
            names="short_conv",
            fixed="""
            class A(nn.Module):
                def __init__(self, prefix):
                    self.short_conv = M(8, prefix=f"{prefix}.short_conv")
            """,
        ),
        Invalid(
            """
            class A(nn.Module):
                def __init__(self, prefix):
                    self.transformer = M(prefix=maybe_prefix(prefix, "model"))
            """,
            line=3,
            names="transformer",
            fixed="""
            class A(nn.Module):
                def __init__(self, prefix):
                    self.transformer = M(prefix=maybe_prefix(prefix, "transformer"))
            """,
        ),
    ]

    def visit_Module(self, node: cst.Module) -> None:
        for _, layer in self.source.layers:
            given = keyword(layer.call, "prefix")
            if given is None:
                continue
            found = self._last_part(given.value)
            if found is None or found[0] == layer.attribute:
                continue
            last, part, corrected = found[0], found[1], found[2](layer.attribute)
            self.report(
                given,
                f"`self.{layer.attribute}` is built with a prefix that ends in `{last}`: "
                "it must end "
                f"in `{layer.attribute}`, the layer's path in the model.",
                replaces=part,
                replacement=corrected,
            )

    def _last_part(self, value: cst.BaseExpression):
        """(last name, node that holds it, how to write another there); None if not literal."""
        if isinstance(value, cst.FormattedString) and value.parts:
            text = value.parts[-1]
            if isinstance(text, cst.FormattedStringText) and text.value.startswith("."):
                name = text.value.rpartition(".")[2]
                head = text.value[: len(text.value) - len(name)]
                return name, text, lambda new: text.with_changes(value=head + new)
        if isinstance(value, cst.Call) and self.source.vllm_name(value.func) == "maybe_prefix":
            text = value.args[1].value if len(value.args) == 2 else None
            if isinstance(text, cst.SimpleString):
                name = str(text.evaluated_value)
                return (
                    name.rpartition(".")[2],
                    text,
                    lambda new: text.with_changes(
                        value=text.quote
                        + name[: len(name) - len(name.rpartition(".")[2])]
                        + new
                        + text.quote
                    ),
                )
        return None
