"""What holds for every modeling file in scope: it survives reading, linting, fixing, drafting.

All of them take many minutes; a run takes a part, in turn by the day. PORTKIT_ALL=1 takes all.
"""

from __future__ import annotations

import datetime
import os
from functools import cache

import libcst as cst
import pytest

from portkit.architectures import causal_architectures, find_architecture, in_scope
from portkit.draft.source_draft import draft_source_outcome
from portkit.lint.engine import fix_source, lint_source
from portkit.lint.registry import rules_of
from portkit.steps.copy.extract import extract
from portkit.steps.copy.places import InTransformers
from portkit.steps.forward.draft import draft_source as draft_forward
from portkit.steps.parallel.draft import draft_source as draft_parallel
from portkit.steps.weights.draft import draft_source as draft_weights

PARTS = 12
DRAFTS = {"forward": draft_forward, "parallel": draft_parallel, "weights": draft_weights}


def in_turn() -> list[str]:
    names = list(in_scope())
    if os.environ.get("PORTKIT_ALL"):
        return names
    return names[datetime.date.today().toordinal() % PARTS :: PARTS]


@cache
def copied(name: str) -> str:
    found = find_architecture(name)
    text = found.file.read_text(encoding="utf-8")
    return extract(text, found.name, found.file.name, InTransformers(found.module)).code


def test_the_scope_follows_transformers_tables() -> None:
    scope = in_scope()
    assert 100 < len(scope) < len(causal_architectures())
    for name in ("LlamaForCausalLM", "GPT2LMHeadModel", "XGLMForCausalLM", "Llama4ForCausalLM"):
        assert name in scope
    for name in ("BartForCausalLM", "BertLMHeadModel", "GitForCausalLM", "TrOCRForCausalLM"):
        assert name not in scope


@pytest.mark.parametrize("name", in_turn())
def test_reading_and_writing_changes_nothing(name: str) -> None:
    source = find_architecture(name).file.read_text(encoding="utf-8")
    assert cst.parse_module(source).code == source
    assert cst.parse_module(copied(name)).code == copied(name)


@pytest.mark.parametrize("name", in_turn())
def test_no_rule_crashes_and_fixing_twice_is_fixing_once(name: str) -> None:
    for step in ("copy", *DRAFTS):
        rules = [rule for rule in rules_of(step) if rule.target == "modeling"]
        found = lint_source(copied(name), "modeling.py", rules)
        assert not [f for f in found if f.crashed]
        fixed, _ = fix_source(copied(name), rules)
        cst.parse_module(fixed)
        assert fix_source(fixed, rules)[0] == fixed


@pytest.mark.parametrize("name", in_turn())
def test_a_draft_succeeds_or_says_what_is_in_the_way(name: str) -> None:
    """No exception leaves it, whatever the model: a result, or a reason with words in it."""
    source = copied(name)
    for step, drafting in DRAFTS.items():
        outcome = draft_source_outcome(source, name, step, "modeling.py", drafting)
        if outcome.status == "failed":
            assert len(outcome.reason.split()) > 4
            return
        for _, source in outcome.files:
            cst.parse_module(source)
