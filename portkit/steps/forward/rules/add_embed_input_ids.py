"""vLLM asks the model to embed tokens apart from running it."""

from __future__ import annotations

import libcst as cst

from portkit.lint.edits import with_method
from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule
from portkit.lint.source import ClassFacts

EMBEDDINGS = ("Embedding", "VocabParallelEmbedding")


class AddEmbedInputIds(Rule):
    """Add the method `embed_input_ids`.

    ## What it does
    Reports a causal LM without `embed_input_ids(input_ids)`, and with it the model inside.

    ## Why vLLM wants it
    Prompts given as embeddings, speculative decoding and multi-modal wrappers embed tokens
    without running the layers. vLLM inspects the causal LM for the method and refuses it else.

    ## Example
        class ToyForCausalLM(nn.Module): ...

    ## Use instead
        def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.model.embed_input_ids(input_ids)

    ## Fix safety
    Unsafe: it returns the embedding as it is; a model that scales its embeddings (as Gemma does)
    must scale here too. Offered where the class has one embedding or one inner model.

    ## References
    - vLLM guide, Basic model: 2. Make your code compatible with vLLM, Computation Code
    - vllm/model_executor/models/interfaces_base.py
    """

    fix_safety = "unsafe"

    VALID = [
        Valid(
            """
            class ToyForCausalLM(nn.Module):
                def embed_input_ids(self, input_ids): ...
            """
        ),
        Valid("class ToyForCausalLM(LlamaForCausalLM):\n    pass\n"),
    ]
    INVALID = [
        Invalid(
            """
            class ToyModel(nn.Module):
                def __init__(self, config):
                    self.embed_tokens = nn.Embedding(config.vocab_size, 4)

            class ToyForCausalLM(nn.Module):
                def __init__(self, config):
                    self.model = ToyModel(config)
            """,
            line=1,
            count=2,
            names="ToyModel",
            fixed="""
            class ToyModel(nn.Module):
                def __init__(self, config):
                    self.embed_tokens = nn.Embedding(config.vocab_size, 4)

                def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
                    return self.embed_tokens(input_ids)

            class ToyForCausalLM(nn.Module):
                def __init__(self, config):
                    self.model = ToyModel(config)

                def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
                    return self.model.embed_input_ids(input_ids)
            """,
        ),
        Invalid("class ToyForCausalLM(nn.Module):\n    pass\n", line=1, names="ToyForCausalLM"),
    ]

    def visit_Module(self, node: cst.Module) -> None:
        top = self.source.top
        if top is None or "embed_input_ids" in top.methods or self._inherits(top):
            return
        for facts in (self.source.backbone, top):
            if facts is None or "embed_input_ids" in facts.methods or self._inherits(facts):
                continue
            body = self._body(facts)
            code = (
                "def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:\n"
                f"    return {body}\n"
            )
            self.report(
                facts.node,
                f"`{facts.name}` has no `embed_input_ids`: vLLM embeds tokens through it.",
                replacement=with_method(facts.node, code) if body else None,
            )

    def _inherits(self, facts: ClassFacts) -> bool:
        """True if the method may come from a base that vLLM brings (not Transformers)."""
        if any("MultiModal" in base for base in facts.bases):
            return True
        return facts.has_base_elsewhere and not any(
            base.startswith("transformers.") or base.endswith("PreTrainedModel")
            for base in facts.bases
        )

    def _body(self, facts: ClassFacts) -> str:
        inner = self.source.backbone
        if facts is self.source.top and inner is not None:
            names = [layer.attribute for layer in facts.layers if layer.name == inner.name]
            return f"self.{names[0]}.embed_input_ids(input_ids)" if len(names) == 1 else ""
        names = [
            layer.attribute
            for layer in facts.layers
            if layer.name in EMBEDDINGS and "vocab_size" in self.source.code(layer.call)
        ]
        return f"self.{names[0]}(input_ids)" if len(names) == 1 else ""
