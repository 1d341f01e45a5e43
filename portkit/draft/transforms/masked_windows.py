"""Step forward: a sliding window that only the masks of the original knew.

Transformers' model may pick a mask for each layer and tell its attention nothing of the window:
eager attention needs no more. vLLM's Attention makes no use of masks, so it must be told.
"""

from __future__ import annotations

import libcst as cst

from portkit.draft import edit
from portkit.draft.work import Work

SLIDING = "create_sliding_window_causal_mask"


def window_of_masks(work: Work) -> str:
    """The window of layer `layer_idx`, as the model's masks have it; "" if none is found.

    Understood: a dictionary of masks by kind of layer, `masks[self.config.layer_types[i]]`, and
    one kind for all layers, `create_causal_mask if self.config.sliding_window is None else ...`.
    """
    forward = edit.method(work.cls(work.facts.model), "forward")
    for choice in edit.find(forward, lambda n: isinstance(n, cst.IfExp)):
        test = edit.flat(choice.test)
        if test == "self.config.sliding_window is None" and edit.code(choice.orelse) == SLIDING:
            return "config.sliding_window"
    kinds = _kinds(forward)
    for loop in edit.find(forward, lambda n: isinstance(n, cst.For)):
        if not isinstance(loop.target, cst.Tuple):
            continue
        index = edit.code(loop.target.elements[0].value)
        for node in edit.find(loop.body, lambda n: isinstance(n, cst.Subscript)):
            sliding = kinds.get(edit.code(node.value))
            kind = edit.flat(node.slice[0].slice)
            if sliding and kind.startswith("self.config.") and kind.endswith(f"[{index}]"):
                kind = kind.removeprefix("self.").removesuffix(f"[{index}]")
                return f'config.sliding_window if {kind}[layer_idx] == "{sliding}" else None'
    return ""


def _kinds(forward: cst.FunctionDef) -> dict[str, str]:
    """Name of a dictionary of masks -> its one key whose mask has a window."""
    found: dict[str, str] = {}
    for node in edit.find(forward, lambda n: edit.assigned(n) is not None):
        target, value = edit.assigned(node)
        if not isinstance(value, cst.Dict):
            continue
        keys = [
            e.key.evaluated_value
            for e in value.elements
            if isinstance(e, cst.DictElement)
            and isinstance(e.key, cst.SimpleString)
            and edit.is_call(e.value, SLIDING)
        ]
        if len(keys) == 1:
            found[edit.code(target)] = keys[0]
    return found


def cache_config(work: Work) -> str:
    """The cache's configuration, without a window that the original reads and does not apply.

    vLLM's Attention takes the config's window where it is not given one.
    """
    facts = work.facts
    reads = "sliding_window" in {name for name, _ in facts.config_fields}
    if not reads or facts.attention is None or facts.attention.latent is not None:
        return "cache_config = vllm_config.cache_config"
    if "per_layer_sliding_window" in edit.code(work.cls(facts.attention.cls)):
        return "cache_config = vllm_config.cache_config"
    work.did.append(f"{facts.model}: no window, as in the original, whatever the config has.")
    return (
        "# The original attends to all tokens whatever config.sliding_window is.\n"
        "cache_config = copy(vllm_config.cache_config)\n"
        "cache_config.sliding_window = None"
    )
