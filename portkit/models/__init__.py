"""The bundled tutorial models: which there are, and where their checkpoints lie.

Reads each model's `model.toml` and nothing else; imports neither torch nor transformers. How a
checkpoint is made is `recipe.py`.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class BundledModel:
    """One tutorial model that ships with portkit."""

    name: str
    """Its folder's name, e.g. "helium"."""
    architecture: str
    """The class name in Transformers, e.g. "HeliumForCausalLM"."""
    checkpoint: Path
    """The folder of config, tokenizer and safetensors shards."""
    prompts: tuple[str, ...]
    """Texts whose greedy continuation is legible and has healthy margins; of different lengths."""
    title: str
    about: str
    """What it is and what its shapes are for, in a few sentences."""


@cache
def bundled() -> tuple[str, ...]:
    """Return the names of the bundled models, in alphabetical order."""
    return tuple(sorted(path.parent.name for path in _HERE.glob("*/model.toml")))


@cache
def _read(name: str) -> BundledModel:
    folder = _HERE / name
    facts = tomllib.loads((folder / "model.toml").read_text(encoding="utf-8"))
    return BundledModel(
        name=facts["name"],
        architecture=facts["architecture"],
        checkpoint=folder / "checkpoint",
        prompts=tuple(facts["prompts"]),
        title=facts["title"],
        about=" ".join(facts["about"].split()),
    )


def find(name_or_architecture: str) -> BundledModel | None:
    """Return the bundled model of this name or architecture, or None if none is bundled."""
    for name in bundled():
        model = _read(name)
        if name_or_architecture in (model.name, model.architecture):
            return model
    return None
