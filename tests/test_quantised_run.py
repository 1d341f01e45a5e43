"""The check `quantised_run` on drafts whose checkpoints or blocks are unlike the bundled ones'."""

from __future__ import annotations

from pathlib import Path

import pytest
from seeds import words

from portkit.checks.base import CheckContext
from portkit.create import new_port
from portkit.draft.pipeline import apply_draft
from portkit.live.client import live_for
from portkit.steps.parallel.quantised import QuantisedRun

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

UNUSUAL = {
    "HYV3ForCausalLM": "the checkpoint calls shared experts and routers otherwise",
    "NemotronHForCausalLM": "the checkpoint calls every linear otherwise",
    "MoshiForCausalLM": "a module of its own around each of the attention's linears",
    "DbrxForCausalLM": "rows of all experts under each other, and a router of its own class",
}


@pytest.mark.parametrize("architecture", UNUSUAL)
def test_right_drafts_run_quantised(tmp_path: Path, architecture: str) -> None:
    port = new_port("tiny", architecture=architecture, root=tmp_path)
    for step in ("copy", "forward", "parallel", "weights"):
        outcome = apply_draft(port, step)
        assert outcome.status == "success", outcome.reason
    with live_for(port) as live:
        verdict = QuantisedRun().run(CheckContext(port, live))
    assert verdict.status == "passed", words(verdict)
    assert [table.title for table in verdict.tables if "Layers" in table.title] == [
        "Layers of the int8 copy",
        "Layers of the int4 copy",
        "Layers, rounded to fp8 while loading",
    ]
