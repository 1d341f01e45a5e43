"""A checkpoint whose head is the embedding holds it once."""

from __future__ import annotations

import libcst as cst

from portkit.lint.finding import Invalid, PortContext, Valid
from portkit.lint.rule import Rule

TIES = PortContext(original_ties=True)


class TieTheLmHead(Rule):
    """Tie the LM head to the embedding when the config says so.

    ## What it does
    Reports a `ParallelLMHead` in a causal LM that never looks at `tie_word_embeddings`, if the
    copied code can tie (`_tied_weights_keys`); and tying without asking the config.

    ## Why vLLM wants it
    A tied checkpoint has no `lm_head.weight`. Untied in the model, the head keeps random numbers
    and nothing complains. Tied without asking, the real head of an untied checkpoint is lost.

    ## Example
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size)

    ## Use instead
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)

    ## Fix safety
    None: where the embedding is differs.

    ## References
    - vllm/model_executor/models/llama.py; vLLM issues 5621, 51063
    """

    VALID = [
        Valid(
            """
            class ToyForCausalLM(nn.Module):
                def __init__(self, config):
                    self.lm_head = ParallelLMHead(8, 4)
                    if config.tie_word_embeddings:
                        self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
            """,
            TIES,
        ),
        Valid(
            """
            class ToyForCausalLM(nn.Module):
                def __init__(self):
                    self.lm_head = ParallelLMHead(8, 4)
            """
        ),
    ]
    INVALID = [
        Invalid(
            """
            class ToyForCausalLM(nn.Module):
                def __init__(self):
                    self.lm_head = ParallelLMHead(8, 4)
            """,
            line=3,
            given=TIES,
            names="lm_head",
        ),
        Invalid(
            """
            class ToyForCausalLM(nn.Module):
                def __init__(self, config):
                    self.lm_head = ParallelLMHead(8, 4)
                    self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
            """,
            line=4,
            names="tie_weights",
            given=TIES,
        ),
    ]

    def visit_Module(self, node: cst.Module) -> None:
        top = self.source.top
        if top is None or "tie_word_embeddings" in top.text or not self.port.original_ties:
            return
        for layer in top.layers:
            if layer.name == "tie_weights":
                self.report(
                    layer.call,
                    f"`tie_weights` ties `{layer.attribute}` without asking: only if "
                    "config.tie_word_embeddings.",
                )
                return
        for layer in top.layers:
            if self.source.vllm_name(layer.call.func) == "ParallelLMHead":
                self.report(
                    layer.call,
                    f"`{layer.attribute}` is never tied, but checkpoints of this model may be: ask "
                    "config.tie_word_embeddings and call tie_weights.",
                )
