"""Step parallel, multi-head latent attention: heads divided among the ranks, latents whole.

What makes or expands heads is column-parallel, what makes a latent is replicated (each rank needs
all of it, it is small), the output projection is row-parallel.
"""

from __future__ import annotations

import ast

import libcst as cst

from portkit.analysis.classes import ClassView, text, view_module
from portkit.analysis.facts import AttentionFacts
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
{local} = self.total_num_heads // tp_size
"""


def port_latent_attention(work: Work) -> None:
    """Shard the attention class; does nothing if no nn.Linear is left."""
    facts = work.facts.attention
    cls = work.cls(facts.cls)
    init, forward = edit.method(cls, "__init__"), edit.method(cls, "forward")
    view = view_module(work.module.code).classes[facts.cls]
    kinds = _kinds(facts, view)
    if not facts.num_heads.startswith("self."):
        raise Blocker(f"{facts.cls}: no attribute holds the number of heads.", facts.line)
    if facts.num_heads in edit.code(forward) and "tp_size" in edit.code(init):
        raise Blocker(f"{facts.cls} already divides its heads; finish it by hand.", facts.line)
    body = _shard(edit.body_of(init), facts, view, kinds)
    new = add_parameter(
        edit.with_body(init, body), "quant_config: QuantizationConfig | None = None"
    )
    cls = set_method(set_method(cls, new), _unpacked(forward, set(kinds)))
    work.put(cls)
    columns = ", ".join(a for a, kind in kinds.items() if kind == "ColumnParallelLinear")
    whole = ", ".join(a for a, kind in kinds.items() if kind == "ReplicatedLinear")
    work.did.append(
        f"{facts.cls}: {columns} -> ColumnParallelLinear by heads, {whole} -> ReplicatedLinear, "
        f"{facts.o.attr} -> RowParallelLinear; each rank has its heads and every latent."
    )


def _kinds(facts: AttentionFacts, view: ClassView) -> dict[str, str]:
    """Attribute -> vLLM's class, for every linear of the attention."""
    latent = facts.latent
    kinds = {linear.attr: "ColumnParallelLinear" for linear in (*latent.queries, latent.kv_heads)}
    latents = (*latent.query_latents, latent.kv_latent)
    kinds |= {linear.attr: "ReplicatedLinear" for linear in latents}
    kinds[latent.output.attr] = "RowParallelLinear"
    made = [i for i in view.assigned if text(getattr(i.value, "func", None)).endswith("nn.Linear")]
    strange = [item for item in made if item.attr not in kinds]
    if strange:
        raise Blocker(
            f"{facts.cls}.{strange[0].attr}: cannot tell how this linear takes part in attention.",
            strange[0].line,
        )
    return kinds


def _shard(
    body: list[edit.Statement], facts: AttentionFacts, view: ClassView, kinds: dict[str, str]
) -> list[edit.Statement]:
    local = facts.num_heads
    total = text(view.resolve(ast.parse(local, mode="eval").body)).replace(
        "self.config.", "config."
    )
    out: list[edit.Statement] = []
    for node in body:
        pair = edit.assigned_attribute(node)
        if pair is not None and f"self.{pair[0]}" == local:
            made = edit.statements(_HEADS.format(heads=total, local=local))
            made[0] = made[0].with_changes(leading_lines=node.leading_lines)
            out += made
        elif pair is not None and pair[0] in kinds:
            whole = edit.replace_text(node, local, "self.total_num_heads")
            out.append(linear_statement(whole, kinds[pair[0]]))
        elif pair is not None and edit.is_call(pair[1], "Attention"):
            out.append(_quantised_cache(node))
        elif isinstance(node, cst.If):
            branch = edit.with_body(node, _shard(edit.body_of(node), facts, view, kinds))
            if isinstance(node.orelse, cst.Else):
                other = _shard(edit.body_of(node.orelse), facts, view, kinds)
                branch = branch.with_changes(orelse=edit.with_body(node.orelse, other))
            out.append(branch)
        else:
            out.append(node)
    return out


def _quantised_cache(node: edit.Statement) -> edit.Statement:
    """Attention(..., cache_config=cache_config) also takes the quantisation of the cache."""
    return edit.replace(
        node,
        lambda n: (
            n.with_changes(args=_with_quant_config(n.args))
            if edit.is_call(n, "Attention")
            else None
        ),
    )


def _with_quant_config(arguments) -> list[cst.Arg]:
    out: list[cst.Arg] = []
    for argument in arguments:
        out.append(argument)
        if argument.keyword is not None and argument.keyword.value == "cache_config":
            name = cst.Name("quant_config")
            out.append(argument.with_changes(keyword=name, value=name))
    return out


def _unpacked(forward: cst.FunctionDef, linears: set[str]) -> cst.FunctionDef:
    """vLLM's linears return (output, bias)."""

    def output_alone(here: cst.CSTNode) -> cst.CSTNode | None:
        if isinstance(here, cst.Call) and edit.code(here.func).removeprefix("self.") in linears:
            return edit.expression(f"{edit.code(here)}[0]")
        return None

    def bound(here: cst.CSTNode) -> cst.CSTNode | None:
        if isinstance(here, cst.Assign) and isinstance(here.value, cst.Subscript):
            call = here.value.value
            if isinstance(call, cst.Call) and edit.code(call.func).removeprefix("self.") in linears:
                target = edit.expression(f"{edit.code(here.targets[0].target)}, _")
                return cst.Assign([cst.AssignTarget(target)], call)
        return None

    return edit.replace(edit.replace(forward, output_alone), bound)
