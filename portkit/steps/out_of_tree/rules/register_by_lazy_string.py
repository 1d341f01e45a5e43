"""Registration names the class; it does not import it."""

from __future__ import annotations

import libcst as cst

from portkit.lint.finding import Invalid, PortContext, Valid
from portkit.lint.rule import Rule
from portkit.lint.source import argument

HERE = PortContext(package="vllm_toy", module="vllm_toy.modeling_toy")


class RegisterByLazyString(Rule):
    """Register the class by a string, "module:Class".

    ## What it does
    Reports `ModelRegistry.register_model(name, x)` where `x` is a class or a string without
    exactly one colon.

    ## Why vLLM wants it
    `register()` runs in every process, and before some of them fork. Importing the model there
    imports torch and kernels, may initialise CUDA ("Cannot re-initialize CUDA in forked
    subprocess"), and slows each start. vLLM imports the string's module when it needs it.

    ## Example
        ModelRegistry.register_model("ToyForCausalLM", ToyForCausalLM)

    ## Use instead
        ModelRegistry.register_model("ToyForCausalLM", "vllm_toy.modeling_toy:ToyForCausalLM")

    ## Fix safety
    Safe: offered where the file shows which module the class comes from.

    ## References
    - vLLM guide, Registering a model: Out-of-tree models; vllm/model_executor/models/registry.py
    """

    target = "init"
    fix_safety = "safe"

    VALID = [
        Valid(
            'def register():\n    ModelRegistry.register_model("T", "vllm_toy.modeling_toy:T")\n'
        ),
        Valid(
            """
            def register():
                for name, place in MODELS.items():
                    ModelRegistry.register_model(name, place)
            """
        ),
    ]
    INVALID = [
        Invalid(
            """
            def register():
                from vllm import ModelRegistry
                from .modeling_toy import ToyForCausalLM
                ModelRegistry.register_model("Toy", ToyForCausalLM)
            """,
            line=4,
            names="ToyForCausalLM",
            given=HERE,
            fixed="""
            def register():
                from vllm import ModelRegistry
                from .modeling_toy import ToyForCausalLM
                ModelRegistry.register_model("Toy", "vllm_toy.modeling_toy:ToyForCausalLM")
            """,
        ),
        Invalid(
            'def register():\n    ModelRegistry.register_model("T", "vllm_toy.modeling_toy.T")\n',
            line=2,
            names="vllm_toy.modeling_toy.T",
            fixed="""
            def register():
                ModelRegistry.register_model("T", "vllm_toy.modeling_toy:T")
            """,
        ),
        Invalid(
            "class Toy: ...\ndef register():\n    ModelRegistry.register_model('Toy', Toy)\n",
            line=3,
            names="Toy",
        ),
    ]

    def visit_Call(self, node: cst.Call) -> None:
        function = node.func
        if not (isinstance(function, cst.Attribute) and function.attr.value == "register_model"):
            return
        place = argument(node, 1, "model_cls")
        if place is None:
            return
        if isinstance(place, cst.SimpleString):
            text = str(place.evaluated_value)
            if text.count(":") != 1:
                module, _, name = text.replace(":", ".").rpartition(".")
                self.report(
                    place,
                    f'"{text}" is not "module:Class": vLLM splits it at one colon.',
                    replacement=cst.SimpleString(f'"{module}:{name}"')
                    if module and ":" not in text
                    else None,
                )
        elif isinstance(place, (cst.Name, cst.Attribute)):
            self._class(place)

    def _class(self, place: cst.BaseExpression) -> None:
        written = self.source.code(place)
        dotted = self.source.dotted(place)
        if not written.rpartition(".")[2][:1].isupper() or written.isupper():
            return
        if dotted.startswith(".") and self.port.package:
            dotted = self.port.package + "." + dotted.lstrip(".")
        module, _, name = dotted.rpartition(".")
        known = bool(module) and not module.startswith(".")
        lazy = f'"{module}:{name}"' if known else f'"module:{name}"'
        self.report(
            place,
            f"`{written}` is the class itself: pass the string {lazy}, so that "
            "registering imports nothing.",
            replacement=cst.SimpleString(lazy) if known else None,
        )
