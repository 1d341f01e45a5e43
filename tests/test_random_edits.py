"""Two hundred random edits of a port: portkit answers each in words, and never crashes.

The edits are the same in every run: seeds, no clock. `edits.py` makes them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from edits import edited
from seeds import PORTS

from portkit.create import new_port
from portkit.curriculum import step
from portkit.diagnosis.flips import flips_of
from portkit.draft.pipeline import draft_step
from portkit.errors import PortkitError
from portkit.lint.engine import findings
from portkit.lint.source import must_compile
from portkit.notebook import Session
from portkit.port import Port
from portkit.status import status_of

NEXT = {"copy": "forward", "forward": "parallel", "parallel": "weights", "weights": "register"}
GROUPS = 10
EDITS = 200


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Port:
    return new_port(
        "helium", architecture="HeliumForCausalLM", root=tmp_path_factory.mktemp("ports")
    )


def drafts(port: Port, due: str) -> None:
    outcome = draft_step(port, due)
    assert "fault of portkit" not in outcome.reason
    assert outcome.status == "success" or outcome.reason
    for path, text in outcome.files:
        if path.endswith(".py"):
            must_compile(text)


def lists_tasks(port: Port, due: str) -> None:
    assert str(Session(step(due), port).tasks())


def shows(port: Port, due: str) -> None:
    assert str(Session(step(due), port).show())


def hints(port: Port, due: str) -> None:
    assert str(Session(step(due), port).hint())


def tells_how_far(port: Port, due: str) -> None:
    assert len(status_of(port).steps) == 8


def flips(port: Port, due: str) -> None:
    for flip in flips_of(port.source, {}):
        must_compile(flip.source)


USES: tuple[Callable[[Port, str], None], ...] = (
    drafts,
    lists_tasks,
    shows,
    hints,
    tells_how_far,
    flips,
)


@pytest.mark.parametrize("group", range(GROUPS))
def test_a_random_edit_never_crashes_what_reads_the_source(port: Port, group: int) -> None:
    for seed in range(group, EDITS, GROUPS):
        state = list(NEXT)[seed // GROUPS % 4]
        edit, text = edited((PORTS / "helium" / f"{state}.py").read_text(), seed)
        port.modeling.write_text(text, newline="")
        due = NEXT[state]
        try:
            found = findings(port, due)
        except PortkitError as error:
            assert "is not valid Python" in error.what, f"{edit}: {error}"
            with pytest.raises((SyntaxError, ValueError)):
                must_compile(text)
        else:
            must_compile(text)
            assert not [f.message for f in found if f.crashed], edit
        use = USES[seed % len(USES)]
        try:
            use(port, due)
        except PortkitError:
            pass  # an answer in words
        except Exception as error:
            raise AssertionError(f"{use.__name__} after {edit} of {state}.py: {error!r}") from error
