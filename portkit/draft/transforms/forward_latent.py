"""Step forward, multi-head latent attention: the latent is expanded, then plain Attention.

This is the form that runs on every platform: queries, keys and values by heads, as in the original.
vLLM's other form keeps the latent in its cache (MultiHeadLatentAttentionWrapper); it needs kernels
of its own, and is named in the draft for the reader to decide.
"""

from __future__ import annotations

import libcst as cst

from portkit.analysis.classes import view_module
from portkit.analysis.read_blocks import linears_of
from portkit.analysis.rotary_class import read_rotary_class
from portkit.draft import edit, prune
from portkit.draft.blocker import Blocker
from portkit.draft.transforms.forward_attention import (
    _attention,
    _inference_init,
    _known_norms,
    _layer_index,
    attention_signature,
)
from portkit.draft.transforms.latent_flow import flow_of
from portkit.draft.transforms.latent_values import Rotation
from portkit.draft.transforms.optional_modules import modules_in_branches
from portkit.draft.work import Work, plain_module, rewrite_init, set_members, set_method

_CACHE_NOTE = (
    "PORT: the cache holds keys and values of every head. vLLM can keep the latent alone,",
    "far less, where the platform has MLA kernels: MultiHeadLatentAttentionWrapper in",
    "vllm/model_executor/layers/mla.py. Until then serve with VLLM_MLA_DISABLE=1: from some model",
    "types vLLM takes it that the cache is of latents, and sizes its blocks for that.",
)


def port_latent_attention(work: Work) -> None:
    """Rewrite the attention class. Raises Blocker where its meaning is not certain."""
    facts = work.facts.attention
    cls = work.cls(facts.cls)
    forward, init = edit.method(cls, "forward"), edit.method(cls, "__init__")
    view = view_module(work.module.code).classes[facts.cls]
    _refuse_sparse(work, cls)
    rotary = work.facts.rotary
    hidden = edit.parameters(forward)[0]
    flow = flow_of(
        cls,
        facts.latent,
        linears=set(linears_of(view)),
        norms=_known_norms(work),
        rotary_functions={name for name, _ in rotary.layouts} if rotary else set(),
        source=work.module.code,
        first_line=view.line,
    )
    clean = prune.drop_dropout_calls(prune.inference_only(forward), prune.dropout_attributes(cls))
    body = flow.run(clean, hidden)
    signature = edit.function(
        f"def forward(self, positions: torch.Tensor, {hidden}: torch.Tensor)"
        " -> torch.Tensor:\n    pass"
    )
    cls = set_method(cls, edit.with_body(signature, body))
    if facts.latent.expand:
        gone = facts.latent.expand
        kept = [m for m in edit.members(cls) if getattr(getattr(m, "name", 0), "value", "") != gone]
        cls = set_members(cls, kept)
    made = [edit.blank_before(_attention(work, view, flow.keywords, "attn"))]
    if flow.rotations:
        made.insert(0, edit.blank_before(_rope(work, flow.rotations)))
    made[-1] = edit.comment_before(made[-1], *_CACHE_NOTE)
    init_body = [*modules_in_branches(_inference_init(edit.body_of(init))), *made]
    cls = rewrite_init(cls, attention_signature(init), init_body, _layer_index(init, init_body))
    work.put(plain_module(cls))
    work.did.append(
        f"{facts.cls}: the latent is expanded to keys and values of every head, values are padded "
        "to the head size of the keys; masks, caches, [batch, seq] shapes go."
    )
    work.warnings.append(
        f"{facts.cls} caches keys and values of every head: right everywhere, but larger than the "
        "latent, and served with VLLM_MLA_DISABLE=1. Decide whether to use "
        "MultiHeadLatentAttentionWrapper where MLA kernels are."
    )


def _refuse_sparse(work: Work, cls: cst.ClassDef) -> None:
    """Attention over keys that another module selects needs that module's own cache."""
    calls = edit.find(
        edit.method(cls, "forward"),
        lambda n: isinstance(n, cst.Arg) and n.keyword is not None and n.keyword.value == "indices",
    )
    selects = [c for c in calls if edit.code(c.value) != "None"]
    if selects:
        raise Blocker(
            f"{work.facts.attention.cls}.forward attends only to keys that an indexer selects: "
            "vLLM's Attention has no such mask.",
            work.line_of("indices="),
            "Start from DeepseekV2MLAAttention and its Indexer, with the cache "
            "DeepseekV32IndexerCache, in vllm/model_executor/models/deepseek_v2.py.",
        )


def _rope(work: Work, rotations: list[Rotation]) -> edit.Statement:
    """get_rope(...) for the part of the head that is rotated."""
    facts, rotary = work.facts.attention, work.facts.rotary
    reads = read_rotary_class(view_module(work.module.code).classes[rotary.cls])
    layouts = dict(rotary.layouts)
    why = f"{rotary.cls} {reads.strange}" if reads.strange else ""
    if reads.by_layer_type:
        why = f"{rotary.cls} has other parameters for each layer type"
    for rotation in rotations:
        if layouts.get(rotation.function, "unknown") == "unknown":
            why = f"{rotation.function} pairs dimensions in neither of vLLM's two ways"
    if why:
        raise Blocker(
            f"cannot tell how positions rotate queries and keys: {why}.",
            rotary.line,
            "Compare with vLLM's DeepseekV2Attention.",
        )
    size = rotations[0].size or facts.latent.shared_dim
    style, comment = _style(rotations, layouts)
    if reads.note:
        comment = (*comment, f"PORT: {reads.note}.")
        work.warnings.append(f"{reads.note}.")
    made = edit.statement(f"""
self.rotary_emb = get_rope(
    {size},
    max_position=config.max_position_embeddings,
    rope_parameters=config.rope_parameters,
    is_neox_style={style},
)
""")
    return edit.comment_before(made, *comment)


def _style(rotations: list[Rotation], layouts: dict[str, str]) -> tuple[str, tuple[str, ...]]:
    """(is_neox_style as source, why): the config may decide between the two ways."""
    half = [layouts[r.function] == "half" for r in rotations]
    if all(half):
        return "True", ("Dimensions are rotated in halves (i, i + n/2).",)
    if not any(half):
        return "False", ("Neighbouring dimensions (2i, 2i + 1) are rotated together.",)
    conditions = [r.condition.replace("self.config.", "config.") for r in rotations]
    if len(rotations) == 2 and conditions[1] == f"not ({conditions[0]})":
        style = conditions[0] if half[0] else f"not {conditions[0]}"
        return style, ("Neighbours (2i, 2i + 1) or halves (i, i + n/2), as the config says.",)
    raise Blocker(
        f"cannot tell when {rotations[0].function} rotates, and when {rotations[1].function}."
    )
