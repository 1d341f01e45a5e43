"""The checkpoint that a reader gives for a new port: is it whole, and of which architecture?

The safetensors side is `portkit.live.checkpoint` (headers only, no tensor is read). Here is what
only a new port asks: the configuration alone, and whether the weights are pickles.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portkit.errors import PortkitError
from portkit.live.checkpoint import PICKLES, open_checkpoint


@dataclass(frozen=True)
class Given:
    """A checked checkpoint folder."""

    folder: Path
    config: dict[str, Any]
    pickles: tuple[str, ...] = ()
    """Names of its weight files, if they are pickles."""

    @property
    def architecture(self) -> str:
        return str(self.config["architectures"][0])


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a checkpoint; PortkitError if there is none or it is no JSON object."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise PortkitError(
            f"There is no checkpoint folder {str(folder)!r}.",
            "--checkpoint",
            "Give the folder of a downloaded checkpoint; portkit downloads nothing by itself.",
        )
    if not path.is_file():
        raise PortkitError(
            "The checkpoint has no config.json.",
            str(path),
            "Copy config.json of the model beside the weights: it names the architecture.",
        )
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, OSError) as error:
        raise PortkitError(
            f"config.json cannot be read: {error}.", str(path), "Correct it, or download it again."
        ) from error
    if not isinstance(config, dict):
        raise PortkitError(
            f"config.json holds a {type(config).__name__}, not an object.", str(path), "Correct it."
        )
    return config


def read_checkpoint(folder: Path, *, allow_pickle: bool = False) -> Given:
    """Check a checkpoint folder and return what it is; each fault is its own PortkitError."""
    config = read_config(folder)
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise PortkitError(
            'config.json does not say which class the weights are of: no "architectures".',
            str(folder / "config.json"),
            'Add it, e.g. "architectures": ["HeliumForCausalLM"]; vLLM chooses the class by it.',
        )
    if not config.get("model_type") and "auto_map" not in config:
        raise PortkitError(
            'config.json does not say which configuration it is: no "model_type".',
            str(folder / "config.json"),
            'Add it, e.g. "model_type": "helium", or copy the whole config.json of the model.',
        )
    pickles = tuple(sorted(path.name for kind in PICKLES for path in folder.glob(kind)))
    if pickles and not any(folder.glob("*.safetensors*")):
        if not allow_pickle:
            raise PortkitError(
                f"The checkpoint is a pickle ({pickles[0]}); loading one can run code in it.",
                str(folder / pickles[0]),
                "If you trust whoever made it, say so, and the port gets a safetensors copy: "
                "--allow-pickle.",
            )
        return Given(folder, config, pickles)
    open_checkpoint(folder)
    return Given(folder, config)
