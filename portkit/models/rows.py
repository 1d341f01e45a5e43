"""Turns the corpus into batches to train on: whole pieces and excerpts, some tokens made wrong."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from portkit.models.recipe import Training

_IGNORED = -100
"""The label that Transformers' loss skips."""
_SENTENCE = re.compile(r"(?<=[.?!\"]) (?=[A-Z\"])|\n\n")


class Rows:
    """An endless supply of batches, the same for the same seed."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, texts: tuple[str, ...], plan: Training
    ) -> None:
        self.tokenizer = tokenizer
        self.texts = texts
        self.plan = plan

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (ids, labels), int64 [plan.batch or fewer, length], passing over all the texts.

        Rows of like length go together. Padding stands on the right, where causal attention needs
        no mask for it.
        """
        dice = random.Random(self.plan.seed)
        size = self.plan.batch
        while True:
            rows = sorted((self._row(text, dice) for text in self.texts), key=len)
            groups = [rows[i : i + size] for i in range(0, len(rows), size)]
            dice.shuffle(groups)
            for group in groups:
                ids = [self._disturb(row, dice) for row in group]
                yield (
                    pad_sequence(ids, batch_first=True, padding_value=self.tokenizer.pad_token_id),
                    pad_sequence(group, batch_first=True, padding_value=_IGNORED),
                )

    def _row(self, text: str, dice: random.Random) -> torch.Tensor:
        """Return a text, or the rest of it from some sentence on, from bos to eos."""
        if dice.random() < self.plan.excerpts:
            text = text[dice.choice([match.end() for match in _SENTENCE.finditer(text)]) :]
        return torch.tensor([*self.tokenizer(text)["input_ids"], self.tokenizer.eos_token_id])

    def _disturb(self, row: torch.Tensor, dice: random.Random) -> torch.Tensor:
        """Return the row with some tokens replaced; the labels keep the true ones."""
        ids = row.clone()
        ordinary = range(len(self.tokenizer.all_special_ids), len(self.tokenizer))
        for place in range(1, len(ids) - 1):
            if dice.random() < self.plan.noise:
                ids[place] = dice.choice(ordinary)
        return ids
