"""Ports to measure on: the bundled Helium, drafted up to a step, in a folder that goes away."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from measure import Failed, Say

from portkit.create import new_port
from portkit.draft.pipeline import apply_draft
from portkit.port import Port

MODEL = "helium"
DRAFTED = ("copy", "forward", "parallel", "weights")
COMMENT = re.compile(r"\n# measured: .*\n\Z")


@contextmanager
def folder() -> Iterator[Path]:
    """Yield a folder for ports; it is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="portkit-budgets-") as path:
        yield Path(path)


def at(root: Path, step: str, say: Say) -> Port:
    """Return a new port of the model whose code is what the drafts up to this step make of it."""
    say(f"a port of {MODEL}, drafted up to {step}")
    port = new_port(MODEL, architecture=MODEL, root=root / step)
    for current in DRAFTED[: DRAFTED.index(step) + 1]:
        outcome = apply_draft(port, current)
        if outcome.status != "success":
            raise Failed(f"the draft of {current} failed: {outcome.reason}")
    return port


def edit(port: Port, number: int) -> None:
    """Edit the modeling file as a save in an editor does: its last line becomes another comment."""
    source = COMMENT.sub("\n", port.modeling.read_text(encoding="utf-8"))
    port.modeling.write_text(f"{source.rstrip()}\n\n# measured: {number}\n", encoding="utf-8")
