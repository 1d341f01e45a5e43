"""Stages of a pipeline: what vLLM's engine needs so that small models can be cut into them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.v1.engine import core as engine_core


@contextmanager
def stages_agree() -> Iterator[None]:
    """Inside the block stages settle for a layout of the KV cache that each of them can have.

    vLLM wants their lists equal (resolve_kv_cache_layout). A stage of recurrent layers alone, as
    models of three layers are cut into, could have any, and then no pipeline starts.
    """
    resolve = engine_core.resolve_kv_cache_layout

    def agreed(config: Any, supported: list[list[str]], *args: Any) -> Any:
        common = [name for name in supported[0] if all(name in names for names in supported)]
        return resolve(config, [common] if common else supported, *args)

    engine_core.resolve_kv_cache_layout = agreed
    try:
        yield
    finally:
        engine_core.resolve_kv_cache_layout = resolve


def room_for_the_stage_before(worker: Any) -> None:
    """Make the tensors that a later stage receives: vLLM's CPU runner forgets to, when eager."""
    runner = worker.model_runner
    if runner.intermediate_tensors is None:
        runner.intermediate_tensors = runner.get_model().make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.dtype, device=runner.device
        )
