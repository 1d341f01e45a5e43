"""Makes the small checkpoint of a tutorial model from its `model.toml`: train, season, save.

Works for any causal language model of Transformers; everything that differs between models is data
in their toml. The weights are seasoned before training: norm weights are spread around one and
biases around zero, so that a port which drops, swaps or misplaces one of them gives other logits,
as it would with a real checkpoint. With one seed, one machine and one number of threads the result
is the same to the bit; another CPU rounds differently and ends at weights that are as good.
"""

from __future__ import annotations

import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from portkit.errors import PortkitError
from portkit.models import bundled
from portkit.models.corpus import pieces
from portkit.models.rows import Rows
from portkit.models.tokenizer import train_tokenizer


@dataclass(frozen=True)
class Training:
    """The `[training]` table of a model.toml."""

    seed: int
    steps: int
    batch: int
    """Pieces per step."""
    learning_rate: float
    """The peak; a tenth of the steps warm up to it and the rest falls to zero along a cosine."""
    noise: float
    """Share of the input tokens that are replaced by random ones, so that the model learns to go on
    from a prompt which it has never seen."""
    excerpts: float
    """Share of the rows that begin at the start of some sentence, and not with the title."""
    norm_spread: float
    """Standard deviation, around one, of the norm weights before training."""
    bias_spread: float
    """Standard deviation, around zero, of the biases before training."""
    shard_size: str
    """The most one safetensors file holds, as in `save_pretrained(max_shard_size=...)`."""
    dtype: str = "float32"
    """What the weights are rounded to when they are saved."""


@dataclass(frozen=True)
class Recipe:
    """All that makes one checkpoint."""

    architecture: str
    config: dict[str, Any]
    """Keyword arguments of the architecture's config class, without the special tokens' ids."""
    tokenizer: dict[str, Any]
    """`special_tokens` in the order of their ids, and which are `bos`, `eos` and `pad`."""
    corpus: tuple[str, ...]
    """File names in portkit/models/corpus."""
    training: Training


@dataclass(frozen=True)
class Progress:
    """One line of a training run."""

    step: int
    steps: int
    loss: float
    """Mean cross-entropy per token of this step's batch, in nats."""
    seconds: float


def load_recipe(name: str) -> Recipe:
    """Read the recipe of a bundled model."""
    if name not in bundled():
        raise PortkitError(
            f"no bundled model is called {name!r}",
            "portkit/models",
            f"name one of: {', '.join(bundled())}",
        )
    path = Path(__file__).parent / name / "model.toml"
    facts = tomllib.loads(path.read_text(encoding="utf-8"))
    tokenizer = dict(facts["tokenizer"])
    return Recipe(
        architecture=facts["architecture"],
        config=facts["config"],
        corpus=tuple(tokenizer.pop("corpus")),
        tokenizer=tokenizer,
        training=Training(**facts["training"]),
    )


def make(
    recipe: Recipe,
    out: Path,
    *,
    steps: int | None = None,
    progress: Callable[[Progress], None] = lambda line: None,
) -> None:
    """Train the model on this machine's CPU and write checkpoint and tokenizer into `out`.

    `steps` shortens the run. `out` is made if missing and must be empty of safetensors. Raises
    PortkitError if it is not, or if `steps` is below one.
    """
    if steps is not None and steps < 1:
        raise PortkitError(f"cannot train for {steps} steps", next="ask for one or more")
    if out.exists() and any(out.glob("*.safetensors")):
        raise PortkitError("the folder already holds a checkpoint", str(out), "name another folder")
    plan = recipe.training
    torch.manual_seed(plan.seed)
    texts = pieces(recipe.corpus)
    tokenizer = train_tokenizer(
        texts,
        vocab_size=recipe.config["vocab_size"],
        max_length=recipe.config.get("max_position_embeddings") or recipe.config["max_seq_len"],
        **recipe.tokenizer,
    )
    model = build(recipe, tokenizer)
    season(model, plan)
    train(model, Rows(tokenizer, texts, plan), plan, steps or plan.steps, progress)
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    model.to(getattr(torch, plan.dtype)).save_pretrained(out, max_shard_size=plan.shard_size)
    # The template goes into tokenizer_config.json: one file less to forget when copying.
    tokenizer.save_pretrained(out, save_jinja_files=False)


def build(recipe: Recipe, tokenizer: transformers.PreTrainedTokenizerFast) -> nn.Module:
    """Return the untrained float32 model, its special ids those of the tokenizer."""
    model_class = getattr(transformers, recipe.architecture)
    config = model_class.config_class(
        **recipe.config,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model_class(config).float()


@torch.no_grad()
def season(model: nn.Module, plan: Training) -> None:
    """Spread the norm weights around one and the biases around zero."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(0.0, plan.bias_spread)
        elif parameter.ndim == 1:
            parameter.normal_(1.0, plan.norm_spread)


def train(
    model: nn.Module,
    rows: Rows,
    plan: Training,
    steps: int,
    progress: Callable[[Progress], None],
) -> None:
    """Fit the model to the rows with AdamW, in place."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": 0.01},
            # A norm weight that decays to nothing would make the checkpoint trivial.
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=plan.learning_rate,
        betas=(0.9, 0.98),
    )
    warmup = max(1, steps // 10)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    batches = rows.batches()
    started = time.monotonic()
    model.train()
    for step in range(1, steps + 1):
        ids, labels = next(batches)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step == steps or step % max(1, steps // 20) == 0:
            progress(Progress(step, steps, loss.item(), time.monotonic() - started))
    model.eval()
