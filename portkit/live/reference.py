"""The Transformers side of every comparison: float32, eager attention, one prompt at a time.

Answers are kept on disk under `.portkit/cache`, by checkpoint, versions and prompt, so that an
edit of the port does not pay for them again. Nothing of the port is imported here.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
import transformers
from torch import nn

from portkit.errors import PortkitError
from portkit.live.checkpoint import Checkpoint
from portkit.live.profile import MOST, Profile
from portkit.port import Port, write_atomically

if TYPE_CHECKING:
    from portkit.live.parity import Comparison

SMALL = 256 << 20
"""Bytes of weights below which one thread is fastest."""
ATTENTION = "eager"
SECOND_COPY = 100_000_000
"""The most parameters that are copied to float64, to measure rounding."""


class Reference:
    """Transformers' class on a checkpoint; the model is loaded when something is not cached yet."""

    def __init__(self, port: Port, checkpoint: Checkpoint, *, device: str = "cpu") -> None:
        self.port = port
        self.checkpoint = checkpoint
        self.device = device
        self.folder = port.state_dir / "cache"
        self.key = "-".join(
            (checkpoint.fingerprint, transformers.__version__, torch.__version__, device)
        )

    @cached_property
    def model_class(self) -> type:
        """The original class, from the installed Transformers."""
        return original_class(self.port)

    @cached_property
    def model(self) -> nn.Module:
        """The model, float32, in eval mode."""
        return load_model(self.model_class, self.checkpoint, self.device)

    def logprobs(self, ids: Sequence[int]) -> np.ndarray:
        """Return float32 [n, vocab]: log-probabilities after each of the n tokens."""
        return self._cached("rows", ids, lambda: {"rows": self._rows(ids)})["rows"]

    def greedy(self, ids: Sequence[int], count: int) -> tuple[tuple[int, ...], np.ndarray]:
        """Return `count` greedy tokens and float32 [count, vocab], each row teacher-forced anew.

        No cache is used: this is the definition that a cache has to agree with.
        """

        def compute() -> dict[str, np.ndarray]:
            tokens: list[int] = []
            rows = []
            for _ in range(count):
                row = self._rows([*ids, *tokens])[-1]
                rows.append(row)
                tokens.append(int(row.argmax()))
            return {"tokens": np.asarray(tokens, np.int64), "rows": np.stack(rows)}

        found = self._cached(f"greedy{count}", ids, compute)
        return tuple(int(t) for t in found["tokens"]), found["rows"]

    def noise(self, ids: Sequence[int]) -> float:
        """Return how far float32 itself is from float64, as a log-probability on this prompt.

        It tells how much two right ways of computing may differ with these very weights. inf for a
        model too large to hold a second time.
        """

        def compute() -> dict[str, np.ndarray]:
            if sum(p.numel() for p in self.model.parameters()) > SECOND_COPY:
                return {"rows": np.asarray([np.inf])}
            exact = copy.deepcopy(self.model).double()
            with torch.inference_mode():
                logits = exact(input_ids=self._tensor(ids)[None], use_cache=False).logits[0]
                rows = torch.log_softmax(logits.double(), -1).cpu().numpy()
            return {"rows": np.abs(rows - self._rows(ids)).max(keepdims=True)}

        try:
            return float(self._cached("noise", ids, compute)["rows"].max())
        except Exception:  # some models convert to float32 and cannot mix the two
            return float("inf")

    def second_look(self, found: Comparison, ids: Sequence[int], profile: Profile) -> Comparison:
        """Return a comparison judged again, if it failed by little, by the noise of these tokens.

        Rounding adds up along a prompt, most of all in a recurrent state: the noise that the usual
        tolerance comes from is that of one short prompt.
        """
        if found.ok or not found.max_abs <= MOST:
            return found
        noise = self.noise(ids)
        limit = profile.measured(noise).value
        if found.max_abs > limit:
            return found
        name = f"{found.name} (float32 itself is {noise:.0e} off here: {limit:.0e} allowed)"
        return replace(found, name=name, ok=True, beyond=0, first_rows_ok=found.rows)

    def embeddings(self, ids: Sequence[int]) -> torch.Tensor:
        """Return float32 [n, hidden]: the `inputs_embeds` of these tokens, on the CPU."""

        def compute() -> dict[str, np.ndarray]:
            with torch.inference_mode():
                return {"rows": self.model.get_input_embeddings()(self._tensor(ids)).cpu().numpy()}

        return torch.from_numpy(self._cached("embeddings", ids, compute)["rows"])

    def _rows(self, ids: Sequence[int]) -> np.ndarray:
        with torch.inference_mode():
            logits = self.model(input_ids=self._tensor(ids)[None], use_cache=False).logits[0]
            return torch.log_softmax(logits.float(), -1).cpu().numpy()

    def _tensor(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor(list(ids), dtype=torch.int64, device=self.device)

    def _cached(
        self,
        kind: str,
        ids: Sequence[int],
        compute: Callable[[], dict[str, np.ndarray]],
    ) -> dict[str, np.ndarray]:
        digest = hashlib.sha256(f"{self.key} {kind} {list(ids)}".encode()).hexdigest()[:24]
        path = self.folder / f"reference-{digest}.npz"
        if path.is_file():
            try:
                with np.load(path) as stored:
                    return {name: stored[name] for name in stored.files}
            except (OSError, ValueError, EOFError):
                path.unlink(missing_ok=True)
        found = compute()
        _save(path, found)
        return found


def original_class(port: Port) -> type:
    """Return the class being ported, as Transformers (or the reader's own source) defines it."""
    source = port.meta.get("source", {})
    if source.get("kind") == "file":
        return _class_in_file(port, port.root / "original" / str(source["original"]))
    cls = getattr(transformers, port.architecture, None)
    if not isinstance(cls, type):
        raise PortkitError(
            f"Transformers {transformers.__version__} has no class {port.architecture} to "
            f"compare with.",
            str(port.root / "port.toml"),
            "Give the original modeling file: portkit new --source FILE.py.",
        )
    return cls


def one_thread_if_small(checkpoint: Checkpoint) -> None:
    """Let PyTorch compute a small model on one thread of the CPU.

    Two threads wait longer for each other than a small product takes, above all on a busy machine.
    """
    if sum(tensor.bytes for tensor in checkpoint.tensors) < SMALL:
        torch.set_num_threads(1)


def load_model(
    cls: type, checkpoint: Checkpoint, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Load a Transformers class on a checkpoint: float32, eager attention, eval mode."""
    _same_names(cls, checkpoint)
    if device == "cpu":
        one_thread_if_small(checkpoint)
    model, info = cls.from_pretrained(
        str(checkpoint.root),
        dtype=dtype,
        attn_implementation=ATTENTION,
        local_files_only=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # said below, in words
    )
    wrong = sorted(info.get("mismatched_keys", ()), key=str)
    if wrong:
        name, stored, wanted = wrong[0]
        raise PortkitError(
            f"{len(wrong)} tensors of the checkpoint have another shape than config.json says, "
            f"e.g. {name}: {list(stored)} in the shards, {list(wanted)} by the configuration.",
            str(checkpoint.root / "config.json"),
            "Config and shards are of different models: copy both from the same one.",
        )
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise PortkitError(
            f"The checkpoint lacks {len(missing)} tensors that {cls.__name__} needs: "
            f"{', '.join(missing[:4])}.",
            str(checkpoint.root),
            "Use a whole checkpoint: the reference would be random there.",
        )
    return model.to(device).eval()


def _same_names(cls: type, checkpoint: Checkpoint) -> None:
    """Let a copied class be loaded by the conversions (stacked experts) of the original.

    Transformers applies its table of checkpoint names to classes of its own only, unless they are
    registered. Its keys are model types and names of classes.
    """
    try:
        from transformers import conversion_mapping as table
    except ImportError:  # an older Transformers has no such table, and needs none
        return
    for key in (str(checkpoint.config.get("model_type", "")), cls.__name__):
        found = table.get_checkpoint_conversion_mapping(key)
        if found:
            table.register_checkpoint_conversion_mapping(key, found, overwrite=True)


def _class_in_file(port: Port, path: Path) -> type:
    """Import the reader's original as a module of a package, so that it finds what is beside it."""
    name = f"portkit_original_{port.name}"
    package = ModuleType(name)
    package.__path__ = [str(path.parent)]
    sys.modules[name] = package
    importlib.invalidate_caches()
    return getattr(importlib.import_module(f"{name}.{path.stem}"), port.architecture)


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, stream.getvalue())
