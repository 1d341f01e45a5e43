"""Drafts checked step by step, as a reader walks them, with nothing of a later step there yet."""

from __future__ import annotations

from pathlib import Path

import pytest
from seeds import words

from portkit.checks.runner import run_checks
from portkit.create import new_port
from portkit.draft.pipeline import apply_draft
from portkit.live.client import live_for

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


@pytest.mark.parametrize(
    ("architecture", "steps", "checks"),
    [
        # Transformers renames the head of its checkpoints, by the class and not by the type.
        ("GPTNeoXForCausalLM", ("copy", "forward"), ("starts", "prefill_parity")),
        # One tensor of the checkpoint is three shards of a parameter, another is the fourth.
        ("Qwen3_5ForCausalLM", ("copy", "forward"), ("starts", "prefill_parity")),
        ("Qwen3_5ForCausalLM", ("copy", "forward", "parallel"), ("rehearsal_tp2", "lora")),
        # A norm over all columns stands between the linears of its feed-forward.
        ("BitNetForCausalLM", ("copy", "forward", "parallel"), ("layer_classes", "rehearsal_tp2")),
        # The experts of four ranks are too small for vLLM's kernel on a CPU: no mistake.
        (
            "GptOssForCausalLM",
            ("copy", "forward", "parallel"),
            ("rehearsal_tp4", "impossible_ranks"),
        ),
        # A norm before the layers, too, is needed on the first stage.
        ("NanoChatForCausalLM", ("copy", "forward", "parallel"), ("rehearsal_pp2",)),
        # Names of linears inside modules, and of experts whose own load_weights is a step ahead.
        ("MoshiForCausalLM", ("copy", "forward", "parallel"), ("rehearsal_tp1",)),
        ("DbrxForCausalLM", ("copy", "forward", "parallel"), ("rehearsal_tp1",)),
        # All heads on every rank, their weights divided.
        (
            "DiffLlamaForCausalLM",
            ("copy", "forward", "parallel"),
            ("layer_classes", "rehearsal_tp2"),
        ),
        # A buffer of a module without weights; a state for a cache; no cache at all.
        ("FalconH1ForCausalLM", ("copy",), ("bit_equal",)),
        ("Mamba2ForCausalLM", ("copy",), ("bit_equal",)),
        ("OpenAIGPTLMHeadModel", ("copy",), ("bit_equal",)),
    ],
)
def test_a_draft_passes_each_step(
    tmp_path: Path, architecture: str, steps: tuple[str, ...], checks: tuple[str, ...]
) -> None:
    port = new_port("tiny", architecture=architecture, root=tmp_path)
    for step in steps:
        outcome = apply_draft(port, step)
        assert outcome.status == "success", outcome.reason
    with live_for(port):
        found = {v.check: v for v in run_checks(port, steps[-1], only=list(checks))}
    for check, verdict in found.items():
        no_kernel = check == "rehearsal_tp4" and "no kernel for what experts leave" in verdict.what
        assert verdict.status == ("skipped" if no_kernel else "passed"), words(verdict)
