"""Step forward, decoder layer and the modules inside it: positions in, one tensor out."""

from __future__ import annotations

import re

import libcst as cst

from portkit.analysis.facts import AttentionFacts, LayerFacts
from portkit.draft import edit, prune
from portkit.draft.blocker import Blocker
from portkit.draft.transforms import recurrent
from portkit.draft.transforms.forward_attention import (
    _inference_init,
    _layer_index,
    attention_signature,
)
from portkit.draft.transforms.named_activation import name_activation
from portkit.draft.work import Work, plain_module, rewrite_init, set_method


def port_layer(work: Work) -> None:
    """Rewrite each class of decoder layer: the author's residual statements stay as they are."""
    wrapper = work.facts.attention_wrapper
    both = wrapper is not None and _hands_on_both(work, wrapper)
    if wrapper is not None:
        _port_layer(work, wrapper, work.facts.attention, returns_both=both)
    for facts in work.facts.layers:
        inner = (wrapper or work.facts.attention) if facts.attention_attr else None
        _port_layer(work, facts, inner, takes_both=both)
    recurrent.drop_mixer_classes(work)


def _hands_on_both(work: Work, wrapper: LayerFacts) -> bool:
    """Does the module around the attention return two tensors of its own (residual and normed)?"""
    forward = edit.method(work.cls(wrapper.cls), "forward")
    returned = edit.single(edit.body_of(forward)[-1])
    if not isinstance(returned, cst.Return) or not isinstance(returned.value, cst.Tuple):
        return False
    names = [edit.code(e.value) for e in returned.value.elements]
    of_attention = {
        edit.code(e.value)
        for node in edit.body_of(forward)
        if (p := edit.assigned(node))
        and isinstance(p[0], cst.Tuple)
        and edit.is_call(p[1], f"self.{wrapper.attention_attr}")
        for e in p[0].elements[1:]
    }
    return len(names) == 2 and all(n.isidentifier() for n in names) and names[1] not in of_attention


def _port_layer(
    work: Work,
    facts: LayerFacts,
    attention: AttentionFacts | LayerFacts | None,
    *,
    returns_both: bool = False,
    takes_both: bool = False,
) -> None:
    """`attention`: what the class calls for it, which may be a module around the attention.

    That module may return two tensors, which the layer takes apart.
    """
    mixers = recurrent.mixers_of(work, facts)
    cls = work.cls(facts.cls)
    forward, init = edit.method(cls, "forward"), edit.method(cls, "__init__")
    if forward is None or init is None:
        raise Blocker(f"{facts.cls} has no forward or no __init__.", facts.line)
    if "positions" in edit.parameters(forward):
        return
    hidden = edit.parameters(forward)[0]
    inside = ""
    if attention is not None:
        inside = edit.parameters(edit.method(work.cls(attention.cls), "forward"))[1]
    body = edit.body_of(
        prune.drop_dropout_calls(prune.inference_only(forward), prune.dropout_attributes(cls))
    )
    body = [
        _call_attention(node, facts.attention_attr, inside, work, unpack=takes_both)
        for node in body
    ]
    if not returns_both:
        body = [_one_tensor(node, hidden) for node in body]
    body = _outputs_as_tensor(body, facts.attention_attr)
    body = prune.live_body(
        recurrent.nested(body, lambda n: recurrent.call(n, mixers, work, facts.cls))
    )
    signature = edit.function(
        f"def forward(self, positions: torch.Tensor, {hidden}: torch.Tensor)"
        f" -> {'tuple[torch.Tensor, torch.Tensor]' if returns_both else 'torch.Tensor'}:\n    pass"
    )
    new = edit.with_body(signature, body)
    check_no_leftovers(new, forward, facts.cls, work)
    cls = set_method(cls, new)
    made = {facts.attention_attr: "attention", **{a: "mlp" for a in facts.mlp_attrs}}
    init_body = recurrent.nested(
        _inference_init(edit.body_of(init)),
        lambda n: recurrent.construct(work, _construct(n, made, work), mixers),
    )
    signature = attention_signature(init)
    if mixers or _shares_arguments(work, facts):
        signature = recurrent.with_model_config(signature)
    cls = rewrite_init(cls, signature, init_body, _layer_index(init, init_body))
    work.put(plain_module(cls))
    work.did.append(
        f"{facts.cls}: takes positions and returns one tensor; the residual adds are the author's."
    )


def _shares_arguments(work: Work, facts: LayerFacts) -> bool:
    """Is the class chosen from a table, by a call that is the same for layers with a state?"""
    if not work.facts.recurrent:
        return False
    init = edit.method(work.cls(work.facts.model), "__init__")
    return facts in work.facts.layers and facts.cls not in edit.names_read(init)


def port_mlp(work: Work, name: str) -> None:
    """The module inside the layer only learns its name: linears stay until step parallel."""
    cls = work.cls(name)
    init, forward = edit.method(cls, "__init__"), edit.method(cls, "forward")
    if init is None or forward is None or "prefix" in edit.parameters(init):
        return
    cls = name_activation(cls)
    init, forward = edit.method(cls, "__init__"), edit.method(cls, "forward")
    unpacked = [
        t
        for t in edit.find(forward, lambda n: isinstance(n, cst.Assign))
        if "shape" in edit.code(t.value)
    ]
    if unpacked:
        line = work.line_of(edit.code(unpacked[0]).strip())
        raise Blocker(
            f"{name}.forward unpacks a [batch, seq, hidden] shape; tokens are flat in vLLM.", line
        )
    clean = prune.drop_dropout_calls(prune.inference_only(forward), prune.dropout_attributes(cls))
    clean = edit.with_body(clean, [s for s in edit.body_of(clean) if not _assigns_itself(s)])
    cls = set_method(cls, clean)
    signature = ", ".join(
        [*attention_signature(init).split(", cache_config")[0].split(", "), 'prefix: str = ""']
    )
    work.put(plain_module(rewrite_init(cls, signature, edit.body_of(init))))
    work.did.append(f"{name}: takes the prefix that names its linears for quantisation.")


