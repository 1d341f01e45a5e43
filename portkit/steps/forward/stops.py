"""Why vLLM stops while it starts a port, or in its first forward: causes, and a line."""

from __future__ import annotations

import re

from portkit.port import Port

SHAPES = (
    "Tensors are flat in vLLM: hidden_states is [tokens, hidden], without a batch dimension; views "
    "and transposes for [batch, heads, tokens, ...] go.",
    "If it stops inside Attention: the head counts and head size given to it must be those of q, k "
    "and v (num_kv_heads=).",
)
"""Why a forward stops."""
ROUTING = (
    "The routing asked of FusedMoE (scoring_func, renormalize, groups) is none that this kernel "
    "has: is it the original's? Compare with its router: softmax or sigmoid, over which experts."
)
STATE = "get_mamba_state_shape_from_config"
STATE_SIZE = (
    f"{STATE} tells vLLM another size of a layer's state than the layer itself asks for "
    "(its get_state_shape): heads, groups, channels and columns of the convolution are those that "
    "the layer is made with."
)


def causes_of_stop(port: Port, what: str, where: str) -> tuple[tuple[str, ...], str]:
    """Return (causes, most likely first; the line, if `where` names none)."""
    causes: list[str] = []
    for name in dict.fromkeys(re.findall(r"[a-z]\w*_\w+", what)):
        if re.search(rf"\b{name}=", port.source):
            causes.append(
                f"vLLM's layer refuses the {name}= that the port gives it: is it the original's?"
            )
    if "page_size" in what and f"def {STATE}" in port.source:
        return (STATE_SIZE,), where or _line(port, f"def {STATE}")
    if "rout" in what and ", in forward" in where:  # routed_experts is a name of parameters, too
        causes.append(ROUTING)
    return tuple(causes), where


def _line(port: Port, text: str) -> str:
    for number, line in enumerate(port.source.splitlines(), 1):
        if text in line:
            return f"{port.modeling.name}:{number}: {line.strip()}"
    return ""
