"""A port that lacks one of its statements passes no step: live checks, five deletions by seed."""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator

import pytest
from seeds import PORTS

from portkit.checks.base import CheckContext
from portkit.checks.runner import checks_of
from portkit.create import new_port
from portkit.live.client import live_for
from portkit.port import Port

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(120)]
WORK = ("forward", "compute_logits", "embed_input_ids")
"""Methods of which each statement matters, in tests/ports/helium/forward.py."""


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Port]:
    port = new_port("helium", architecture="helium", root=tmp_path_factory.mktemp("ports"))
    yield port
    live_for(port).close()


@pytest.mark.parametrize("seed", range(5))
def test_no_check_passes_a_port_without_one_of_its_statements(port: Port, seed: int) -> None:
    source = (PORTS / "helium" / "forward.py").read_text()
    text, statement = without_one(source, random.Random(seed))
    port.modeling.write_text(text)
    context = CheckContext(port, live_for(port))
    for check in checks_of("forward"):
        verdict = check().run(context)
        if verdict.status == "failed":
            assert verdict.what
            return
    pytest.fail(f"every check passes without: {statement}")


def without_one(source: str, chance: random.Random) -> tuple[str, str]:
    """Return the text without one statement of these methods, and that statement."""
    functions = [n for n in ast.walk(ast.parse(source)) if getattr(n, "name", "") in WORK]
    node = chance.choice([statement for f in functions for statement in f.body])
    lines = source.splitlines(keepends=True)
    left = [*lines[: node.lineno - 1], *lines[node.end_lineno :]]
    return "".join(left), "".join(lines[node.lineno - 1 : node.end_lineno])
