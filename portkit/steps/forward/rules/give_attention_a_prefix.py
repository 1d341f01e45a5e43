"""The KV cache finds an Attention layer by its prefix."""

from __future__ import annotations

import libcst as cst

from portkit.lint.edits import with_keyword
from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule
from portkit.lint.source import keyword, parameters, unpacks


class GiveAttentionAPrefix(Rule):
    """Give each `Attention` its `prefix`.

    ## What it does
    Reports `self.x = Attention(...)` without `prefix`.

    ## Why vLLM wants it
    The prefix is the layer's name. The engine hands out KV cache pages by it, so two layers
    without one collide: "Duplicate layer name".

    ## Example
        self.attn = Attention(self.num_heads, self.head_dim, self.scaling)

    ## Use instead
        self.attn = Attention(self.num_heads, self.head_dim, self.scaling, prefix=f"{prefix}.attn")

    ## Fix safety
    Safe: the name is the attribute's. Offered where the constructor takes `prefix`.

    ## References
    - vLLM guide, Basic model: 2. Make your code compatible with vLLM, Initialization Code
    - vllm/model_executor/layers/attention
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
            class Attention(nn.Module): ...
            class B(nn.Module):
                def __init__(self):
                    self.a = Attention(4)
            """
        ),
        Valid(
            """
            class A(nn.Module):
                def __init__(self, **kw):
                    self.attn = Attention(4, **kw)
            """
        ),
    ]
    INVALID = [
        Invalid(
            """
            class A(nn.Module):
                def __init__(self, prefix=""):
                    self.attn = Attention(4, 8, 1.0)
            """,
            line=3,
            names="attn",
            fixed="""
            class A(nn.Module):
                def __init__(self, prefix=""):
                    self.attn = Attention(4, 8, 1.0, prefix=f"{prefix}.attn")
            """,
        ),
        Invalid(
            """
            class A(nn.Module):
                def __init__(self):
                    self.attn = Attention(4, 8, 1.0)
            """,
            line=3,
            names="attn",
        ),
    ]

    def visit_Module(self, node: cst.Module) -> None:
        for _, layer in self.source.layers:
            if self.source.vllm_name(layer.call.func) != "Attention" or unpacks(layer.call):
                continue
            if keyword(layer.call, "prefix") is None:
                function = self.source.function_of(layer.call)
                near = function is not None and "prefix" in parameters(function)
                value = f'f"{{prefix}}.{layer.attribute}"'
                self.report(
                    layer.call,
                    f"`self.{layer.attribute}` is an Attention without `prefix`: the engine "
                    f"finds its KV cache by that name; pass prefix={value}.",
                    replacement=with_keyword(layer.call, "prefix", value) if near else None,
                )
