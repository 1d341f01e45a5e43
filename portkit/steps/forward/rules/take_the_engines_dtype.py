"""The dtype that the engine runs in need not be the checkpoint's."""

from __future__ import annotations

import libcst as cst

from portkit.draft.transforms.engines_dtype import DTYPES, ENGINES
from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule


class TakeTheEnginesDtype(Rule):
    """Make parameters and buffers in the dtype that the engine runs in.

    ## What it does
    Reports `config.dtype` in an `__init__`.

    ## Why vLLM wants it
    The config says in which dtype the checkpoint was saved. `--dtype` and quantisation may choose
    another, and vLLM makes that torch's default dtype while it builds the model. A parameter in the
    config's dtype turns what it meets into that dtype, and the next linear stops: its input is of
    another dtype than its weight.

    ## Example
        self.act_fn = ACT2CLS["xielu"](dtype=config.dtype)

    ## Use instead
        self.act_fn = ACT2CLS["xielu"](dtype=torch.get_default_dtype())

    ## Fix safety
    Safe: it is the same dtype where the engine runs in the checkpoint's.

    ## References
    - vllm/model_executor/model_loader/base_loader.py: load_model, set_default_torch_dtype
    """

    fix_safety = "safe"
    VALID = [
        Valid("def f(config):\n    return config.dtype\n"),
        Valid("class A(nn.Module):\n    def forward(self, x):\n        return x.to(x.dtype)\n"),
    ]
    INVALID = [
        Invalid(
            """
            import torch


            class A(nn.Module):
                def __init__(self, config):
                    self.act = Act(dtype=config.dtype)
            """,
            line=6,
            names="config.dtype",
            fixed="""
            import torch


            class A(nn.Module):
                def __init__(self, config):
                    self.act = Act(dtype=torch.get_default_dtype())
            """,
        ),
        Invalid(
            """
            from torch import ones


            class A(nn.Module):
                def __init__(self, config):
                    self.scale = ones(4, dtype=self.config.torch_dtype)
            """,
            line=6,
            names="self.config.torch_dtype",
        ),
    ]

    def visit_Attribute(self, node: cst.Attribute) -> None:
        if self.source.dotted(node) not in DTYPES:
            return
        function = self.source.function_of(node)
        if function is None or function.name.value != "__init__" or not self.source.class_of(node):
            return
        self.report(
            node,
            f"`{self.source.code(node)}` is the dtype of the checkpoint; the engine's may be "
            f"another, and is torch's default dtype here: {ENGINES}.",
            replacement=cst.parse_expression(ENGINES) if "torch" in self.source.aliases else None,
        )
