"""torch.compile is switched on by a decorator on the model."""

from __future__ import annotations

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule

HOME = "vllm.compilation.decorators"


class CompileTheModel(Rule):
    """Decorate the model with `@support_torch_compile`.

    ## What it does
    Reports a file in which no class has the decorator.

    ## Why vLLM wants it
    It compiles the layers between embedding and head and cuts them at attention, so that CUDA
    graphs can replay the pieces. Without it the engine warns, runs eagerly, and is slow.

    ## Example
        class ToyModel(nn.Module): ...

    ## Use instead
        @support_torch_compile
        class ToyModel(nn.Module): ...

    ## Fix safety
    Unsafe: a `forward` with branches on tensors or side effects fails or misbehaves compiled.

    ## References
    - vLLM guide, Basic model: 2. Make your code compatible with vLLM
    - vllm/compilation/decorators.py
    """

    fix_safety = "unsafe"

    VALID = [
        Valid(
            """
            @support_torch_compile
            class ToyModel(nn.Module):
                pass

            class ToyForCausalLM(nn.Module):
                pass
            """
        ),
        Valid("class ToyForCausalLM(LlamaForCausalLM):\n    pass\n"),
    ]
    INVALID = [
        Invalid(
            """
            from torch import nn

            class ToyModel(nn.Module):
                pass

            class ToyForCausalLM(nn.Module):
                pass
            """,
            line=3,
            names="ToyModel",
            fixed=f"""
            from torch import nn
            from {HOME} import support_torch_compile

            @support_torch_compile
            class ToyModel(nn.Module):
                pass

            class ToyForCausalLM(nn.Module):
                pass
            """,
        ),
        Invalid(
            """
            class ToyDecoder(nn.Module):
                pass

            class ToyBackModel(nn.Module):
                pass

            class ToyForCausalLM(nn.Module):
                def __init__(self):
                    self.model = ToyBackModel()
            """,
            line=4,
            names="ToyBackModel",
            fixed=f"""
            from {HOME} import support_torch_compile
            class ToyDecoder(nn.Module):
                pass

            @support_torch_compile
            class ToyBackModel(nn.Module):
                pass

            class ToyForCausalLM(nn.Module):
                def __init__(self):
                    self.model = ToyBackModel()
            """,
        ),
    ]

    def visit_Module(self, node: cst.Module) -> None:
        inner = self.source.backbone
        if inner is None or inner.has_base_elsewhere:
            return
        if any(
            "support_torch_compile" in self.source.code(d)
            for facts in self.source.classes.values()
            for d in facts.node.decorators
        ):
            return
        decorator = cst.Decorator(cst.Name("support_torch_compile"))
        self.report(
            inner.node,
            f"`{inner.name}` has no `@support_torch_compile`: the engine would run it eagerly.",
            replacement=inner.node.with_changes(decorators=[decorator, *inner.node.decorators]),
            imports=((HOME, "support_torch_compile"),),
        )
