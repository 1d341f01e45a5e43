"""Step parallel, attention's forward: one projection split by this rank's sizes."""

from __future__ import annotations

import libcst as cst

from portkit.analysis.facts import AttentionFacts
from portkit.draft import edit
from portkit.draft.blocker import Blocker
from portkit.draft.transforms.fused_qkv import SPLIT, cut_parallel
from portkit.draft.work import Work, set_method

_NORM_ALL_HEADS = '''
def norm_all_heads(self, norm: nn.Module, x: torch.Tensor, copies: int) -> torch.Tensor:
    """Normalise over the heads of all ranks; x has this rank's [num_tokens, heads * dim]."""
    tp_size = get_tensor_model_parallel_world_size()
    if tp_size == 1:
        return norm(x)
    width = x.shape[-1]
    every = tensor_model_parallel_all_gather(x.contiguous())
    # `copies` ranks in a row hold the same heads: count them once.
    every = every.unflatten(-1, (tp_size // copies, copies, width))[..., 0, :]
    every = norm(every.flatten(-2))
    start = get_tensor_model_parallel_rank() // copies * width
    return every[..., start : start + width].contiguous()
'''


def rewrite_forward(work: Work, facts: AttentionFacts, forward: cst.FunctionDef) -> cst.FunctionDef:
    body = cut_parallel(facts, forward) if facts.qkv is not None else _fuse(facts, forward)
    for attr in (facts.o.attr, *(gate.attr for gate in facts.gates)):
        body = [_unpack(node, attr) for node in body]
    if facts.per_head_norm is False or facts.output_norms:
        body = _norms_over_ranks(work, facts, body)
    heads = {"num_heads", "num_key_value_heads"} & edit.self_attributes_read(cst.Module(body))
    if heads:
        raise Blocker(
            f"{facts.cls}.forward reads self.{sorted(heads)[0]}, "
            "which each rank now has a part of.",
            facts.line,
        )
    return edit.with_body(forward, body)


def _fuse(facts: AttentionFacts, forward: cst.FunctionDef) -> list[edit.Statement]:
    """self.q_proj(x), self.k_proj(x), self.v_proj(x) -> one projection, split by size."""
    attrs = [facts.q.attr, facts.k.attr, facts.v.attr]
    body = edit.body_of(forward)
    calls = {a: edit.find(forward, lambda n, a=a: edit.is_call(n, f"self.{a}")) for a in attrs}
    for attr, found in calls.items():
        if len(found) != 1:
            raise Blocker(f"{facts.cls}.forward calls self.{attr} {len(found)} times.", facts.line)
        if not found[0].args:
            raise Blocker(f"{facts.cls}.forward calls self.{attr} with nothing.", facts.line)
    inputs = {edit.flat(found[0].args[0].value) for found in calls.values()}
    if len(inputs) != 1:
        raise Blocker(
            f"{facts.cls}: query, key and value project different tensors "
            f"({', '.join(sorted(inputs))}).",
            facts.line,
        )
    names = []
    for attr in attrs:
        target = next(
            (
                p[0]
                for n in body
                if (p := edit.assigned(n))
                and edit.find(p[1], lambda n, a=attr: edit.is_call(n, f"self.{a}"))
            ),
            None,
        )
        names.append(target.value if isinstance(target, cst.Name) else attr.removesuffix("_proj"))
    if len(set(names)) != 3:
        names = ["q", "k", "v"]
    used = {edit.code(found[0]): name for found, name in zip(calls.values(), names, strict=False)}
    out: list[edit.Statement] = []
    placed = False
    gated = facts.query_parts == 2
    for node in body:
        holds = edit.find(node, lambda n: isinstance(n, cst.Call) and edit.code(n) in used)
        if holds and not placed:
            if isinstance(node, cst.If | cst.For):
                raise Blocker(
                    f"{facts.cls}.forward projects query, key and value inside an if or for.",
                    facts.line,
                )
            split = SPLIT.replace("[self.q_size", "[2 * self.q_size") if gated else SPLIT
            if facts.value_dim:
                split = split.replace("kv_size]", "v_size]")
            made = edit.statements(
                f"qkv, _ = self.qkv_proj({inputs.pop()})\n{', '.join(names)} = {split}"
            )
            made[0] = made[0].with_changes(leading_lines=node.leading_lines)
            node = node.with_changes(leading_lines=[])
            out += made
            placed = True
        node = edit.replace(
            node,
            lambda n: (
                cst.Name(used[edit.code(n)])
                if isinstance(n, cst.Call) and edit.code(n) in used
                else None
            ),
        )
        pair = edit.assigned(node)
        if pair and edit.code(pair[0]) == edit.code(pair[1]):
            continue
        out.append(node)
    return out


