"""Drafts of decoders whose layers, embeddings or heads differ among each other."""

import pytest
from drafting import assert_done, copied, drafted, states

MODELS = ("modernbert-decoder",)
WRITTEN = [
    # The embedding is in a module that norms it, and a prediction head comes before the logits.
    ("modernbert-decoder", "forward", "return self.embeddings.tok_embeddings(input_ids)"),
    ("modernbert-decoder", "weights", "self.tok_embeddings = VocabParallelEmbedding("),
    ("modernbert-decoder", "weights", 'prefix=f"{prefix}.embeddings",'),
    ("modernbert-decoder", "weights", "self.dense = ColumnParallelLinear("),
    ("modernbert-decoder", "weights", 'prefix=maybe_prefix(prefix, "lm_head"),'),
    (
        "modernbert-decoder",
        "weights",
        "tie_weights(\n                    self.model.embeddings.tok",
    ),
    # Angles by the type of the layer, None for types that do not rotate: a table decides it.
    (
        "cohere_compass_text",
        "forward",
        "if config.rope_parameters[config.layer_types[layer_idx]] is not None",
    ),
    ("cohere_compass_text", "weights", "if self.rotary_emb is not None:"),
]


@pytest.mark.parametrize("model", MODELS)
def test_drafts_satisfy_the_rules_and_are_done(model: str) -> None:
    assert_done(model)


@pytest.mark.parametrize(("model", "step", "text"), WRITTEN)
def test_what_differs_is_kept(model: str, step: str, text: str) -> None:
    assert text in states(model)[step]


def test_experts_that_a_cpu_cannot_check_are_named() -> None:
    architecture, _ = copied("nemotron_h")
    outcome = drafted(states("nemotron_h")["forward"], architecture, "parallel")
    assert [w for w in outcome.warnings if "NemotronHExperts: experts without a gate" in w]
