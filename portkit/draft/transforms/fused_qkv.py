"""One linear for query, key and value: cut for flat tokens, then sharded by heads.

The checkpoint's order of rows is a fact (analysis/fused_qkv.py). In step forward the projection is
still whole, so the draft cuts it as the checkpoint has it; in step parallel vLLM's
QKVParallelLinear keeps all q, then k, then v: the rows are put in that order while they are loaded.
"""

from __future__ import annotations

import libcst as cst

from portkit.analysis.facts import AttentionFacts
from portkit.analysis.fused_qkv import FusedQkv
from portkit.draft import edit
from portkit.draft.blocker import Blocker
from portkit.draft.transforms.attention_values import Value
from portkit.draft.work import Work, set_method

SPLIT = "qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)"


def cut_flat(
    work: Work, forward: cst.FunctionDef
) -> tuple[cst.FunctionDef, dict[str, dict[str, Value]]]:
    """Step forward: the author's cut, for [num_tokens, features].

    Returns the forward and, for the statement that cuts, what its names stand for. A projection
    that keeps all q, then all k, then all v is cut by the author's own statements.
    """
    facts = work.facts.attention
    layout = facts.fused
    if layout is None or layout.is_plain:
        return forward, {}
    cut_apart = parts(layout, "qkv", facts.head_dim)
    cut = edit.comment_before(
        edit.statement(f"{targets(layout)} = (part.flatten(-2) for part in {cut_apart})"),
        f"The checkpoint keeps {words(layout)}.",
    )
    body = _around(facts, layout, forward, "qkv = {call}", [cut])
    values = {
        name: Value("tensor", cst.Name(name), shape)
        for name, shape in zip(layout.names, layout.layouts, strict=True)
    }
    return edit.with_body(forward, body), {edit.code(cut): values}


def cut_parallel(facts: AttentionFacts, forward: cst.FunctionDef) -> list[edit.Statement]:
    """Step parallel: one projection, split by the sizes of this rank."""
    layout = facts.fused
    if layout is None:
        raise Blocker(
            f"{facts.cls}.forward does not cut self.{facts.qkv.attr} into query, key and value "
            "in a way that can be followed.",
            facts.qkv.line,
        )
    cut = edit.statement(f"{', '.join(layout.names)} = {SPLIT}")
    return _around(facts, layout, forward, "qkv, _ = {call}", [cut])


def reorders(facts: AttentionFacts | None) -> bool:
    """Does the checkpoint keep the rows of the projection in another order than vLLM?"""
    return facts is not None and facts.fused is not None and not facts.fused.is_plain


def add_loader(cls: cst.ClassDef, facts: AttentionFacts) -> cst.ClassDef:
    """The method that puts the checkpoint's rows in vLLM's order, if they are in another.

    AutoWeightsLoader calls the load_weights of a module inside the model for what is below it. A
    weight_loader around the layer's own would not do: vLLM exchanges that when it quantises while
    loading, or loads again.
    """
    layout = facts.fused
    if not reorders(facts):
        return cls
    groups = {"1": "1", "heads": "self.total_num_heads", "kv_heads": "self.total_num_kv_heads"}
    group = groups.get(layout.groups, layout.groups)
    if layout.groups == "heads":
        cut = "fused.chunk(3, dim + 1)"
    else:
        q, kv = (
            f"{total} // {group} * {facts.head_dim}"
            if group != "1"
            else f"{total} * {facts.head_dim}"
            for total in ("self.total_num_heads", "self.total_num_kv_heads")
        )
        if layout.groups == "kv_heads":
            kv = facts.head_dim
        sizes = ", ".join(q if letter == "q" else kv for letter in layout.order)
        cut = f"fused.split([{sizes}], dim + 1)"
    method = edit.function(f"""
def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
    def in_order() -> Iterable[tuple[str, torch.Tensor]]:
        for name, weight in weights:
            layer, _, kind = name.rpartition(".")
            dim = getattr(getattr(self.{layout.attr}, kind, None), "output_dim", None)
            if layer == "{layout.attr}" and dim is not None:
                fused = weight.unflatten(dim, ({group}, -1))
                {", ".join(layout.order)} = (part.flatten(dim, dim + 1) for part in {cut})
                weight = torch.cat([q, k, v], dim)
            yield name, weight

    return AutoWeightsLoader(self).load_weights(in_order())
""")
    doc = edit.statement(
        f'"""Put the rows in vLLM\'s order; the checkpoint keeps {words(layout)}."""'
    )
    return set_method(cls, edit.with_body(method, [doc, *edit.body_of(method)]))


