"""Finds the rules: one file each under steps/<id>/rules/. The folder is the selection."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cache

from portkit.curriculum import step, steps
from portkit.errors import PortkitError
from portkit.lint.rule import Rule, TextRule


@cache
def rules_of(step_id: str) -> tuple[type[Rule], ...]:
    """Return the rules of one step, in the order of their files' names."""
    package = importlib.import_module(f"portkit.steps.{step(step_id).id}.rules")
    found: list[type[Rule]] = []
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        found += [
            value
            for value in vars(module).values()
            if inspect.isclass(value)
            and issubclass(value, Rule)
            and value not in (Rule, TextRule)
            and value.__module__ == module.__name__
        ]
    return tuple(found)


@cache
def all_rules() -> tuple[type[Rule], ...]:
    """Return every rule in the order of the steps."""
    return tuple(rule for s in steps() for rule in rules_of(s.id))


def rule(rule_id: str) -> type[Rule]:
    """Return the rule with this id; PortkitError with the closest names if there is none."""
    for candidate in all_rules():
        if candidate.id == rule_id:
            return candidate
    import difflib

    names = [candidate.id for candidate in all_rules()]
    close = difflib.get_close_matches(rule_id, names, n=3, cutoff=0.4) or names[:3]
    raise PortkitError(
        f"There is no rule {rule_id!r}.",
        "docs/rules.md lists all rules",
        f"Did you mean: {', '.join(close)}?",
    )
