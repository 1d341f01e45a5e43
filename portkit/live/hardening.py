"""Weights of a random model that make mistakes show; see jobs/random_checkpoint.py.

Does not choose the config: sizes, eps, windows and multipliers are the job's.
"""

from __future__ import annotations

import torch

SEED = 20
SHARPEST = 10.0
"""Spread of an attention's scores: with the weights of `harden` and the usual scale it is 4 or 5.
Without a scale it is 20, and float32 alone moves the log-probabilities of 500 tokens by 1e-3."""

ACTIVATIONS = {"small": 0.02, "usual": 1.0, "large": 12.0}
"""Standard deviation of embeddings. Where they are small an eps shows, where they are large a sum
that overflows or loses its small part; between them everything else does."""


def harden(model: torch.nn.Module, spread: float) -> None:
    """Give every parameter values that a mistake with it would show in the output."""
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            noise = torch.randn(parameter.shape, generator=generator)
            tail = name.rsplit(".", 2)[-2:]
            if parameter.dim() <= 1 and tail[-1].endswith("bias"):
                parameter.copy_(0.2 * noise)
            elif parameter.dim() <= 1:
                parameter.add_(0.3 * noise)
            elif "embed" in name or "wte" in name or "wpe" in name:
                parameter.copy_(spread * noise)
            else:
                # Twice the usual spread: attention that is sharp, logits that are apart. But a
                # selective scan multiplies what x_proj makes (time step, B, C), and its rounding.
                sharp = 0.5 if "x_proj" in name else 2.0
                parameter.copy_(sharp * noise / max(parameter.shape[-1], 1) ** 0.5)
    for name, buffer in model.named_buffers():
        # Corrections of routing scores are kept as buffers, of zeros before training.
        if name.endswith("bias") and buffer.is_floating_point():
            with torch.no_grad():
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
    model.tie_weights()
    _fold_missing_scales(model)
    _soften_enlarged_queries(model)


def _fold_missing_scales(model: torch.nn.Module) -> None:
    """Where an attention has no scale of its own, let the query's weights hold it.

    So do trained weights of such models (GPT-Neo): their scores are no larger than others'.
    """
    unscaled = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "q_proj", None), torch.nn.Linear)
        and isinstance(getattr(module, "head_dim", None), int)
        and not any("scal" in name for name in vars(module))
    ]
    if not unscaled or _scores_spread(model) < SHARPEST:
        return
    with torch.no_grad():
        for module in unscaled:
            module.q_proj.weight.mul_(module.head_dim**-0.5)


def _soften_enlarged_queries(model: torch.nn.Module) -> None:
    """Where an attention enlarges its queries by factors beside its scale, make up for it.

    Longcat Flash does; else its scores are so sharp that float32 alone moves what it answers.
    """
    enlarged = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "q_b_proj", None), torch.nn.Linear)
        and any("scale" in n and isinstance(v, float) and v > 1 for n, v in vars(module).items())
    ]
    spread = _scores_spread(model) if enlarged else 0.0
    if spread < SHARPEST:
        return
    with torch.no_grad():
        for module in enlarged:
            module.q_b_proj.weight.mul_(SHARPEST / (2 * spread))


def _scores_spread(model: torch.nn.Module) -> float:
    """Mean standard deviation of the scores in a row of attention, 0.0 where none are returned.

    Scores are log-probabilities but for a constant.
    """
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(4, min(model.config.vocab_size, 500), (1, 48), generator=generator)
    implementation = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
        with torch.inference_mode():
            found = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(implementation)
    spreads = []
    for probabilities in found or ():
        for row in probabilities[0, :, -1] if probabilities is not None else ():
            seen = row[row > 0].log()
            spreads.append(float(seen.std()) if len(seen) > 1 else 0.0)
    return sum(spreads) / len(spreads) if spreads else 0.0
