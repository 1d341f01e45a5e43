"""Drafts of Transformers' models, made once for all tests that read them."""

import importlib
from functools import cache

from portkit.architectures import find_architecture
from portkit.draft.outcome import DraftOutcome
from portkit.draft.source_draft import draft_source_outcome
from portkit.lint.engine import lint_source
from portkit.lint.registry import rules_of
from portkit.steps.copy.extract import extract
from portkit.steps.copy.places import InTransformers

STEPS = ("forward", "parallel", "weights")


@cache
def copied(model: str) -> tuple[str, str]:
    """(architecture, source in the copy state) of one of Transformers' models."""
    found = find_architecture(model)
    code = extract(
        found.file.read_text(encoding="utf-8"),
        found.name,
        found.file.name,
        InTransformers(found.module),
    )
    return found.name, code.code


def drafted(source: str, architecture: str, step: str) -> DraftOutcome:
    module = importlib.import_module(f"portkit.steps.{step}.draft")
    return draft_source_outcome(source, architecture, step, "modeling.py", module.draft_source)


@cache
def states(model: str) -> dict[str, str]:
    """Source after each step, drafted one after the other."""
    architecture, source = copied(model)
    found = {"copy": source}
    for step in STEPS:
        outcome = drafted(source, architecture, step)
        assert outcome.status == "success", outcome.reason
        ((_, source),) = outcome.files
        found[step] = source
    return found


def assert_done(model: str) -> None:
    """No finding of the steps' rules is left, and drafting a drafted file changes nothing."""
    architecture, _ = copied(model)
    for step in STEPS:
        source = states(model)[step]
        rules = [rule for rule in rules_of(step) if rule.target == "modeling"]
        left = lint_source(source, "modeling.py", rules)
        assert [(f.rule, f.line, f.message) for f in left] == []
        assert drafted(source, architecture, step).status == "skipped"
