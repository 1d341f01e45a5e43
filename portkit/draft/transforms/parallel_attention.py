"""Step parallel, attention: one fused QKV projection, heads divided among the ranks."""

from __future__ import annotations

import ast

import libcst as cst

from portkit.analysis.classes import ClassView, text, view_module
from portkit.analysis.facts import AttentionFacts, Linear
from portkit.analysis.read_blocks import head_factors
from portkit.draft import edit
from portkit.draft.blocker import Blocker
from portkit.draft.transforms.alibi_slopes import slopes_of_this_rank
from portkit.draft.transforms.constructors import add_parameter, linear_statement
from portkit.draft.transforms.forward_attention import local_name
from portkit.draft.transforms.fused_qkv import add_loader
from portkit.draft.transforms.parallel_flow import add_norm_helper, rewrite_forward
from portkit.draft.transforms.parallel_latent import port_latent_attention
from portkit.draft.transforms.parallel_parts import gate_statement, norms_of_own_heads, own_parts
from portkit.draft.transforms.parallel_whole import mixes_heads, port_whole_attention
from portkit.draft.work import Work, set_method

_HEADS = """
tp_size = get_tensor_model_parallel_world_size()
self.total_num_heads = {heads}
assert self.total_num_heads % tp_size == 0, (
    f"{{self.total_num_heads}} heads not divisible by {{tp_size}} ranks"
)
self.num_heads = self.total_num_heads // tp_size
self.total_num_kv_heads = {kv_heads}
if self.total_num_kv_heads >= tp_size:
    # Each rank keeps its part of the KV heads.
    assert self.total_num_kv_heads % tp_size == 0, (
        f"{{self.total_num_kv_heads}} KV heads not divisible by {{tp_size}} ranks"
    )
else:
    # Fewer KV heads than ranks: several ranks keep a copy of one head.
    assert tp_size % self.total_num_kv_heads == 0, (
        f"{{tp_size}} ranks cannot share {{self.total_num_kv_heads}} KV heads evenly"
    )
self.num_kv_heads = max(1, self.total_num_kv_heads // tp_size)
self.q_size = self.num_heads * {head_dim}
self.kv_size = self.num_kv_heads * {head_dim}
"""
_OF_THIS_RANK = ("num_heads", "num_kv_heads", "q_size", "kv_size", "v_size")
"""Attributes that _HEADS makes from the totals."""


def port_attention(work: Work) -> None:
    facts = work.facts.attention
    if facts is None:
        return
    cls = work.cls(facts.cls)
    init, forward = edit.method(cls, "__init__"), edit.method(cls, "forward")
    made = {edit.code(n.func) for n in edit.find(init, lambda n: isinstance(n, cst.Call))}
    if made & {"QKVParallelLinear", "ReplicatedLinear"} and "nn.Linear" not in made:
        return
    if "QKVParallelLinear" in made:
        raise Blocker(
            f"{facts.cls} has both QKVParallelLinear and nn.Linear.",
            facts.line,
            "Finish or undo that class, then draft again.",
        )
    if facts.o is None:
        raise Blocker(
            f"{facts.cls}: cannot tell which linear is the output projection.", facts.line
        )
    if facts.latent is not None:
        port_latent_attention(work)
        return
    why = mixes_heads(facts, cls)
    if why:
        port_whole_attention(work, facts, why)
        return
    view = view_module(work.module.code).classes[facts.cls]
    if facts.qkv is not None:
        first, fused_bias = facts.qkv, facts.qkv.bias
    else:
        first, fused_bias = _check_projections(facts, view)
    cls = set_method(cls, _init(work, cls, facts, view, first, fused_bias))
    cls = set_method(cls, rewrite_forward(work, facts, forward))
    work.put(add_loader(add_norm_helper(cls), facts))
    work.did.append(
        f"{facts.cls}: query, key and value -> one QKVParallelLinear, {facts.o.attr} -> "
        "RowParallelLinear; each rank has its heads, copies of KV heads if ranks outnumber them."
    )


