"""Gathers what rules may know about a port besides the linted text; reads files and git only."""

from __future__ import annotations

import json
import re

from portkit.adopt import adopted
from portkit.errors import PortkitError
from portkit.lint.finding import PortContext
from portkit.lint.original import original_facts
from portkit.port import Port
from portkit.steps.copy.draft import original_of


def port_context(port: Port) -> PortContext:
    """Return the facts of a port; each stays empty where it cannot be read."""
    original = original_source(port)
    facts = original_facts(original)
    package = port.modeling.parent
    return PortContext(
        architecture=port.architecture,
        architectures=_architectures(port),
        package=port.package,
        module=port.module,
        siblings=frozenset(p.stem for p in package.glob("*.py")),
        source_package=_source_package(port, original),
        unlicensed=bool(port.meta.get("source", {}).get("accept_unlicensed")),
        rotary_layout=facts.rotary_layout,
        original_linears=facts.linears,
        original_ties=facts.ties,
    )


def original_source(port: Port) -> str:
    """The modeling file as it was first committed: the copied code; "" before step 1.

    Of an adopted port, the file of Transformers that it should do the same as.
    """
    if adopted(port):
        try:
            return original_of(port).text
        except PortkitError:
            return ""
    path = port.modeling.relative_to(port.root).as_posix()
    try:
        commits = port.git("log", "--diff-filter=A", "--format=%H", "--", path).split()
        return port.git("show", f"{commits[-1]}:{path}") if commits else port.source
    except PortkitError:
        return port.source


def _architectures(port: Port) -> tuple[str, ...]:
    try:
        config = json.loads((port.checkpoint / "config.json").read_text())
        return tuple(str(name) for name in config.get("architectures") or ())
    except (OSError, ValueError, AttributeError, TypeError):
        return ()


def _source_package(port: Port, original: str) -> str:
    """Where relative imports of the copied code point, from port.toml or the code's own imports."""
    recorded = _module_in(port.meta)
    if recorded:
        return recorded.rpartition(".")[0]
    match = re.search(r"from (transformers\.models\.\w+)\.configuration_\w+ import", original)
    return match[1] if match else ""


def _module_in(meta: dict) -> str:
    for section in meta.values():
        if isinstance(section, dict):
            for value in section.values():
                if isinstance(value, str) and re.fullmatch(
                    r"transformers\.models\.\w+\.modeling_\w+", value
                ):
                    return value
    return ""
