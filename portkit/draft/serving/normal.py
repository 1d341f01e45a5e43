"""The pass before step forward's transforms: the file as a server would run it."""

from __future__ import annotations

from dataclasses import dataclass

import libcst as cst

from portkit.analysis.classes import view_module
from portkit.analysis.read_blocks import linears_of
from portkit.draft import edit, prune
from portkit.draft.blocker import Blocker
from portkit.draft.imports import VLLM_NAMES
from portkit.draft.serving import inline
from portkit.draft.serving.alibi import alibi_functions, refuse_optional, with_slopes
from portkit.draft.serving.attention_core import AttentionCore
from portkit.draft.serving.causal_buffers import causal_buffers, without
from portkit.draft.serving.constructors import (
    drop_unserved_methods,
    drop_unserved_parts,
    name_layer_index,
    read_layer_index,
    refuse_sliced_weights,
    rename_shadows,
    resolve_tables,
)
from portkit.draft.serving.expert_modules import merge_expert_modules
from portkit.draft.serving.linears import plain_linears, unwrap_linears
from portkit.draft.serving.parameters import drop_unread_parameters, read_config_instead
from portkit.draft.serving.residuals import call_autograd_functions, hoist_residuals
from portkit.draft.serving.returned_parameters import add_inside, keep_parameters
from portkit.draft.serving.router_methods import router_classes
from portkit.draft.serving.same_arguments import merge_same_arguments
from portkit.draft.serving.specialise import Specialised, specialise
from portkit.draft.serving.split_layers import split_layers
from portkit.draft.serving.tokens import first_output, flat_tokens, free_the_name
from portkit.draft.serving.whole_cut import cut_whole
from portkit.draft.work import put_class, set_method


@dataclass(frozen=True)
class NormalForm:
    """The file as a server runs it, and what was decided on the way."""

    module: cst.Module
    transposed: tuple[str, ...] = ()
    """Linears whose weights the checkpoint stores as [in, out]."""
    renamed: tuple[tuple[str, str], ...] = ()
    """(piece of a name in the checkpoint, in the file) of linears that were wrapped."""
    notes: tuple[str, ...] = ()
    """What the reader must know about what was left out."""
    lost: tuple[tuple[str, Blocker], ...] = ()
    """Classes that attend by hand in a way that could not be followed, and where that begins."""


def normal_form(module: cst.Module, architecture: str) -> NormalForm:
    """Fold what serving never passes; write attentions made by hand as one attention call."""
    source = module.code
    if "_attn_implementation](" in source.replace(" ", ""):
        module = resolve_tables(module)
    module = rename_shadows(module, VLLM_NAMES)
    module = read_layer_index(name_layer_index(module))
    if "autograd.Function" in source:
        module = call_autograd_functions(module)
    module, moved = merge_expert_modules(module)
    module = split_layers(router_classes(module))
    if "nn.Sequential(" in source:
        module = _with_sequences(module)
    module, transposed = plain_linears(read_config_instead(module))
    notes: list[str] = []
    if "F.linear(" in source:
        module, notes = refuse_sliced_weights(module)
    module = keep_parameters(module)
    alibi = alibi_functions(module) if "pow(" in source else frozenset()
    served = specialise(module, architecture, alibi)
    module = drop_unserved_parts(served.module, set(served.passed))
    if module is not served.module:
        served = specialise(module, architecture, alibi)
        module = served.module
    by_hand = [c for c in _served_classes(module, served) if _attends_by_hand(c)]
    for cls in _served_classes(module, served):
        if cls in by_hand:
            module = put_class(module, _in_one_piece(module, cls))
        elif _attends(cls):
            new = inline.without_aliases(edit.method(cls, "forward"))
            module = put_class(module, set_method(cls, new))
        elif cls.name.value != architecture:
            module = put_class(module, _with_flat_tokens(module, cls))
    module = merge_same_arguments(module, set(served.passed))
    module = hoist_residuals(module, set(served.passed))
    module = drop_unread_parameters(module, set(served.passed), architecture)
    module, renamed = unwrap_linears(module)
    if by_hand or renamed:
        served = specialise(module, architecture, alibi)
        module = served.module
    if alibi:
        module, told = refuse_optional(module, served.passed)
        if told:
            served = specialise(module, architecture)
            module, alibi = served.module, frozenset()
            notes += told
    lost: list[tuple[str, Blocker]] = []
    for cls in _served_classes(module, served):
        if _attends_by_hand(cls):
            cls, blocker = _with_core_called(module, cls, served)
            module = put_class(module, cls)
            lost += [(cls.name.value, blocker)] if blocker is not None else []
    module = add_inside(module)
    if "torch.tril(" in source:
        for cls in _served_classes(module, served):
            module = put_class(module, without(cls, causal_buffers(cls).attrs))
    module = drop_unserved_methods(module, set(served.passed))
    if alibi:
        module, told = with_slopes(module)
        notes += told
    return NormalForm(
        module, transposed, (*renamed, *moved), tuple(notes), _placed(lost, module.code)
    )


