"""What to look at first: which checks apply, and which flips fit where the two sides part."""

from __future__ import annotations

import ast
import re
from typing import Any

from portkit.adopt import adopted
from portkit.checks.base import Check
from portkit.checks.runner import checks_of
from portkit.live.evidence import has_load_weights
from portkit.port import Port

# A fault in one row explains failures in the rows below it. Left out is what another row shows with
# the port's own loading already: load_parity and rehearsal_tp1 are prefill_parity then.
ORDER = (
    "interface",
    "coverage",
    "poisoned_load",
    "starts",
    "prefill_parity",
    "chunked_prefill",
    "decode_parity",
    "ragged_batch",
    "far_positions",
    "inputs_embeds",
    "used_parameters",
    "config_fields",
    "tied_head",
    "half_precision",
    "layer_classes",
    "prefixes",
    "rehearsal_tp2",
    "impossible_ranks",
    "rehearsal_tp4",
    "rehearsal_pp2",
    "lora",
    "quantised_run",
    "bad_checkpoints",
    "load_memory",
    "reload",
)
SLOW = (
    "rehearsal_tp4",
    "rehearsal_pp2",
    "lora",
    "quantised_run",
    "bad_checkpoints",
    "load_memory",
    "reload",
    "impossible_ranks",
)
"""Left out by `quick`: they seldom fail alone."""
SAME_AS = {"rehearsal_tp1": "prefill_parity", "load_parity": "prefill_parity"}
"""Required check -> the one that stands for it here."""
ALSO_NEEDS = {"half_precision": ("prefill_parity",)}
"""Check -> what must have passed before it, here: the steps see to that by their order."""
STAGES = {
    "prefill_parity": "prefill",
    "chunked_prefill": "chunked",
    "decode_parity": "decode",
    "ragged_batch": "ragged",
    "far_positions": "far",
    "inputs_embeds": "embeds",
}
"""Check -> stage of the evidence that it reads, for those that a flip may heal."""

PARALLEL = re.compile(r"\b(QKV|MergedColumn|Column|Row)ParallelLinear\b")

TOPICS: dict[str, tuple[str, ...]] = {
    "logits": ("head", "norm"),
    "qk": ("rotary", "position", "norm", "qkv", "bias"),
    # Position 0 is turned by no angle: what is wrong there already is no rotation.
    "qk at 0": ("qkv", "norm", "bias", "rotary"),
    "v": ("qkv", "bias"),
    "attn": ("attention", "qkv", "rotary", "position"),
    "norm": ("norm", "norm-order"),
    "embedding": ("embedding", "position"),
    "linear": ("bias", "qkv", "gate-up", "activation"),
    "in": ("activation", "gate-up", "attention", "rotary", "qkv", "norm-order", "residual"),
    "out": ("routing", "activation", "residual", "norm-order", "embedding", "gate-up"),
    "later": ("position", "attention", "rotary"),
    "ranks": ("ranks",),
}
"""Where the two sides part -> topics of flips, likeliest first."""


def steps_that_apply(port: Port) -> tuple[str, ...]:
    """Return the steps whose checks can say something about the code as it is."""
    source = port.source
    found = []
    if not adopted(port) and not _imports_vllm(source):
        return ("copy",)
    found.append("forward")
    if adopted(port) or PARALLEL.search(source):
        found.append("parallel")
    if adopted(port) or has_load_weights(port):
        found.append("weights")
    return tuple(found)


def checks_that_apply(port: Port, *, quick: bool = False) -> tuple[type[Check], ...]:
    """Return the checks to run, in the order in which a fault of one explains the next."""
    steps = steps_that_apply(port)
    if "weights" in steps:  # of step prove, what looks at one module after the other
        steps += ("prove",)
    checks = {c.id: c for step in steps for c in checks_of(step)}
    own = [c for c in checks if c in ORDER and not (quick and c in SLOW)]
    if steps == ("copy",):
        return tuple(checks.values())
    return tuple(checks[c] for c in sorted(own, key=ORDER.index))


def topics_for(trace: dict[str, Any], check: str) -> tuple[str, ...]:
    """Return the topics of flips to try first, from where the two sides part."""
    first = TOPICS["later"] if check not in ("prefill_parity", "inputs_embeds") else ()
    role, kind = str(trace.get("role", "")), str(trace.get("kind", ""))
    name = str(trace.get("path", "")).rpartition(".")[2]
    if kind == "logits":
        then = TOPICS["logits"]
    elif role in ("q", "k"):
        then = TOPICS["qk" if trace.get("first_ok") else "qk at 0"]
    elif role == "out" and "norm" in name:
        then = TOPICS["norm"]
    elif role == "out" and ("embed" in name or name in ("wte", "wpe")):
        then = TOPICS["embedding"]
    elif role == "out" and trace.get("shape") and not trace.get("holds"):
        then = (*TOPICS["linear"], *TOPICS["out"])
    else:
        then = TOPICS.get(role, TOPICS["out"])
    return tuple(dict.fromkeys((*first, *then)))


def _imports_vllm(source: str) -> bool:
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return True
    return any(
        isinstance(n, ast.ImportFrom) and (n.module or "").split(".")[0] == "vllm"
        for n in ast.walk(tree)
    )