def _assigns_itself(node: edit.Statement) -> bool:
    pair = edit.assigned(node)
    return pair is not None and edit.code(pair[0]) == edit.code(pair[1])


def _call_attention(
    node: edit.Statement, attr: str, inside: str, work: Work, *, unpack: bool
) -> edit.Statement:
    """self.self_attn(x, attention_mask=..., ...) -> self.self_attn(positions=positions, ...)."""

    def change(here: cst.CSTNode) -> cst.CSTNode | None:
        if not _calls(here, attr):
            return None
        given = edit.call_argument(here, 0, inside)
        if given is None:
            raise Blocker(
                f"{work.facts.layer.cls}.forward passes no {inside} to self.{attr}.",
                work.facts.layer.line,
            )
        called = edit.code(here.func)
        return edit.expression(f"{called}(positions=positions, {inside}={edit.code(given)})")

    def first_target(here: cst.CSTNode) -> cst.CSTNode | None:
        if isinstance(here, cst.Assign) and _calls(here.value, attr):
            target = here.targets[0].target
            if isinstance(target, cst.Tuple):
                return here.with_changes(targets=[cst.AssignTarget(target.elements[0].value)])
        if (
            isinstance(here, cst.Subscript)
            and _calls(here.value, attr)
            and edit.code(here).endswith("[0]")
        ):
            return here.value
        return None

    called = edit.replace(node, change)
    return called if unpack else edit.replace(called, first_target)


def _calls(node: cst.CSTNode, attr: str) -> bool:
    """Is it a call of self.attr, or of an element of that list?"""
    called = edit.code(node.func) if isinstance(node, cst.Call) else ""
    return re.fullmatch(rf"self\.{attr}(\[\d+\])?", called) is not None


def _outputs_as_tensor(body: list[edit.Statement], attr: str) -> list[edit.Statement]:
    """outputs = self.attn(...); a = outputs[0] -> the attention returns one tensor now."""
    names = {
        edit.code(pair[0])
        for node in body
        if (pair := edit.assigned(node)) and edit.is_call(pair[1], f"self.{attr}")
    }
    return [
        edit.replace(
            node,
            lambda n: (
                n.value
                if isinstance(n, cst.Subscript)
                and edit.code(n.value) in names
                and edit.code(n).endswith("[0]")
                else None
            ),
        )
        for node in body
    ]


def _one_tensor(node: edit.Statement, hidden: str) -> edit.Statement:
    """return (hidden_states, ...) -> return hidden_states."""
    small = edit.single(node)
    if isinstance(small, cst.Return) and isinstance(small.value, cst.Tuple):
        return node.with_changes(body=[small.with_changes(value=small.value.elements[0].value)])
    return node


def _construct(node: edit.Statement, made: dict[str, str], work: Work) -> edit.Statement:
    """Pass prefix (and the cache configuration) to the submodules; layer_idx is in the prefix."""

    def line(here: cst.CSTNode) -> cst.CSTNode | None:
        pair = edit.assigned_attribute(here) if isinstance(here, cst.SimpleStatementLine) else None
        if pair is None or pair[0] not in made:
            return None
        name = pair[0]
        listed = edit.is_call(pair[1], "nn.ModuleList") and isinstance(
            pair[1].args[0].value, cst.ListComp
        )
        if listed:  # the number in the list is part of the name
            loop = pair[1].args[0].value.for_in
            index = edit.code(loop.target)
            if index == "_":
                index = "i"
                numbered = loop.with_changes(target=cst.Name(index))
                here = here.deep_replace(loop, numbered)
            name = f"{name}.{{{index}}}"
        return edit.replace(here, lambda n: _constructed(n, name, made[pair[0]], work))

    return edit.replace(node, line)


def _constructed(node: cst.CSTNode, attr: str, kind: str, work: Work) -> cst.CSTNode | None:
    """One constructor call with its prefix; None for what takes none."""
    if not isinstance(node, cst.Call) or not work.has(edit.code(node.func)):
        return None
    name = edit.code(node.func)
    if kind != "attention" and "prefix" not in edit.parameters(
        edit.method(work.cls(name), "__init__")
    ):
        return None
    kept = [
        a
        for a in node.args
        if edit.code(a.value) != "layer_idx" and not (a.keyword and a.keyword.value == "layer_idx")
    ]
    arguments = [edit.flat(a.with_changes(comma=cst.MaybeSentinel.DEFAULT)) for a in kept]
    if kind == "attention":
        arguments.append("cache_config=cache_config")
    arguments.append(f'prefix=f"{{prefix}}.{attr}"')
    return edit.make_call(name, *arguments)


def check_no_leftovers(new: cst.FunctionDef, old: cst.FunctionDef, name: str, work: Work) -> None:
    """Stop if the new forward still reads an argument that it no longer has."""
    star = old.params.star_kwarg
    gone = {*edit.parameters(old), *((star.name.value,) if star else ())} - set(
        edit.parameters(new)
    )
    bound: set[str] = set()
    for target in edit.find(new, lambda n: isinstance(n, cst.AssignTarget)):
        bound |= {n.value for n in edit.find(target, lambda n: isinstance(n, cst.Name))}
    for leftover in sorted((gone & edit.names_read(new.body)) - bound):
        raise Blocker(
            f"{name}.forward still needs {leftover!r}, which vLLM does not pass.",
            work.line_of(leftover),
            "Rewrite what uses it by hand, then draft again.",
        )
