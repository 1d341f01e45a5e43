"""Draft of step forward: the copied Transformers code, compatible with vLLM.

Order matters only where it says so: attention first, because the layer's call follows its new
signature, then the layer, the model, the ForCausalLM class, and the norms.
"""

from __future__ import annotations

import libcst as cst

from portkit.analysis.classes import call_name, view_module
from portkit.analysis.facts import facts_of
from portkit.analysis.ignored import Ignored, ignored_patterns
from portkit.draft import source_draft
from portkit.draft.blocker import Blocker
from portkit.draft.finish import finish
from portkit.draft.imports import keep_reachable
from portkit.draft.outcome import DraftOutcome
from portkit.draft.serving.constructors import drop_unserved_methods
from portkit.draft.serving.linears import declare_renamed, declare_transposed
from portkit.draft.serving.normal import NormalForm, normal_form
from portkit.draft.transforms.class_alias import write_out
from portkit.draft.transforms.engines_dtype import take_the_engines_dtype
from portkit.draft.transforms.forward_attention import port_attention
from portkit.draft.transforms.forward_causal_lm import port_causal_lm
from portkit.draft.transforms.forward_layer import port_layer, port_mlp
from portkit.draft.transforms.forward_model import port_model
from portkit.draft.transforms.forward_moe import port_moe
from portkit.draft.transforms.forward_wrappers import port_wrappers
from portkit.draft.transforms.ignored_weights import declare_ignored
from portkit.draft.transforms.layer_list import unroll
from portkit.draft.transforms.norms import port_norms
from portkit.draft.transforms.recurrent import drop_buffers_from_outside, refuse_unknown
from portkit.draft.transforms.recurrent_interface import declare_state
from portkit.draft.work import Work
from portkit.port import Port


def draft_source(source: str, architecture: str) -> Work:
    """Draft the forward state of a source in the copy state. Raises Blocker where it cannot."""
    if facts_of(source, architecture).state != "copy":
        return Work(cst.parse_module(source), facts_of(source, architecture))
    form = normal_form(cst.parse_module(source), architecture)
    work = Work(form.module, facts_of(form.module.code, architecture))
    try:
        return _drafted(work, form, ignored_patterns(view_module(source)))
    except Blocker as blocker:
        raise _in_source(blocker, form.module.code, source) from blocker


def _drafted(work: Work, form: NormalForm, ignored: tuple[Ignored, ...]) -> Work:
    facts = work.facts
    for cls, blocker in form.lost:
        if facts.layer is not None and cls in _attentions(work):
            raise blocker
    source_draft.need_roles(work)
    refuse_unknown(work)
    drop_buffers_from_outside(work)
    unroll(work)
    write_out(work)
    port_attention(work)
    for name in dict.fromkeys(m.cls for m in facts.mlp):
        port_mlp(work, name)
    for moe in facts.moe:
        port_moe(work, moe)
    port_layer(work)
    port_model(work)
    port_wrappers(work)
    port_causal_lm(work)
    names = (facts.model, *(f.cls for f in facts.layers), *_attentions(work))
    served = {(name, "forward") for name in names}
    reached = keep_reachable(work.module, [facts.causal_lm])
    work.module = drop_unserved_methods(reached, served)
    declare_state(work)
    declare_transposed(work, form.transposed)
    declare_renamed(work, form.renamed)
    work.warnings += form.notes
    port_norms(work)
    take_the_engines_dtype(work)
    work.module = cst.parse_module(finish(work))
    if ignored:
        declare_ignored(work, ignored)
        work.module = cst.parse_module(finish(work))
    return work


def _attentions(work: Work) -> set[str]:
    """The attention's class; where none is known, all that a decoder layer makes."""
    if work.facts.attention is not None:
        return {work.facts.attention.cls}
    if work.facts.recurrent:
        return set()
    layer = view_module(work.module.code).classes[work.facts.layer.cls]
    return {call_name(item.value) for item in layer.assigned}


def _in_source(blocker: Blocker, normal: str, source: str) -> Blocker:
    """The blocker at the line of the reader's file that became this line of the normal form."""
    lines = normal.splitlines()
    text = lines[blocker.line - 1].strip() if 0 < blocker.line <= len(lines) else ""
    numbers = [n for n, line in enumerate(source.splitlines(), 1) if line.strip() == text]
    return Blocker(blocker.what, numbers[0] if text and numbers else 0, blocker.next)


def draft(port: Port) -> DraftOutcome:
    """Draft the port's modeling file; nothing is written."""
    return source_draft.draft_file(port, "forward", draft_source)
