"""Draft a step of a port, and apply a draft: each step's is `steps/<id>/draft.py: draft(port)`."""

from __future__ import annotations

import importlib
from importlib.util import find_spec

from portkit.curriculum import step as curriculum_step
from portkit.draft.outcome import DraftOutcome
from portkit.errors import PortkitError
from portkit.port import Port


def draft_step(port: Port, step_id: str) -> DraftOutcome:
    """Draft one step. Writes nothing, and raises nothing for what the reader's code contains."""
    step = curriculum_step(step_id)
    name = f"portkit.steps.{step.id}.draft"
    if find_spec(name) is None:
        return DraftOutcome(
            step.id,
            "skipped",
            reason=f"Step {step.id} changes no file, so there is nothing to draft.",
        )
    try:
        return importlib.import_module(name).draft(port)
    except PortkitError as error:
        return DraftOutcome(step.id, "failed", reason=str(error))
    except (OSError, UnicodeDecodeError) as error:
        return DraftOutcome(
            step.id, "failed", reason=f"{port.modeling.name} cannot be read: {error}."
        )
    except Exception as error:  # a fault of the draft itself must not cost the reader the notebook
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        place = (
            f"{trace.tb_frame.f_globals.get('__name__', '?')}, line {trace.tb_lineno}"
            if trace
            else "?"
        )
        return DraftOutcome(
            step.id,
            "failed",
            reason="The draft itself failed on this file "
            f"({type(error).__name__}: {error}; in {place}). "
            "Do the step by hand, and report the file: this is a fault of portkit.",
        )


def apply_draft(port: Port, step_id: str) -> DraftOutcome:
    """Draft one step and write it into the port; the old text is committed first, for undo."""
    outcome = draft_step(port, step_id)
    if outcome.status == "success":
        port.apply(
            {port.root / path: text for path, text in outcome.files}, f"draft of step {step_id}"
        )
    return outcome
