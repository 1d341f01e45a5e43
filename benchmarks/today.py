"""What people do today with a fresh port: start vLLM, and compare 16 greedy tokens.

Runs inside the worker, copied into the port's folder, on a checkpoint as Transformers initialises
it. vLLM's own loading check is on; nothing of portkit's is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from portkit.live.checkpoint import open_checkpoint
from portkit.live.engine import start
from portkit.live.prompts import random_ids
from portkit.live.reference import Reference
from portkit.port import Port

PROMPT, TOKENS = 12, 16


def greedy(say: Callable[[str], None], *, root: str, checkpoint: str) -> dict[str, Any]:
    """Return {"started", "same", "error"} for one prompt of 12 tokens."""
    opened = open_checkpoint(Path(checkpoint))
    found: dict[str, Any] = {"started": False, "same": False, "error": ""}
    try:
        with start(Path(root), loader="port", checkpoint=opened.root) as engine:
            found["started"] = True
            ids = random_ids(engine.vocab_size, PROMPT, seed=PROMPT)
            tokens = engine.generate([ids], TOKENS)[0].tokens
            expected, _ = Reference(Port(Path(root)), opened).greedy(ids, TOKENS)
            found["same"] = tuple(tokens) == tuple(expected)
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"[:300]
    return found
