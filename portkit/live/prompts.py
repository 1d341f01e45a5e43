"""The prompts of the live checks: texts where there are any, and fixed pseudo-random token ids.

Texts keep the numbers close to real use; pseudo-random ids reach every part of the vocabulary.
The same port and checkpoint always give the same prompts. Imports neither torch nor vLLM.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

from portkit.errors import PortkitError
from portkit.live.checkpoint import Checkpoint
from portkit.models import find
from portkit.port import Port

SHORT = 48
"""Tokens: short prompts fit one engine step (profile.py, max_num_batched_tokens)."""
CELLS = 4_000_000
"""Most log-probabilities (tokens x vocabulary) that one prompt may ask the engine for."""


@dataclass(frozen=True)
class Prompts:
    """Token ids of the prompts that the checks use."""

    short: tuple[tuple[int, ...], ...]
    """Each is computed in one step."""
    ragged: tuple[tuple[int, ...], ...]
    """Different lengths, in an order that is neither rising nor falling; together one step."""
    long: tuple[int, ...]
    """Several chunks long."""
    far: tuple[int, ...]
    """Reaches, with `further` tokens more, the last position that the engine ever computes."""
    texts: tuple[str, ...]
    """The texts that short prompts were made of; empty if there was no tokenizer."""
    further: int = 4
    """Tokens generated after the far prompt: with the last of them max_model_len is full."""


def prompts_for(port: Port, checkpoint: Checkpoint, *, longest: int) -> Prompts:
    """Return the prompts for a port's checkpoint; `longest` is the engine's max_model_len."""
    if not isinstance(checkpoint.config.get("vocab_size"), int):
        raise PortkitError(
            'config.json does not say how many tokens the model knows: no "vocab_size".',
            str(checkpoint.root / "config.json"),
            "Copy the whole config.json of the model beside the weights.",
        )
    vocab = int(checkpoint.config["vocab_size"])
    texts = _texts(port, checkpoint)
    room = max(8, min(longest - 16, CELLS // vocab))
    short = [tuple(ids[:SHORT]) for ids in _tokenized(checkpoint, texts) if len(ids) > 1]
    short += [random_ids(vocab, n, seed=n) for n in (2, 17, 41)]
    far = max(8, longest - Prompts.further)
    return Prompts(
        short=tuple(short),
        ragged=tuple(random_ids(vocab, n, seed=100 + n) for n in (9, 3, 17, 1, 12, 5)),
        long=random_ids(vocab, min(200, room), seed=200),
        far=random_ids(vocab, far, seed=300),
        texts=texts,
    )


def noise_prompt(vocab: int) -> tuple[int, ...]:
    """Return the prompt on which a model's own rounding is measured."""
    return random_ids(vocab, SHORT, seed=48)


def random_ids(vocab: int, count: int, *, seed: int) -> tuple[int, ...]:
    """Return `count` token ids below `vocab`, the same for the same seed."""
    generator = random.Random(seed)
    return tuple(generator.randrange(vocab) for _ in range(count))


def texts_of(checkpoint: Checkpoint, ids: Iterable[int]) -> dict[str, str]:
    """Return what single token ids stand for, by str(id); {} without a tokenizer.json."""
    path = checkpoint.root / "tokenizer.json"
    if not path.is_file():
        return {}
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    return {str(i): tokenizer.decode([i], skip_special_tokens=False) for i in sorted(ids)}


def _texts(port: Port, checkpoint: Checkpoint) -> tuple[str, ...]:
    meta = port.meta
    given = meta.get("checkpoint", {}).get("prompts") or meta.get("port", {}).get("prompts") or ()
    if given:
        return tuple(str(text) for text in given)
    bundled = find(port.architecture)
    return bundled.prompts if bundled else ()


def _tokenized(checkpoint: Checkpoint, texts: tuple[str, ...]) -> list[list[int]]:
    path = checkpoint.root / "tokenizer.json"
    if not path.is_file() or not texts:
        return []
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    vocab = int(checkpoint.config["vocab_size"])
    return [[i for i in tokenizer.encode(text).ids if i < vocab] for text in texts]
