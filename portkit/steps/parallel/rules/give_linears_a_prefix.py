"""Quantisation finds a layer by its prefix."""

from __future__ import annotations

import libcst as cst

from portkit.lint.edits import with_keyword
from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule
from portkit.lint.source import LINEAR_CLASSES, keyword, parameters, unpacks


class GiveLinearsAPrefix(Rule):
    """Give every linear layer and the LM head its `prefix`.

    ## What it does
    Reports vLLM linear layers and `ParallelLMHead` built without `prefix`.

    ## Why vLLM wants it
    Quantisation configs name layers, to leave some out or to mix methods. A layer without a
    prefix is matched by no name: left in when it should be left out, or the other way round.

    ## Example
        self.o_proj = RowParallelLinear(4, 4, quant_config=quant_config)

    ## Use instead
        self.o_proj = RowParallelLinear(4, 4, quant_config=quant_config, prefix=f"{prefix}.o_proj")

    ## Fix safety
    Safe: the name is the attribute's path. Offered where the constructor takes `prefix`.

    ## References
    - vLLM guide, Basic model: 2. Initialization Code, and 3. quantization support
    - vLLM pull request 51495
    """

    fix_safety = "safe"

    VALID = [
        Valid(
            """
            class A(nn.Module):
                def __init__(self, prefix):
                    self.o = RowParallelLinear(4, 4, prefix=f"{prefix}.o")
            """
        ),
        Valid("class A(nn.Module):\n    def __init__(self):\n        self.o = nn.Linear(4, 4)\n"),
    ]
    INVALID = [
        Invalid(
            """
            class A(nn.Module):
                def __init__(self, prefix=""):
                    self.o_proj = RowParallelLinear(4, 4)
            """,
            line=3,
            names="o_proj",
            fixed="""
            class A(nn.Module):
                def __init__(self, prefix=""):
                    self.o_proj = RowParallelLinear(4, 4, prefix=f"{prefix}.o_proj")
            """,
        ),
        Invalid(
            """
            from vllm.model_executor.models.utils import maybe_prefix

            class ToyForCausalLM(nn.Module):
                def __init__(self, *, vllm_config, prefix=""):
                    self.lm_head = ParallelLMHead(8, 4)
            """,
            line=5,
            names="lm_head",
            fixed="""
            from vllm.model_executor.models.utils import maybe_prefix

            class ToyForCausalLM(nn.Module):
                def __init__(self, *, vllm_config, prefix=""):
                    self.lm_head = ParallelLMHead(8, 4, prefix=maybe_prefix(prefix, "lm_head"))
            """,
        ),
    ]

    def visit_Module(self, node: cst.Module) -> None:
        for facts, layer in self.source.layers:
            name = self.source.vllm_name(layer.call.func)
            if name not in LINEAR_CLASSES and name != "ParallelLMHead":
                continue
            if keyword(layer.call, "prefix") is not None or unpacks(layer.call):
                continue
            if any(
                "prefix" in self.source.code(a.value) for a in layer.call.args if a.keyword is None
            ):
                continue
            function = self.source.function_of(layer.call)
            near = function is not None and "prefix" in parameters(function)
            outermost = facts is self.source.top
            value = (
                f'maybe_prefix(prefix, "{layer.attribute}")'
                if outermost
                else f'f"{{prefix}}.{layer.attribute}"'
            )
            self.report(
                layer.call,
                f"`{layer.attribute}` is built without `prefix`: quantisation cannot find it by "
                f"name; pass prefix={value}.",
                replacement=with_keyword(layer.call, "prefix", value) if near else None,
                imports=(("vllm.model_executor.models.utils", "maybe_prefix"),)
                if outermost and "maybe_prefix" not in self.source.aliases
                else (),
            )
