"""The entry point names a function; it must be there."""

from __future__ import annotations

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule


class DefineRegister(Rule):
    """Define `register()` in the plugin's `__init__.py`.

    ## What it does
    Reports a plugin without a top-level function `register` that can be called without arguments.

    ## Why vLLM wants it
    Each of vLLM's processes loads the entry point and calls it. If the name is missing, the error
    is logged and swallowed, and the architecture is "not supported", or worse, served by the
    Transformers backend.

    ## Example
        from vllm import ModelRegistry

    ## Use instead
        def register() -> None:
            from vllm import ModelRegistry

            ModelRegistry.register_model("ToyForCausalLM", "vllm_toy.modeling_toy:ToyForCausalLM")

    ## Fix safety
    None: the step's draft writes the function.

    ## References
    - vLLM guide, Registering a model: Out-of-tree models; vllm/plugins/__init__.py
    """

    target = "init"

    VALID = [
        Valid('def register():\n    print("x")\n'),
        Valid("def register(force=False) -> None: ...\n"),
        Valid("from vllm_toy.plugin import register\n"),
    ]
    INVALID = [
        Invalid('"""A plugin."""\n', line=1, names="register"),
        Invalid(
            "def register(registry):\n    registry.register_model()\n", line=1, names="registry"
        ),
    ]

    def visit_Module(self, node: cst.Module) -> None:
        function = self.source.functions.get("register")
        if function is None:
            if "register" not in self.source.aliases:
                self.report(
                    node, "There is no `register()` here: vLLM calls it through the entry point."
                )
            return
        needed = [p.name.value for p in function.params.params if p.default is None]
        if needed:
            self.report(
                function,
                f"`register` asks for `{', '.join(needed)}`: vLLM calls it without arguments.",
            )
