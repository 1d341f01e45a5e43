"""The port's own code with the lines that a step's tasks are about."""

from __future__ import annotations

from portkit.curriculum import Step
from portkit.errors import PortkitError
from portkit.lint.engine import findings
from portkit.port import Port
from portkit.report.blocks import Report
from portkit.report.render import code_report
from portkit.source import defined, matching


def code_of(port: Port, step: Step, symbol: str = "") -> Report:
    """Show the classes and functions whose name ends so; without a name, those with tasks.

    PortkitError if nothing is called so, or if the file does not parse.
    """
    source = port.source
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
