"""Runs rules over a port's files and applies their fixes.

One parse and one walk serve all rules of a file. A rule that crashes ends as a finding that names
it; a file that does not parse is one PortkitError with line and column. Imports neither torch nor
vLLM.
"""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterable, Sequence
from pathlib import Path

import libcst as cst

from portkit.curriculum import steps
from portkit.errors import PortkitError
from portkit.lint.context import port_context
from portkit.lint.edits import ReplaceNodes, add_imports, drop_unused
from portkit.lint.finding import Finding, PortContext
from portkit.lint.registry import rule as rule_by_id
from portkit.lint.registry import rules_of
from portkit.lint.rule import Report, Rule, Target, TextRule
from portkit.lint.source import Source, must_parse
from portkit.port import Port

ROUNDS = 20
"""Fixing stops here even if rules keep undoing each other; a test holds every rule to 2."""

IGNORE = re.compile(r"#\s*portkit:\s*ignore\[([\w\-, ]+)\]\s*(.*)")


def findings(port: Port, step_id: str | None = None) -> list[Finding]:
    """Return the findings of one step, or of all steps due (those passed and the next one).

    PortkitError if a file of the port does not parse, also where no rule is due: "no tasks" would
    be untrue.
    """
    context = port_context(port)
    found: list[Finding] = []
    for target, path in _files(port).items():
        rules = [rule for rule in due_rules(port, step_id) if rule.target == target]
        if not path.exists():
            continue
        text, relative = _read(path), path.relative_to(port.root).as_posix()
        if rules:
            found += lint_source(text, relative, rules, context)
        elif path.suffix == ".py":
            must_parse(text, relative)
    return found


def due_rules(port: Port, step_id: str | None = None) -> tuple[type[Rule], ...]:
    """The rules of a step; without one, those of the steps passed and of the next step."""
    if step_id is not None:
        return rules_of(step_id)
    passed = port.steps_passed()
    due: list[type[Rule]] = []
    for step in steps():
        due += rules_of(step.id)
        if step.id not in passed:
            break
    return tuple(due)


def lint_source(
    source: str, path: str, rules: Iterable[type[Rule]], context: PortContext | None = None
) -> list[Finding]:
    """Return what the rules find in a text, in the order of its lines.

    Raises PortkitError if the text does not parse.
    """
    ignored = _ignored(source)
    found = [
        finding
        for rule, report in _run(source, path, rules, context)
        if (finding := _finding(rule, report, path, ignored)) is not None
    ]
    return sorted(found, key=lambda f: (f.line, f.column, f.rule))


def fix_source(
    source: str,
    rules: Iterable[type[Rule]],
    context: PortContext | None = None,
    *,
    path: str = "",
    unsafe: bool = True,
) -> tuple[str, list[Finding]]:
    """Apply the rules' fixes until none is left; return the new text and what was fixed.

    A text without anything to fix comes back byte for byte. `unsafe=False` leaves out fixes that
    a person should read.
    """
    rules = [r for r in rules if r.fix_safety == "safe" or (unsafe and r.fix_safety == "unsafe")]
    fixed: list[Finding] = []
    for _ in range(ROUNDS):
        ignored = _ignored(source)
        todo = []
        for rule, report in _run(source, path, rules, context):
            finding = _finding(rule, report, path, ignored)
            if finding is not None and report.fixable:
                todo.append((finding, report))
        if not todo:
            break
        new, done = _apply(source, [report for _, report in todo])
        if new == source:
            break
        source = new
        fixed += [finding for finding, report in todo if any(report is d for d in done)]
    return source, fixed


def fix(port: Port, rule: str | None = None, unsafe: bool = False) -> list[Finding]:
    """Fix the port's files (one rule, or all due); the old text is committed first, see `undo`.

    Naming a rule is consent to its fix, safe or not. Returns what was fixed. Raises PortkitError
    for a file that does not parse, and for a named rule without a fix.
    """
    rules = (rule_by_id(rule),) if rule else due_rules(port)
    if rule and rules[0].fix_safety == "none":
        raise PortkitError(
            f"The rule {rule} has no fix: it takes a person to decide.",
            f"docs/rules.md#{rule}",
            f"`portkit hint {rule}` helps with the edit.",
        )
    unsafe = unsafe or rule is not None
    context = port_context(port)
    changed: dict[Path, str | bytes] = {}
    fixed: list[Finding] = []
    for target, path in _files(port).items():
        chosen = [r for r in rules if r.target == target]
        if not path.exists():
            continue
        old, relative = _read(path), path.relative_to(port.root).as_posix()
        if path.suffix == ".py":
            must_parse(old, relative)
        new, done = fix_source(old, chosen, context, path=relative, unsafe=unsafe)
        if new != old:
            changed[path] = new.encode()
            fixed += done
    if changed:
        port.apply(changed, f"fix {rule or 'all'} ({len(fixed)})")
    return fixed


