"""Every rule proves itself: its own VALID and INVALID cases, its documentation, its room."""

from __future__ import annotations

import re

import libcst as cst
import pytest

from portkit.curriculum import steps
from portkit.lint.document import render
from portkit.lint.engine import fix_source, lint_source
from portkit.lint.registry import all_rules, rules_of
from portkit.lint.rule import HEADINGS, Rule

VALID = [
    pytest.param(rule, case, id=f"{rule.id}-valid-{n}")
    for rule in all_rules()
    for n, case in enumerate(rule.VALID)
]
INVALID = [
    pytest.param(rule, case, id=f"{rule.id}-invalid-{n}")
    for rule in all_rules()
    for n, case in enumerate(rule.INVALID)
]
EACH = pytest.mark.parametrize("rule", all_rules(), ids=lambda rule: rule.id)


@pytest.mark.parametrize(("rule", "case"), VALID)
def test_valid_code_is_left_in_peace(rule, case):
    assert lint_source(case.code, "x.py", [rule], case.given) == []
    assert fix_source(case.code, [rule], case.given) == (case.code, [])


@pytest.mark.parametrize(("rule", "case"), INVALID)
def test_invalid_code_is_reported_and_fixed(rule, case):
    found = lint_source(case.code, "x.py", [rule], case.given)
    assert [f.crashed for f in found] == [False] * case.count, [f.message for f in found]
    assert found[0].line == case.line, found[0]
    assert found[0].message.strip()
    assert all(f.rule == rule.id and f.step == rule.step for f in found)
    written = case.code.splitlines()[case.line - 1]
    named = case.names or "|".join(map(re.escape, re.findall(r"\w{2,}", written)))
    pattern = re.escape(case.names) if case.names else named
    assert re.search(pattern, found[0].message), (pattern, found[0].message)

    new, fixed = fix_source(case.code, [rule], case.given)
    if case.fixed is None:
        assert (new, fixed) == (case.code, []), "a case without `fixed` has no fix"
        assert all(f.fix == "none" for f in found)
        return
    assert new == case.fixed
    if rule.target != "pyproject":
        cst.parse_module(new)
    left = lint_source(new, "x.py", [rule], case.given)
    assert [f for f in left if f.fix != "none"] == []
    assert left == [], "a fixed case is clean"
    assert fix_source(new, [rule], case.given) == (new, [])


@EACH
def test_rule_is_complete(rule: type[Rule]):
    parts = rule.headings()
    assert parts[""].endswith(".") and "\n" not in parts[""], "one summary sentence"
    assert tuple(h for h in parts if h) == HEADINGS
    assert all(parts[heading] for heading in HEADINGS)
    assert len(rule.VALID) >= 2 and len(rule.INVALID) >= 2
    assert rule.step in {s.id for s in steps()} and rule in rules_of(rule.step)
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", rule.id)
    fixes = any(case.fixed is not None for case in rule.INVALID)
    assert fixes == (rule.fix_safety != "none"), "fix_safety says what the cases show"
    expected = {"safe": "Safe", "unsafe": "Unsafe", "none": "None"}[rule.fix_safety]
    assert parts["Fix safety"].startswith(expected)


def test_rule_ids_are_unique():
    ids = [rule.id for rule in all_rules()]
    assert len(ids) == len(set(ids))


def test_every_rule_file_stays_small():
    for step in steps():
        for path in (step.room / "rules").glob("*.py"):
            assert len(path.read_text().splitlines()) <= 200, path


def test_documentation_is_fresh():
    from portkit.lint.document import PATH

    assert PATH.read_text() == render(), (
        "docs/rules.md is stale: run `python -m portkit.lint.document`"
    )
