"""Importing the plugin must import nothing heavy."""

from __future__ import annotations

import libcst as cst

from portkit.lint.finding import Invalid, PortContext, Valid
from portkit.lint.rule import Rule

HEAVY = ("torch", "transformers", "vllm", "triton", "flash_attn", "tensorflow", "jax")


class KeepPluginImportsLight(Rule):
    """Import torch, Transformers, vLLM and the model inside `register()` or not at all.

    ## What it does
    Reports top-level imports of heavy packages and of the modeling file in the plugin's
    `__init__.py`, and any use of `torch.cuda` there.

    ## Why vLLM wants it
    The package is imported in every process, before workers fork; what initialises CUDA then
    breaks them. And `pip`, tools and tests import packages just to look at them.

    ## Example
        import torch
        from .modeling_toy import ToyForCausalLM

    ## Use instead
        def register() -> None:
            from vllm import ModelRegistry

    ## Fix safety
    None: what used the import moves with it.

    ## References
    - vLLM guide, Registering a model: Out-of-tree models; vLLM issues 8893, 12754
    """

    target = "init"

    VALID = [
        Valid("def register():\n    from vllm import ModelRegistry\n"),
        Valid("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n"),
        Valid("import os\n"),
    ]
    INVALID = [
        Invalid("import torch\n", line=1, names="torch"),
        Invalid(
            "from .modeling_toy import ToyForCausalLM\n",
            line=1,
            names="modeling_toy",
            given=PortContext(package="vllm_toy", module="vllm_toy.modeling_toy"),
        ),
        Invalid(
            "def register():\n    import torch\n    torch.cuda.init()\n", line=3, names="torch.cuda"
        ),
    ]

    def visit_Import(self, node: cst.Import) -> None:
        for alias in node.names:
            self._look(node, self.source.code(alias.name))

    def visit_ImportFrom(self, node: cst.ImportFrom) -> None:
        module = self.source.code(node.module) if node.module else ""
        if node.relative:
            names = (
                [a.evaluated_name for a in node.names]
                if not isinstance(node.names, cst.ImportStar)
                else []
            )
            modeling = self.port.module.rpartition(".")[2] or "modeling_"
            if any(name.startswith(modeling) for name in (module, *names)):
                self._look(node, "." + (module or modeling), always=True)
            return
        self._look(node, module, always=bool(self.port.module) and module == self.port.module)

    def visit_Call(self, node: cst.Call) -> None:
        dotted = self.source.dotted(node.func)
        if dotted.startswith("torch.cuda."):
            self.report(
                node,
                f"`{dotted}` may initialise CUDA in a process that forks: keep it out of "
                "the plugin.",
            )

    def _look(self, node: cst.CSTNode, module: str, always: bool = False) -> None:
        if not always and module.partition(".")[0] not in HEAVY:
            return
        for parent in self.source.ancestors(node):
            if isinstance(parent, cst.FunctionDef):
                return
            if isinstance(parent, cst.If) and "TYPE_CHECKING" in self.source.code(parent.test):
                return
        self.report(
            node,
            f"`{module}` is imported when the plugin is: import it inside register(), if at all.",
        )