def _unpack(node: edit.Statement, attr: str) -> edit.Statement:
    """x = self.o_proj(y) -> x, _ = self.o_proj(y): vLLM's linears return (output, bias)."""
    small = edit.single(node)
    if isinstance(small, cst.Assign) and edit.is_call(small.value, f"self.{attr}"):
        target = edit.expression(f"{edit.code(small.targets[0].target)}, _")
        return node.with_changes(body=[small.with_changes(targets=[cst.AssignTarget(target)])])
    return edit.replace(
        node,
        lambda n: (
            cst.Subscript(n, [cst.SubscriptElement(cst.Index(cst.Integer("0")))])
            if edit.is_call(n, f"self.{attr}")
            else None
        ),
    )


def _norms_over_ranks(
    work: Work, facts: AttentionFacts, body: list[edit.Statement]
) -> list[edit.Statement]:
    """A norm over all heads must see the heads of every rank."""
    known = {"RMSNorm", "GemmaRMSNorm", "nn.LayerNorm"}
    known |= {n.name for n in work.facts.norm_classes if n.formula != "unknown"}
    wide = () if facts.per_head_norm is not False else facts.norms
    wide = [n for n in wide if not n.size.startswith("(")]
    for norm in (*wide, *facts.output_norms):
        if norm.cls not in known:
            raise Blocker(
                f"{facts.cls}.{norm.attr} ({norm.cls}) normalises over all heads in a way that "
                "portkit does not know.",
                norm.line,
            )
    if len(wide) not in (0, 2):
        raise Blocker(f"{facts.cls} normalises over all heads with {len(wide)} norms.", facts.line)
    copies = {n.attr: c for n, c in zip(wide, ("1", "self.num_kv_head_copies"), strict=False)}
    copies |= {n.attr: "1" for n in facts.output_norms}
    if not copies:
        return body

    def change(here: cst.CSTNode) -> cst.CSTNode | None:
        for attr, count in copies.items():
            if edit.is_call(here, f"self.{attr}"):
                return edit.expression(
                    f"self.norm_all_heads(self.{attr}, {edit.flat(here.args[0].value)}, {count})"
                )
        return None

    names = " and ".join(copies)
    work.did.append(f"{facts.cls}: {names} normalise over all heads, so ranks gather them first.")
    return [edit.replace(n, change) for n in body]


def add_norm_helper(cls: cst.ClassDef) -> cst.ClassDef:
    """Add the method that gathers, and the number of copies of a KV head, where they are used."""
    if "self.num_kv_head_copies" in edit.code(cls):
        init = edit.method(cls, "__init__")
        body: list[edit.Statement] = []
        for node in edit.body_of(init):
            body.append(node)
            if (edit.assigned_attribute(node) or ("",))[0] == "num_kv_heads":
                body.append(
                    edit.statement(
                        "self.num_kv_head_copies = max(1, tp_size // self.total_num_kv_heads)"
                    )
                )
        cls = set_method(cls, edit.with_body(init, body))
    if "self.norm_all_heads(" not in edit.code(cls):
        return cls
    return set_method(cls, edit.function(_NORM_ALL_HEADS))
