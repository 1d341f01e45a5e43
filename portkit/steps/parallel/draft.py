"""Draft of step parallel: vLLM's layers in place of nn.Linear and nn.Embedding.

From the forward state. Each class is ported on its own, so a class that the reader has already
ported is left as it is.
"""

from __future__ import annotations

import libcst as cst

from portkit.analysis.classes import call_name, view_module
from portkit.analysis.facts import facts_of
from portkit.draft import source_draft
from portkit.draft.blocker import Blocker
from portkit.draft.finish import finish
from portkit.draft.outcome import DraftOutcome
from portkit.draft.transforms.parallel_add_norm import fuse_add_norm
from portkit.draft.transforms.parallel_attention import port_attention
from portkit.draft.transforms.parallel_head import port_causal_lm
from portkit.draft.transforms.parallel_mlp import port_mlp
from portkit.draft.transforms.parallel_model import port_layer, port_model
from portkit.draft.transforms.parallel_moe import port_moe
from portkit.draft.transforms.parallel_parts import head_parameters, whole_parameters
from portkit.draft.work import Work
from portkit.port import Port


def draft_source(source: str, architecture: str) -> Work:
    """Draft the parallel state of a source in the forward state. Raises Blocker where it cannot."""
    facts = facts_of(source, architecture)
    work = Work(cst.parse_module(source), facts)
    source_draft.need_roles(work)
    if facts.state in ("parallel", "weights") and "nn.Linear" not in source:
        return work
    if facts.state == "copy":
        raise Blocker(
            f"{facts.architecture} does not have vLLM's interface yet: do step forward first.",
            work.line_of(f"class {facts.architecture}"),
        )
    _refuse_own_parameters(work)
    port_attention(work)
    for mlp in facts.mlp:
        port_mlp(work, mlp)
    for moe in facts.moe:
        port_moe(work, moe)
    port_layer(work)
    port_model(work)
    fuse_add_norm(work)
    port_causal_lm(work)
    work.module = cst.parse_module(finish(work))
    return work


def _refuse_own_parameters(work: Work) -> None:
    """Weights that a class keeps itself (experts, routers) need more than another layer class."""
    norms = {norm.name for norm in work.facts.norm_classes}
    attention = work.facts.attention
    classes = view_module(work.module.code).classes
    for moe in work.facts.moe:
        # A router is whole on every rank, and so is what it is made of.
        norms |= {moe.cls, moe.router.cls, moe.experts.cls}
        norms |= {call_name(item.value) for item in classes[moe.router.cls].assigned}
    for view in classes.values():
        own: set[str] = set()
        if attention is not None and view.name == attention.cls:
            own = {*head_parameters(attention, view), *whole_parameters(attention, view)}
        for item in view.assigned:
            if (
                item.attr not in own
                and view.name not in norms
                and call_name(item.value).endswith("Parameter")
            ):
                raise Blocker(
                    f"{view.name}.{item.attr} is a parameter of its own, not a layer: every rank "
                    "would hold it whole, and its names in the checkpoint may differ.",
                    item.line,
                    "Use vLLM's layer for it (FusedMoE for experts) by hand, then draft again.",
                )


def draft(port: Port) -> DraftOutcome:
    """Draft the port's modeling file; nothing is written."""
    return source_draft.draft_file(port, "parallel", draft_source)
