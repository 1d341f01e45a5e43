"""Models are built by keyword from one configuration object and a prefix."""

from __future__ import annotations

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule
from portkit.lint.source import ClassFacts, parameters, takes_kwargs


class TakeVllmConfig(Rule):
    """Build the model with `__init__(self, *, vllm_config, prefix="")`.

    ## What it does
    Reports the constructor of the causal LM and of the model inside it if it does not take
    `vllm_config` and `prefix` as keyword-only arguments.

    ## Why vLLM wants it
    All models are built alike, so new options need no change in any model; `prefix` gives each
    layer its full name, by which quantisation and the KV cache find it. `support_torch_compile`
    reads `vllm_config` from the inner model's constructor.

    ## Example
        def __init__(self, config): ...

    ## Use instead
        def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
            config = vllm_config.model_config.hf_config

    ## Fix safety
    None: what the constructor did with `config`, and its callers, change with it.

    ## References
    - vLLM guide, Basic model: 2. Make your code compatible with vLLM, Initialization Code
    """

    VALID = [
        Valid(
            """
            class ToyForCausalLM(nn.Module):
                def __init__(self, *, vllm_config, prefix=""):
                    pass
            """
        ),
        Valid("class ToyLayer(nn.Module):\n    def __init__(self, config): ...\n"),
        Valid("class ToyForCausalLM(LlamaForCausalLM):\n    pass\n"),
    ]
    INVALID = [
        Invalid(
            "class ToyForCausalLM(nn.Module):\n    def __init__(self, config):\n        pass\n",
            line=2,
            names="vllm_config",
        ),
        Invalid(
            """
            class ToyModel(nn.Module):
                def __init__(self, vllm_config, prefix=""):
                    pass

            class ToyForCausalLM(nn.Module):
                def __init__(self, *, vllm_config):
                    self.model = ToyModel(vllm_config=vllm_config)
            """,
            line=2,
            count=2,
            names="ToyModel",
        ),
    ]

    def visit_Module(self, node: cst.Module) -> None:
        for facts in (self.source.backbone, self.source.top):
            if facts is not None and "__init__" in facts.methods:
                self._compare(facts, facts.methods["__init__"])

    def _compare(self, facts: ClassFacts, init: cst.FunctionDef) -> None:
        have = parameters(init)
        missing = [f"`{name}`" for name in ("vllm_config", "prefix") if name not in have]
        if missing and not takes_kwargs(init):
            self.report(
                init,
                f"`{facts.name}.__init__` takes no {' and no '.join(missing)}: vLLM builds it with "
                '`(*, vllm_config, prefix="")`.',
            )
        elif not missing:
            loose = [
                p.name.value
                for p in init.params.params
                if p.name.value in ("vllm_config", "prefix")
            ]
            if loose:
                self.report(
                    init,
                    f"`{facts.name}.__init__` takes {' and '.join(f'`{n}`' for n in loose)} "
                    "by position: "
                    "vLLM's convention is keyword-only, write `*` after self.",
                )