# ---- helpers ------------------------------------------------------------------------------------


def targets(layout: FusedQkv) -> str:
    named = dict(zip("qkv", layout.names, strict=True))
    return ", ".join(named[letter] for letter in layout.order)


def words(layout: FusedQkv) -> str:
    order = "(" + ", ".join(layout.order) + ")"
    if layout.groups == "1":
        return f"{order} one after the other"
    what = {"heads": "each head", "kv_heads": "each KV head and its queries"}
    return f"{order} together for " + what.get(layout.groups, f"each of {layout.groups} blocks")


def parts(layout: FusedQkv, name: str, dim: str) -> str:
    """Expression of the three parts, each [..., groups, heads of the part * head_dim]."""
    if layout.groups == "heads":
        return f"{name}.unflatten(-1, (-1, 3 * {dim})).chunk(3, dim=-1)"
    heads, kv_heads = (
        n.replace("config.", "self.config.") if n.startswith("config.") else n
        for n in (layout.num_heads, layout.num_kv_heads)
    )
    count = kv_heads if layout.groups == "kv_heads" else layout.groups
    if heads == kv_heads:
        return f"{name}.unflatten(-1, ({count}, -1)).chunk(3, dim=-1)"
    q = f"{heads} // {count} * {dim}"
    kv = dim if layout.groups == "kv_heads" else f"{kv_heads} // {count} * {dim}"
    sizes = ", ".join(q if letter == "q" else kv for letter in layout.order)
    return f"{name}.unflatten(-1, ({count}, -1)).split([{sizes}], dim=-1)"


def _around(
    facts: AttentionFacts,
    layout: FusedQkv,
    forward: cst.FunctionDef,
    projection: str,
    cut: list[edit.Statement],
) -> list[edit.Statement]:
    """The forward with another cut; what stood in between and is still read stays before it."""
    body = edit.body_of(forward)
    first = body[layout.first]
    call = edit.find(first, lambda n: edit.is_call(n, f"self.{layout.attr}"))
    if len({edit.code(c) for c in call}) != 1 or not call[0].args:
        raise Blocker(f"{facts.cls}.forward calls self.{layout.attr} in branches.", facts.qkv.line)
    between = [
        node
        for number, node in enumerate(body[layout.first + 1 : layout.last + 1], layout.first + 1)
        if number not in layout.dropped
    ]
    pair = edit.assigned(first)
    if pair is not None and isinstance(pair[0], cst.Name):
        between = [edit.rename_reads(n, {pair[0].value: "qkv"}) for n in between]
    rest = [*cut, *body[layout.last + 1 :]]
    kept: list[edit.Statement] = []
    for node in reversed(between):
        bound = edit.assigned(node)
        read = set().union(*(edit.names_read(n) for n in [*kept, *rest]))
        if (
            bound is not None
            and isinstance(bound[0], cst.Name | cst.Tuple)
            and not {n.value for n in edit.find(bound[0], lambda n: isinstance(n, cst.Name))} & read
        ):
            continue
        kept.insert(0, node)
    made = edit.statement(projection.format(call=edit.flat(call[0])))
    made = made.with_changes(leading_lines=first.leading_lines)
    return [*body[: layout.first], made, *kept, *rest]
