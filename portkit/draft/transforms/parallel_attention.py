"""Step parallel, attention: one fused QKV projection, heads divided among the ranks."""

from __future__ import annotations

import ast

import libcst as cst

from portkit.analysis.classes import ClassView, text, view_module
from portkit.analysis.facts import AttentionFacts, Linear
from portkit.draft import edit
from portkit.draft.blocker import Blocker
from portkit.draft.transforms.constructors import add_parameter, linear_statement
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
_SPLIT = "qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)"
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


def port_attention(work: Work) -> None:
    facts = work.facts.attention
    cls = work.cls(facts.cls)
    init, forward = edit.method(cls, "__init__"), edit.method(cls, "forward")
    made = {edit.code(n.func) for n in edit.find(init, lambda n: isinstance(n, cst.Call))}
    if "QKVParallelLinear" in made and "nn.Linear" not in made:
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
    view = view_module(work.module.code).classes[facts.cls]
    if facts.qkv is not None:
        first, fused_bias = facts.qkv, facts.qkv.bias
    else:
        first, fused_bias = _check_projections(facts, view)
    cls = set_method(cls, _init(work, cls, facts, view, first, fused_bias))
    cls = set_method(cls, _forward(work, facts, forward))
    work.put(_add_norm_helper(cls))
    work.did.append(
        f"{facts.cls}: {'one' if facts.qkv else 'three'} projection{'' if facts.qkv else 's'} -> QKVParallelLinear, "
        f"{facts.o.attr} -> RowParallelLinear; heads per rank, key/value heads copied when ranks outnumber them."
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
            f"{facts.cls}: query, key and value differ in their bias ({', '.join(sorted(biases))}); "
            "one QKVParallelLinear has one setting.",
            parts[0].line,
        )
    dim = _resolved(view, facts.head_dim)
    for part, heads in zip(
        parts, (facts.num_heads, facts.num_kv_heads, facts.num_kv_heads), strict=False
    ):
        count = _resolved(view, heads)
        if part.out_features not in (
            f"{count} * {dim}",
            f"{dim} * {count}",
            f"{count} * ({dim})",
            f"({dim}) * {count}",
        ):
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
            arithmetic = edit.statements(
                _HEADS.format(heads=heads, kv_heads=kv_heads, head_dim=facts.head_dim)
            )
            arithmetic[0] = edit.blank_before(arithmetic[0])
            body += arithmetic
            body.append(
                edit.blank_before(
                    edit.statement(f"""
self.qkv_proj = QKVParallelLinear(
    {edit.flat(node_in)},
    {facts.head_dim},
    self.total_num_heads,
    self.total_num_kv_heads,
    bias={bias},
    quant_config=quant_config,
    prefix=f"{{prefix}}.qkv_proj",
)
""")
                )
            )
        elif attr in removed:
            continue
        elif attr == facts.o.attr:
            body.append(linear_statement(node, "RowParallelLinear"))
        elif pair and edit.is_call(pair[1], "Attention"):
            body.append(_attention(node, pair[1]))
        else:
            body.append(node)
    body = [_rename(s, renames) for s in body]
    body = _after_head_dim(body, facts, renames)
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
            and isinstance(item.value, ast.Attribute)
        ):
            wants_kv = "key_value" in item.attr or "kv" in item.attr
            if value == kv_heads and (wants_kv or heads != kv_heads):
                names[f"self.{item.attr}"] = "self.total_num_kv_heads"
            elif value == heads:
                names[f"self.{item.attr}"] = "self.total_num_heads"
    return names


def _rename(node: edit.Statement, renames: dict[str, str]) -> edit.Statement:
    if "self.num_heads = self.total_num_heads // tp_size" in edit.code(
        node
    ) or "self.q_size" in edit.code(node):
        return node
    if edit.code(node).strip().startswith(("self.kv_size", "self.num_kv_heads", "self.attn =")):
        return node

    def change(here: cst.CSTNode) -> cst.CSTNode | None:
        if isinstance(here, cst.Attribute) and edit.code(here) in renames:
            return edit.expression(renames[edit.code(here)])
        return None

    return edit.replace(node, change)


def _after_head_dim(
    body: list[edit.Statement], facts: AttentionFacts, renames: dict[str, str]
) -> list[edit.Statement]:
    """If something before the arithmetic reads the totals (a head_dim of hidden // heads), name them first."""
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


def _attention(node: edit.Statement, call: cst.Call) -> edit.Statement:
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
        edit.flat(given[1].value),
        edit.flat(given[2].value),
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


# ---- forward ------------------------------------------------------------------------------------


