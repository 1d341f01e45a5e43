"""Tensors that the shards' headers show to be wrong: unlike the same tensor of other layers.

Plain values; imports neither torch nor vLLM.
"""

from __future__ import annotations

from portkit.live.checkpoint import Checkpoint, TensorInfo
from portkit.live.layers import pattern
from portkit.live.loads import Problem

INTEGERS = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")


def odd_tensors(checkpoint: Checkpoint) -> list[Problem]:
    """Return one problem for each tensor that no model of this kind would be saved with."""
    found = []
    alike: dict[str, list[TensorInfo]] = {}
    for tensor in checkpoint.tensors:
        alike.setdefault(pattern(tensor.name), []).append(tensor)
    for tensors in alike.values():
        for tensor in tensors:
            others = [t for t in tensors if t is not tensor]
            if problem := _type(checkpoint, tensor) or _shape(tensor, others):
                found.append(problem)
    return found


def _type(checkpoint: Checkpoint, tensor: TensorInfo) -> Problem | None:
    """Integers are weights only where the config says how they were quantised."""
    last = tensor.name.rpartition(".")[2]
    if tensor.dtype not in INTEGERS or checkpoint.config.get("quantization_config"):
        return None
    # GPT-2's causal mask is called `bias` too, and has four axes.
    if last != "weight" and (last != "bias" or len(tensor.shape) != 1):
        return None
    return Problem(
        f"{tensor.name} in {tensor.shard} is stored as {tensor.dtype}: vLLM would compute with "
        "these integers and say nothing",
        "Save the tensor as the others are; a quantised checkpoint needs a quantization_config.",
        causes=(
            "the tensor was cast when the shard was written",
            "the checkpoint is quantised, and its config.json is of the model before that",
        ),
    )


def _shape(tensor: TensorInfo, others: list[TensorInfo]) -> Problem | None:
    """One tensor may differ from layer to layer, but not by being turned round in one of them."""
    shapes = {t.shape for t in others}
    if len(others) < 2 or shapes != {tensor.shape[::-1]} or tensor.shape in shapes:
        return None
    return Problem(
        f"{tensor.name} in {tensor.shard} is transposed: {_x(tensor.shape)}, and "
        f"{_x(tensor.shape[::-1])} in the {len(others)} other layers",
        "Save this tensor again: the port's load_weights is right for the others.",
        causes=("the checkpoint was converted, and one tensor transposed once too often",),
    )


def _x(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
