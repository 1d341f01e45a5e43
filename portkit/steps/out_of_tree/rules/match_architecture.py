"""The registered name is the one that config.json says."""

from __future__ import annotations

import difflib

import libcst as cst

from portkit.lint.finding import Invalid, PortContext, Valid
from portkit.lint.rule import Rule
from portkit.lint.source import argument

TOY = PortContext(architectures=("ToyForCausalLM",))


class MatchArchitecture(Rule):
    """Register under the name in config.json's `architectures`.

    ## What it does
    Compares the first argument of `register_model` with the checkpoint's config.json.

    ## Why vLLM wants it
    vLLM looks the name up. With one letter wrong the port is never asked: the model is "not
    supported", or served by the Transformers backend without a word.

    ## Example
        ModelRegistry.register_model("ToyForCausalLm", "vllm_toy.modeling_toy:ToyForCausalLM")

    ## Use instead
        ModelRegistry.register_model("ToyForCausalLM", "vllm_toy.modeling_toy:ToyForCausalLM")

    ## Fix safety
    Unsafe: offered where config.json names one architecture; a plugin may register others too.

    ## References
    - vllm/model_executor/models/registry.py; vLLM issue 11229
    """

    target = "init"
    fix_safety = "unsafe"

    VALID = [
        Valid('def register():\n    ModelRegistry.register_model("ToyForCausalLM", "m:C")\n', TOY),
        Valid('def register():\n    ModelRegistry.register_model("Anything", "m:C")\n'),
        Valid(
            """
            def register():
                ModelRegistry.register_model('Other', 'm:D')
                ModelRegistry.register_model('ToyForCausalLM', 'm:C')
            """,
            TOY,
        ),
    ]
    INVALID = [
        Invalid(
            'def register():\n    ModelRegistry.register_model("ToyForCausalLm", "m:C")\n',
            line=2,
            names="ToyForCausalLm",
            given=TOY,
            fixed='def register():\n    ModelRegistry.register_model("ToyForCausalLM", "m:C")\n',
        ),
        Invalid(
            'def register():\n    ModelRegistry.register_model("Toy", "m:C")\n',
            line=2,
            names="Toy",
            given=PortContext(architectures=("AForCausalLM", "BForCausalLM")),
        ),
    ]

    def visit_Module(self, node: cst.Module) -> None:
        self.calls: list[cst.SimpleString] = []

    def visit_Call(self, node: cst.Call) -> None:
        if isinstance(node.func, cst.Attribute) and node.func.attr.value == "register_model":
            name = argument(node, 0, "model_arch")
            if isinstance(name, cst.SimpleString):
                self.calls.append(name)

    def leave_Module(self, original_node: cst.Module) -> None:
        wanted = self.port.architectures
        written = [str(name.evaluated_value) for name in self.calls]
        if not wanted or not written or set(wanted) & set(written):
            return
        close = difflib.get_close_matches(written[0], wanted, n=1, cutoff=0.0)[0]
        self.report(
            self.calls[0],
            f'"{written[0]}" is not what config.json says ("{close}"): vLLM would never ask for '
            "this class.",
            replacement=cst.SimpleString(f'"{close}"')
            if len(wanted) == len(written) == 1
            else None,
        )