def _files(port: Port) -> dict[Target, Path]:
    return {
        "modeling": port.modeling,
        "init": port.init_file,
        "pyproject": port.root / "pyproject.toml",
    }


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise PortkitError(
            f"{path.name} is not UTF-8 text: byte {error.start} cannot be read.",
            str(path),
            "Save the file as UTF-8 in your editor.",
        ) from error


def _run(
    text: str, path: str, rules: Iterable[type[Rule]], context: PortContext | None
) -> list[tuple[type[Rule], Report | Exception]]:
    rules = list(rules)
    results: list[tuple[type[Rule], Report | Exception]] = []
    for rule in (r for r in rules if issubclass(r, TextRule)):
        instance = rule(Source("", path, context))
        try:
            instance.check(text)
        except Exception as error:
            instance.crash = error
        results += _outcome(instance)
    visitors = [r for r in rules if not issubclass(r, TextRule)]
    if visitors:
        source = Source(text, path, context)
        instances = [rule(source) for rule in visitors]
        cst.visit_batched(source.module, instances)
        for instance in instances:
            results += _outcome(instance)
    return results


def _outcome(instance: Rule) -> list[tuple[type[Rule], Report | Exception]]:
    if instance.crash is not None:
        return [(type(instance), instance.crash)]
    return [(type(instance), report) for report in instance.reports]


def _finding(
    rule: type[Rule], report: Report | Exception, path: str, ignored: dict[int, set[str]]
) -> Finding | None:
    if isinstance(report, Exception):
        problem = PortkitError(
            f"The rule {rule.id} failed on this file: {type(report).__name__}: {report}.",
            path,
            "This is a bug of portkit, not of your code; the other rules ran.",
        )
        return Finding(
            rule.id, rule.step, f"{problem.what} {problem.next}", path, 1, 0, "", crashed=True
        )
    if rule.id in ignored.get(report.line, ()):
        return None
    return Finding(
        rule.id,
        rule.step,
        report.message,
        path,
        report.line,
        report.column,
        report.symbol,
        rule.fix_safety if report.fixable else "none",
        rule.severity,
    )


def _apply(source: str, reports: Sequence[Report]) -> tuple[str, list[Report]]:
    """Apply what can be applied at once; the rest is found again in the next round."""
    whole = next((r for r in reports if r.new_text is not None), None)
    if whole is not None:
        return whole.new_text or "", [whole]
    replacer = ReplaceNodes(reports)
    module = _module_of(reports, source).visit(replacer)
    done = replacer.done
    if not done:
        done = [next(r for r in reports if r.transform is not None)]
        module = done[0].transform(module)
    module = add_imports(module, (i for r in done for i in r.imports))
    module = drop_unused(module, (name for r in done for name in r.unused))
    return module.code, list(done)


def _module_of(reports: Sequence[Report], source: str) -> cst.Module:
    return next((r.module for r in reports if r.module is not None), None) or cst.parse_module(
        source
    )


def _ignored(source: str) -> dict[int, set[str]]:
    """Line → rules switched off there by `# portkit: ignore[rule] reason`.

    On a line of its own the comment is for the next line. Without a reason it does not count:
    whoever reads the port next must learn why.
    """
    lines: dict[int, set[str]] = {}
    if "portkit:" not in source:
        return lines
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, SyntaxError):
        return lines
    for token in tokens:
        match = IGNORE.match(token.string) if token.type == tokenize.COMMENT else None
        if match and match[2].strip():
            alone = not token.line[: token.start[1]].strip()
            names = {name.strip() for name in match[1].split(",")}
            lines.setdefault(token.start[0] + alone, set()).update(names)
    return lines
