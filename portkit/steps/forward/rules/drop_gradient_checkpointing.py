"""Gradient checkpointing saves memory in training only."""

from __future__ import annotations

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule


class DropGradientCheckpointing(Rule):
    """Drop gradient checkpointing.

    ## What it does
    Reports the base `GradientCheckpointingLayer`, attributes named `gradient_checkpointing` and
    calls of `_gradient_checkpointing_func`.

    ## Why vLLM wants it
    There are no gradients. The base class wraps every call of a layer, which costs time and
    breaks the graph that torch.compile records.

    ## Example
        class ToyLayer(GradientCheckpointingLayer): ...

    ## Use instead
        class ToyLayer(nn.Module): ...

    ## Fix safety
    Safe: without gradients the base does what `nn.Module` does, and the flag is never read. Code
    that branches on the flag is left to you.

    ## References
    - vLLM guide, Basic model: 2. Make your code compatible with vLLM ("remove training code")
    """

    fix_safety = "safe"

    VALID = [
        Valid("class ToyLayer(nn.Module):\n    pass\n"),
        Valid("class ToyModel(nn.Module):\n    def __init__(self):\n        self.layers = []\n"),
    ]
    INVALID = [
        Invalid(
            """
            from torch import nn
            from transformers.modeling_layers import GradientCheckpointingLayer

            class ToyLayer(GradientCheckpointingLayer):
                pass
            """,
            line=4,
            names="GradientCheckpointingLayer",
            fixed="""
            from torch import nn

            class ToyLayer(nn.Module):
                pass
            """,
        ),
        Invalid(
            """
            class ToyModel(nn.Module):
                def __init__(self):
                    self.layers = []
                    self.gradient_checkpointing = False
            """,
            line=4,
            names="gradient_checkpointing",
            fixed="""
            class ToyModel(nn.Module):
                def __init__(self):
                    self.layers = []
            """,
        ),
        Invalid(
            """
            class ToyModel(nn.Module):
                def forward(self, x):
                    return self._gradient_checkpointing_func(self.layer, x)
            """,
            line=3,
            names="_gradient_checkpointing_func",
        ),
    ]

    def visit_ClassDef(self, node: cst.ClassDef) -> None:
        for base in node.bases:
            name = self.source.dotted(base.value).rpartition(".")[2]
            if name != "GradientCheckpointingLayer":
                continue
            module = next(
                (local for local, full in self.source.aliases.items() if full == "torch.nn"), "nn"
            )
            bases = [
                b.with_changes(value=cst.parse_expression(f"{module}.Module")) if b is base else b
                for b in node.bases
            ]
            self.report(
                node,
                f"`{node.name.value}` derives from `GradientCheckpointingLayer`: use nn.Module.",
                replacement=node.with_changes(bases=bases),
                imports=() if module in self.source.aliases else (("torch", "nn"),),
                unused=(name,),
            )

    def visit_SimpleStatementLine(self, node: cst.SimpleStatementLine) -> None:
        small = node.body[0]
        if len(node.body) == 1 and isinstance(small, cst.Assign):
            target = self.source.dotted(small.targets[0].target)
            if target == "self.gradient_checkpointing":
                self.report(
                    node,
                    "`self.gradient_checkpointing` is for training: drop it.",
                    replacement=cst.RemoveFromParent() if self._has_company(node) else None,
                )

    def visit_Call(self, node: cst.Call) -> None:
        name = self.source.dotted(node.func).rpartition(".")[2]
        if name == "_gradient_checkpointing_func":
            self.report(node, f"`{name}` recomputes for gradients: call the layer itself.")

    def _has_company(self, node: cst.CSTNode) -> bool:
        block = self.source.parents.get(node)
        return isinstance(block, cst.IndentedBlock) and len(block.body) > 1
