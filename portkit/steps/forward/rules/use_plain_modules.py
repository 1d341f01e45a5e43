"""A vLLM model is a plain nn.Module."""

from __future__ import annotations

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule

BASES = {
    "PreTrainedModel": "weights come through load_weights, not from_pretrained",
    "GenerationMixin": "the engine generates",
}


class UsePlainModules(Rule):
    """Derive models from `nn.Module`, not from Transformers' base classes.

    ## What it does
    Reports classes whose base is `PreTrainedModel` or `GenerationMixin`, or a class of the file
    that is, and calls of `post_init()`.

    ## Why vLLM wants it
    These bases load, initialise, generate and dispatch attention in Transformers' way, and their
    constructors want a config object. vLLM does all of it itself.

    ## Example
        class ToyModel(ToyPreTrainedModel): ...

    ## Use instead
        class ToyModel(nn.Module): ...

    ## Fix safety
    None: `super().__init__(config)` and attributes of the base go with it.

    ## References
    - vLLM guide, Basic model: 2. Make your code compatible with vLLM
    """

    VALID = [
        Valid("class ToyModel(nn.Module):\n    pass\n"),
        Valid("class ToyForCausalLM(nn.Module, SupportsPP):\n    pass\n"),
    ]
    INVALID = [
        Invalid(
            """
            class ToyPreTrainedModel(PreTrainedModel):
                pass

            class ToyForCausalLM(ToyPreTrainedModel, GenerationMixin):
                def __init__(self):
                    self.post_init()
            """,
            line=1,
            count=4,
            names="PreTrainedModel",
        ),
        Invalid(
            "class ToyForCausalLM(nn.Module, GenerationMixin):\n    pass\n",
            line=1,
            names="GenerationMixin",
        ),
    ]

    def visit_ClassDef(self, node: cst.ClassDef) -> None:
        facts = self.source.classes.get(node.name.value)
        if facts is None or facts.node is not node:
            return
        for base in facts.bases:
            name = base.rpartition(".")[2]
            if name in BASES:
                self.report(
                    node, f"`{facts.name}` derives from `{name}`: use nn.Module; {BASES[name]}."
                )
            elif name in self.source.classes and self._is_hf(name):
                self.report(
                    node,
                    f"`{facts.name}` derives from `{name}`, a PreTrainedModel: use nn.Module; "
                    f"{BASES['PreTrainedModel']}.",
                )

    def visit_Call(self, node: cst.Call) -> None:
        if self.source.dotted(node.func) == "self.post_init":
            self.report(
                node,
                "`self.post_init()` initialises weights for training: drop it; they are loaded.",
            )

    def _is_hf(self, name: str, depth: int = 5) -> bool:
        facts = self.source.classes.get(name)
        if facts is None or depth == 0:
            return False
        return any(
            base.endswith("PreTrainedModel") or self._is_hf(base, depth - 1) for base in facts.bases
        )