def _check_projections(facts: AttentionFacts, view: ClassView) -> tuple[Linear, str]:
    """q, k, v must be heads * head_dim wide, read the same input and agree on the bias."""
    parts = (facts.q, facts.k, facts.v)
    if None in parts:
        raise Blocker(
            f"{facts.cls}: cannot tell which linears make query, key and value.", facts.line
        )
    biases = {p.bias for p in parts}
    if len(biases) != 1:
        raise Blocker(
            f"{facts.cls}: query, key and value differ in their bias "
            f"({', '.join(sorted(biases))}); "
            "one QKVParallelLinear has one setting.",
            parts[0].line,
        )
    for part, heads in zip(
        parts, (facts.num_heads, facts.num_kv_heads, facts.num_kv_heads), strict=False
    ):
        count = _resolved(view, heads)
        narrow = facts.value_dim if part is facts.v else ""
        dim = narrow or _resolved(view, facts.head_dim)
        wanted = (count, facts.query_parts if part is facts.q else 1)
        if head_factors(part, dim) != wanted:
            raise Blocker(
                f"{facts.cls}.{part.attr} is {part.out_features} wide, not {count} heads of {dim}.",
                part.line,
            )
    if len({p.in_features for p in parts}) != 1:
        raise Blocker(
            f"{facts.cls}: query, key and value read inputs of different sizes.", parts[0].line
        )
    return parts[0], parts[0].bias


def _resolved(view: ClassView, expression: str) -> str:
    return text(view.resolve(ast.parse(expression, mode="eval").body)).replace(
        "self.config.", "config."
    )


# ---- __init__ -----------------------------------------------------------------------------------


def _init(work, cls, facts: AttentionFacts, view, first: Linear, bias: str) -> cst.FunctionDef:
    init = edit.method(cls, "__init__")
    heads, kv_heads = _resolved(view, facts.num_heads), _resolved(view, facts.num_kv_heads)
    renames = _total_names(view, heads, kv_heads)
    body: list[edit.Statement] = []
    gates = {gate.attr: gate for gate in facts.gates}
    gated = facts.query_parts == 2
    narrow = f"\n    v_head_size={facts.value_dim}," if facts.value_dim else ""
    fused = facts.qkv.attr if facts.qkv is not None else "qkv_proj"
    removed = {part.attr for part in (facts.q, facts.k, facts.v) if part is not None}
    for node in edit.body_of(init):
        pair = edit.assigned_attribute(node)
        attr = pair[0] if pair else ""
        if attr in ("total_num_heads", "total_num_kv_heads") or f"self.{attr}" in renames:
            if edit.names_read(node) & {"tp_size"}:
                raise Blocker(
                    f"{facts.cls} already divides its heads; finish that class by hand.", facts.line
                )
            continue
        if attr == first.attr:
            node_in = edit.call_argument(pair[1], 0, "in_features")
            totals = {"heads": heads, "kv_heads": kv_heads}
            shown = {name: local_name(view, total) for name, total in totals.items()}
            arithmetic = edit.statements(_HEADS.format(head_dim=facts.head_dim, **shown))
            if facts.value_dim:
                size = f"self.v_size = self.num_kv_heads * {facts.value_dim}"
                arithmetic.append(edit.statement(size))
            arithmetic[0] = edit.blank_before(arithmetic[0])
            body += arithmetic
            body.append(
                edit.blank_before(
                    edit.statement(f"""
{"# Each query head has a gate of its size beside it." if gated else ""}
self.{fused} = QKVParallelLinear(
    {edit.flat(node_in)},
    {facts.head_dim},
    self.total_num_heads{" * 2" if gated else ""},
    self.total_num_kv_heads,
    bias={bias},
    quant_config=quant_config,
    prefix=f"{{prefix}}.{fused}",{narrow}
)
""")
                )
            )
        elif attr in removed:
            continue
        elif attr == facts.o.attr:
            body.append(linear_statement(node, "RowParallelLinear"))
        elif attr in gates:
            body.append(gate_statement(node, gates[attr], facts, view))
        elif pair and edit.is_call(pair[1], "Attention"):
            body.append(_attention(node, pair[1], renames))
        else:
            body.append(node)
    body = [_rename(s, renames) for s in body]
    body = own_parts(work, facts, view, body)
    body = norms_of_own_heads(work, facts, view, body)
    body = slopes_of_this_rank(_after_head_dim(body, facts, renames))
    return add_parameter(
        edit.with_body(init, body), "quant_config: QuantizationConfig | None = None"
    )


