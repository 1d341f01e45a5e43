"""What a port's model is made of, and its code with the lines that a step's tasks are about."""

from __future__ import annotations

from portkit.analysis.facts import facts_of
from portkit.checkpoint import read_config
from portkit.curriculum import Step
from portkit.errors import PortkitError
from portkit.lint.engine import findings
from portkit.port import Port
from portkit.report.blocks import Report
from portkit.report.model import model_report
from portkit.report.render import code_report, error_report, findings_report
from portkit.source import defined, matching


def code_of(port: Port, step: Step, symbol: str = "") -> Report:
    """Show the classes and functions whose name ends so; without a name, those with tasks.

    PortkitError if nothing is called so, or if the file does not parse.
    """
    source = port.source
    if not source:
        raise no_code(port)
    path = port.modeling.relative_to(port.root).as_posix()
    here = [f for f in findings(port, step.id) if f.path == path]
    spans = defined(source)
    concerned = {f.symbol for f in here}
    chosen = matching(spans, symbol) if symbol else [s for s in spans if s.name in concerned]
    if symbol and not chosen:
        names = ", ".join(s.name for s in spans if "." not in s.name) or "nothing yet"
        raise PortkitError(
            f"Nothing in the port is called {symbol!r}.", str(port.modeling), f"It defines {names}."
        )
    marked = [(f.line, f.message) for f in here]
    return code_report(source, path, [(s.name, s.first, s.last) for s in chosen], marked)


def tasks_of(port: Port, step: Step | None = None) -> Report:
    """Show what the rules find: of one step, or of all that are due; says if there is no code."""
    found = findings(port, step.id if step else None)
    if not found and not port.source and (step is None or step.id != "choose"):
        return error_report(no_code(port))
    return findings_report(found, port.source)


def model_of(port: Port) -> Report:
    """Show what the model is made of: the port's own code, or the original before there is any.

    PortkitError if the code does not parse.
    """
    from portkit.steps.copy.draft import original_of

    source, title = port.source, port.modeling.name
    if not source:
        original = original_of(port)
        source, title = original.text, original.title
    try:
        facts = facts_of(source, port.architecture)
    except SyntaxError as error:
        raise PortkitError(
            f"The code does not parse: {error.msg}.",
            f"{title}, line {error.lineno}",
            "Mend that line; `git diff` in the port shows what changed since the last commit.",
        ) from error
    return model_report(facts, read_config(port.checkpoint), f"{port.architecture}, from {title}")


def no_code(port: Port) -> PortkitError:
    """Say that the port has no modeling file yet, and how it gets one."""
    return PortkitError(
        f"There is no code in the port yet: {port.modeling.name} does not exist.",
        str(port.modeling),
        "Step 1 brings it: notebook 01_copy, or `portkit draft copy --apply`.",
    )