def _forward(work: Work, facts: AttentionFacts, forward: cst.FunctionDef) -> cst.FunctionDef:
    body = _split_fused(facts, forward) if facts.qkv is not None else _fuse(facts, forward)
    body = [_unpack(node, facts.o.attr) for node in body]
    if facts.per_head_norm is False:
        body = _norms_over_ranks(work, facts, body)
    heads = {"num_heads", "num_key_value_heads"} & edit.self_attributes_read(cst.Module(body))
    if heads:
        raise Blocker(
            f"{facts.cls}.forward reads self.{sorted(heads)[0]}, which each rank now has a part of.",
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
    inputs = {edit.flat(found[0].args[0].value) for found in calls.values()}
    if len(inputs) != 1:
        raise Blocker(
            f"{facts.cls}: query, key and value project different tensors ({', '.join(sorted(inputs))}).",
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
    for node in body:
        holds = edit.find(node, lambda n: isinstance(n, cst.Call) and edit.code(n) in used)
        if holds and not placed:
            if isinstance(node, cst.If | cst.For):
                raise Blocker(
                    f"{facts.cls}.forward projects query, key and value inside an if or for.",
                    facts.line,
                )
            made = edit.statements(
                f"qkv, _ = self.qkv_proj({inputs.pop()})\n{', '.join(names)} = {_SPLIT}"
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


def _split_fused(facts: AttentionFacts, forward: cst.FunctionDef) -> list[edit.Statement]:
    """The checkpoint's own fused projection: slices by total sizes become one split by rank sizes."""
    attr = facts.qkv.attr
    body = edit.body_of(forward)
    index = next(
        (
            i
            for i, n in enumerate(body)
            if (p := edit.assigned(n)) and edit.is_call(p[1], f"self.{attr}")
        ),
        None,
    )
    if index is None:
        raise Blocker(
            f"{facts.cls}.forward does not assign self.{attr}(...) to a name.", facts.line
        )
    fused = edit.code(edit.assigned(body[index])[0])
    call = edit.assigned(body[index])[1]
    slices: list[tuple[str, str, str]] = []
    rest: list[edit.Statement] = []
    helpers: list[edit.Statement] = []
    for node in body[index + 1 :]:
        pair = edit.assigned(node)
        value = pair[1] if pair else None
        if (
            isinstance(value, cst.Subscript)
            and edit.code(value.value) == fused
            and isinstance(value.slice[-1].slice, cst.Slice)
        ):
            part = value.slice[-1].slice
            slices.append((edit.code(pair[0]), edit.flat(part.lower), edit.flat(part.upper)))
        elif (
            len(slices) < 3
            and pair
            and isinstance(pair[0], cst.Name)
            and fused not in edit.names_read(node)
        ):
            helpers.append(node)
        else:
            rest.append(node)
    in_order = (
        len(slices) == 3
        and not slices[0][1]
        and slices[0][2] == slices[1][1]
        and slices[1][2] == slices[2][1]
        and not slices[2][2]
    )
    given = edit.find(cst.Module(rest), lambda n: edit.is_call(n, "self.attn"))
    roles = [edit.code(a.value) for a in given[0].args] if given else []
    if (
        not in_order
        or roles != [name for name, _, _ in slices]
        or fused in set().union(*(edit.names_read(r) for r in rest))
    ):
        raise Blocker(
            f"{facts.cls}.forward does not cut {fused} into query, key and value one after the other.",
            facts.qkv.line,
        )
    helpers = [
        h
        for h in helpers
        if edit.code(edit.assigned(h)[0]) in set().union(*(edit.names_read(r) for r in rest))
    ]
    made = edit.statements(
        f"qkv, _ = self.qkv_proj({edit.flat(call.args[0].value)})\n{', '.join(roles)} = {_SPLIT}"
    )
    return [*body[:index], *made, *helpers, *rest]


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
    vllm_norms = ("RMSNorm", "GemmaRMSNorm", "nn.LayerNorm")
    for norm in facts.norms:
        if norm.cls not in vllm_norms or norm.size.startswith("("):
            raise Blocker(
                f"{facts.cls}.{norm.attr} ({norm.cls}) has weights for each head: each rank would need its own "
                "part of them, and a weight_loader that takes it.",
                norm.line,
            )
    if len(facts.norms) != 2:
        raise Blocker(
            f"{facts.cls} normalises over all heads with {len(facts.norms)} norms.", facts.line
        )
    query, key = (n.attr for n in facts.norms)

    def change(here: cst.CSTNode) -> cst.CSTNode | None:
        for attr, copies in ((query, "1"), (key, "self.num_kv_head_copies")):
            if edit.is_call(here, f"self.{attr}"):
                return edit.expression(
                    f"self.norm_all_heads(self.{attr}, {edit.flat(here.args[0].value)}, {copies})"
                )
        return None

    work.did.append(
        f"{facts.cls}: {query} and {key} normalise over all heads, so ranks gather them first."
    )
    return [edit.replace(n, change) for n in body]


def _add_norm_helper(cls: cst.ClassDef) -> cst.ClassDef:
    """Add the method that gathers, and the number of copies of a KV head, where they are used."""
    if "self.norm_all_heads(" not in edit.code(cls):
        return cls
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
    return set_method(cls, edit.function(_NORM_ALL_HEADS))