def _total_names(view: ClassView, heads: str, kv_heads: str) -> dict[str, str]:
    """Attributes that hold the total head counts -> the names that vLLM's files give them."""
    names: dict[str, str] = {}
    for item in view.assigned:
        value = text(view.resolve(item.value)).replace("self.config.", "config.")
        if (
            not item.condition
            and value in (heads, kv_heads)
            and (isinstance(item.value, ast.Attribute | ast.Name) or item.attr in _OF_THIS_RANK)
        ):
            wants_kv = "key_value" in item.attr or "kv" in item.attr
            if value == kv_heads and (wants_kv or heads != kv_heads):
                names[f"self.{item.attr}"] = "self.total_num_kv_heads"
            elif value == heads:
                names[f"self.{item.attr}"] = "self.total_num_heads"
    return names


def _rename(node: edit.Statement, renames: dict[str, str]) -> edit.Statement:
    pair = edit.assigned_attribute(node)
    if pair and (pair[0] in _OF_THIS_RANK or edit.is_call(pair[1], "Attention")):
        return node
    return _renamed(node, renames)


def _renamed(node, renames: dict[str, str]):
    def change(here: cst.CSTNode) -> cst.CSTNode | None:
        if isinstance(here, cst.Attribute) and edit.code(here) in renames:
            return edit.expression(renames[edit.code(here)])
        return None

    return edit.replace(node, change)


def _after_head_dim(
    body: list[edit.Statement], facts: AttentionFacts, renames: dict[str, str]
) -> list[edit.Statement]:
    """If something above reads the totals (head_dim = hidden // heads), name them before it."""
    start = next(i for i, s in enumerate(body) if edit.code(s).strip().startswith("tp_size ="))
    for name in ("total_num_kv_heads", "total_num_heads"):
        early = [i for i, s in enumerate(body[:start]) if name in edit.self_attributes_read(s)]
        if early:
            index = next(
                i for i, s in enumerate(body) if (edit.assigned_attribute(s) or ("",))[0] == name
            )
            body.insert(early[0], body.pop(index).with_changes(leading_lines=[]))
            start += 1
    return body


def _attention(node: edit.Statement, call: cst.Call, renames: dict[str, str]) -> edit.Statement:
    """Attention(...) with this rank's heads and the quantisation of the KV cache."""
    given = [a for a in call.args if a.keyword is None][:3]
    rest = [
        a
        for a in call.args
        if a.keyword is not None
        and a.keyword.value not in ("num_heads", "num_kv_heads", "quant_config")
    ]
    if len(given) < 3:
        raise Blocker("Attention(...) must be given heads, head size and scale by position.")
    arguments = [
        "self.num_heads",
        edit.flat(_renamed(given[1].value, renames)),
        edit.flat(_renamed(given[2].value, renames)),
        "num_kv_heads=self.num_kv_heads",
    ]
    for argument in rest:
        arguments.append(f"{argument.keyword.value}={edit.flat(argument.value)}")
        if argument.keyword.value == "cache_config":
            arguments.append("quant_config=quant_config")
    made = edit.statement("self.attn = Attention(\n    " + ",\n    ".join(arguments) + ",\n)")
    target = edit.assigned_attribute(node)[0]
    made = edit.replace_text(made, "self.attn", f"self.{target}")
    return made.with_changes(leading_lines=node.leading_lines)
