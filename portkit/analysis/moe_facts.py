"""Facts of a mixture of experts: what its router and its experts compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Routing:
    """A routing rule in the terms that vLLM's fused experts have arguments for."""

    scoring: Literal["softmax", "sigmoid"]
    renormalize: str
    """Condition under which the chosen weights are divided by their sum: "True", "False", ..."""
    correction_bias: str = ""
    """What is added to the scores for the choice only, e.g. "self.e_score_correction_bias"."""
    groups: str = ""
    """Number of groups of experts, of which the best `topk_group` take part; "" for none."""
    topk_group: str = ""
    scale: str = ""
    """Factor on the weights at the end."""


@dataclass(frozen=True)
class RouterFacts:
    """The class that chooses experts for each token."""

    cls: str
    line: int
    linear: str
    """Attribute of its nn.Linear; "" if the class keeps the weight itself; "super" if it is one."""
    biased: bool
    num_experts: str
    hidden_size: str
    full_precision: bool
    """Are the logits computed in float32 whatever the model's dtype is?"""
    top_k: str
    logits: str
    """Local name of the logits in forward."""
    returns: tuple[str, ...]
    """What forward returns, as source, in order."""
    routing: Routing | None
    """None: none of vLLM's rules; the author's arithmetic has to stay."""


@dataclass(frozen=True)
class ExpertsFacts:
    """The class that holds all experts in stacked parameters."""

    cls: str
    line: int
    gate_up: str
    down: str
    """Attributes of the stacked parameters."""
    num_experts: str
    hidden_size: str
    intermediate_size: str
    """Resolved, e.g. "config.moe_intermediate_size"."""
    activation: str
    """Name of the gate's activation as source, e.g. "config.hidden_act" or "'silu'"."""
    transposed: bool
    """Are the parameters [experts, in, out] instead of [experts, out, in]?"""
    index: str
    weights: str
    """forward's parameters for the chosen experts and their weights."""
    index_first: bool
    """Does the one for the experts come first?"""
    why: str = ""
    """Why vLLM's fused experts cannot compute this; "" if they can."""
    biases: tuple[str, ...] = ()
    """Attributes of the stacked biases of gate_up and down; () for none."""
    clamp: tuple[str, str] = ("", "")
    """Of a swigluoai, whose gate and up alternate in gate_up: alpha and limit, as source."""
    has_gate: bool = True
    """False: down(act(up)), and gate_up is the parameter of up."""
    parts: tuple[str, ...] = ()
    """gate, down and up where each is a parameter [experts * intermediate, hidden]; else ()."""
    handed_on_from: str = ""
    """Number of the first expert that returns its tokens as they are, as source; "" if none."""


@dataclass(frozen=True)
class MoeFacts:
    """A feed-forward block with a router and experts."""

    cls: str
    line: int
    router_attr: str
    router: RouterFacts
    experts_attr: str
    experts: ExpertsFacts
    shared: tuple[str, ...]
    """Classes of the feed-forwards beside the experts (shared experts)."""