def _placed(lost: list[tuple[str, Blocker]], source: str) -> tuple[tuple[str, Blocker], ...]:
    """The blockers at their statement's line in `source`; they were found in an earlier form."""
    lines = source.splitlines()
    found = []
    for cls, blocker in lost:
        start = next(i for i, line in enumerate(lines) if line.startswith(f"class {cls}("))
        shown = blocker.what.split("`")[1].removesuffix(" ...")
        line = next((i for i, x in enumerate(lines[start:], start + 1) if shown in x), 0)
        found.append((cls, Blocker(blocker.what, line, blocker.next)))
    return tuple(found)


def _with_sequences(module: cst.Module) -> cst.Module:
    """self.ffn = make_ffn(a, b) -> self.ffn = nn.Sequential(...), in each __init__."""
    for cls in [c for c in module.body if isinstance(c, cst.ClassDef)]:
        init = edit.method(cls, "__init__")
        if init is not None:
            new = inline.inline_functions(module, init, inline.makes_sequence)
            module = put_class(module, set_method(cls, new))
    return module


def _served_classes(module: cst.Module, served: Specialised) -> list[cst.ClassDef]:
    return [
        c
        for c in module.body
        if isinstance(c, cst.ClassDef) and (c.name.value, "forward") in served.passed
    ]


def _attends(cls: cst.ClassDef) -> bool:
    return "attention_interface(" in edit.code(cls)


def _with_flat_tokens(module: cst.Module, cls: cst.ClassDef) -> cst.ClassDef:
    forward = inline.inline_functions(module, edit.method(cls, "forward"), inline.drops_out)
    forward = free_the_name(forward, "positions", "position_embeds")
    forward = inline.inference_body(flat_tokens(forward), prune.dropout_attributes(cls))
    return set_method(cls, first_output(forward))


def _attends_by_hand(cls: cst.ClassDef) -> bool:
    """Does the class write softmax over a product itself, and have projections of its own?"""
    forward = edit.method(cls, "forward")
    if forward is None or "attention_interface(" in edit.code(forward):
        return False
    written = edit.code(cls)
    products = ("matmul(", "bmm(", " @ ", "scaled_dot_product_attention(")
    weighs = "softmax(" in written.lower() or products[-1] in written
    return weighs and any(p in written for p in products)


def _in_one_piece(module: cst.Module, cls: cst.ClassDef) -> cst.ClassDef:
    """The class with its helpers inlined in forward, and without dropout."""
    forward = inline.inline_methods(cls, edit.method(cls, "forward"))
    forward = inline.inline_functions(module, forward, inline.drops_out)
    forward = inline.inference_body(forward, prune.dropout_attributes(cls))
    return set_method(cls, inline.without_aliases(first_output(forward)))


def _with_core_called(
    module: cst.Module, cls: cst.ClassDef, served: Specialised
) -> tuple[cst.ClassDef, Blocker | None]:
    """The class with its core as one call; where it was lost if there is no such call."""
    forward = edit.method(cls, "forward")
    first = _core(module, cls, served, forward, "")
    new = first.run(forward)
    if first.attended:
        return _with_core(cls, first, new), None
    cut = cut_whole(view_module(module.code).classes[cls.name.value], forward)
    if cut is not None:
        second = _core(module, cls, served, cut.forward, cut.statement)
        new = second.run(cut.forward)
        if second.attended:
            return _with_core(cls, second, new), None
        first = second
    return cls, first.lost


def _core(
    module: cst.Module,
    cls: cst.ClassDef,
    served: Specialised,
    forward: cst.FunctionDef,
    cut: str,
) -> AttentionCore:
    passed = served.passed[cls.name.value, "forward"]
    view = view_module(module.code).classes[cls.name.value]
    buffers = causal_buffers(cls)
    return AttentionCore(
        cls=cls.name.value,
        linears=set(linears_of(view)),
        inputs={edit.parameters(forward)[0]},
        masks={n for n, k in passed.items() if k.value == "mask" and k.kind != "const"},
        biases={n for n, k in passed.items() if k.value == "alibi" and k.kind != "const"},
        buffers=set(buffers.attrs),
        window=buffers.window,
        cut=cut,
        source=module.code,
        first_line=view.forward.lineno if view.forward else 0,
    )


def _with_core(cls: cst.ClassDef, core: AttentionCore, forward: cst.FunctionDef) -> cst.ClassDef:
    body = prune.live_body(edit.body_of(forward))
    cls = set_method(cls, edit.with_body(forward, body))
    return core.name_head_dim(without(cls, causal_buffers(cls).attrs))
