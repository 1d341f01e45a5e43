"""Step parallel, attention: all heads on every rank where they cannot be divided.

Heads that are added to, cut from or repeated over other heads belong on one rank. Dividing them
well is a decision about that model; keeping them all is always right. The projections' weights are
divided all the same: each rank computes its columns, and what they give is gathered.
"""

from __future__ import annotations

import libcst as cst

from portkit.analysis.facts import AttentionFacts
from portkit.draft import edit
from portkit.draft.transforms.constructors import add_parameter, linear_statement, pass_argument
from portkit.draft.work import Work, set_method

_MIXING = ("repeat", "repeat_interleave", "roll", "flip", "cumsum")
_CUTTING = ("chunk", "split", "tensor_split")


def mixes_heads(facts: AttentionFacts, cls: cst.ClassDef) -> str:
    """What in the class combines different heads; "" if each head keeps to itself."""
    init, forward = edit.method(cls, "__init__"), edit.method(cls, "forward")
    attends = edit.find(init, lambda n: edit.is_call(n, "Attention"))
    if len(attends) > 1:
        return f"it attends {len(attends)} times and combines the results"
    projections = {f"self.{x.attr}" for x in (facts.q, facts.k, facts.v, facts.qkv) if x}
    names = {
        edit.code(p[0])
        for n in edit.find(forward, lambda n: edit.assigned(n) is not None)
        if (p := edit.assigned(n)) and edit.is_call(p[1], *projections)
    }
    for call in edit.find(forward, lambda n: isinstance(n, cst.Call)):
        if not isinstance(call.func, cst.Attribute):
            continue
        method, owner = call.func.attr.value, call.func.value
        inside = isinstance(owner, cst.Call) and "unflatten" in edit.code(owner.func)
        projected = edit.is_call(owner, *projections) or edit.code(owner) in names
        if method in _MIXING and not inside:
            return f"`{edit.flat(call)}` combines heads"
        if method in _CUTTING and not inside and not projected:
            return f"`{edit.flat(call)}` takes some of the heads"
    return ""


def port_whole_attention(work: Work, facts: AttentionFacts, why: str) -> None:
    """Of every linear each rank computes its columns, which are gathered: all heads are there."""
    cls = work.cls(facts.cls)
    init, forward = edit.method(cls, "__init__"), edit.method(cls, "forward")
    linears: list[str] = []
    body: list[edit.Statement] = []
    for node in edit.body_of(init):
        pair = edit.assigned_attribute(node)
        if pair and edit.is_call(pair[1], "nn.Linear"):
            made = linear_statement(node, "ColumnParallelLinear", extra="gather_output=True")
            if not linears:
                made = edit.comment_before(made, f"PORT: all heads on every rank: {why}.")
            linears.append(pair[0])
            node = made
        elif pair and edit.is_call(pair[1], "Attention"):
            node = pass_argument(node, pair[1], "quant_config=quant_config")
        body.append(node)
    init = add_parameter(
        edit.with_body(init, body), "quant_config: QuantizationConfig | None = None"
    )

    def output_only(here: cst.CSTNode) -> cst.CSTNode | None:
        if edit.is_call(here, *(f"self.{attr}" for attr in linears)):
            return cst.Subscript(here, [cst.SubscriptElement(cst.Index(cst.Integer("0")))])
        return None

    work.put(set_method(set_method(cls, init), edit.replace(forward, output_only)))
    work.warnings.append(
        f"{facts.cls} has all heads on every rank, since {why}. Decide how to divide its heads."
    )
    work.did.append(
        f"{facts.cls}: linears -> ColumnParallelLinear, gathered: all heads on every rank."
    )
