"""Step parallel: experts without weights, which return tokens as they are.

vLLM's own way (`zero_expert_type`) takes one routing rule and needs Triton. Here the block adds
those tokens itself, on any platform and after any rule: among the fused experts such a choice is
the first expert's, by a weight of zero.
"""

from __future__ import annotations

import libcst as cst

from portkit.analysis.moe_facts import MoeFacts
from portkit.draft import edit
from portkit.draft.blocker import Blocker
from portkit.draft.transforms.parallel_router import ROUTE, Call
from portkit.draft.work import set_method

_METHOD = '''
def route({signature}) -> tuple[torch.Tensor, torch.Tensor]:
    """The router's choice; an expert that hands its tokens on has no weight among the others."""
    weights, experts = self.{router}.route(hidden_states, gating_output, topk, renormalize)
    handed_on = experts >= self.num_real_experts
    return weights.masked_fill(handed_on, 0.0), experts.masked_fill(handed_on, 0)
'''
_ADDED = """
weights, experts = self.{router}.route({given}, router_logits, self.top_k, False)
weights = weights.masked_fill(experts < self.num_real_experts, 0.0)
handed_on = ({given} * weights.sum(dim=-1, keepdim=True)).to({given}.dtype)
"""


def hand_on(facts: MoeFacts, call: Call, cls: cst.ClassDef) -> cst.ClassDef:
    """The drafted block with the tokens that such experts return."""
    init, forward = edit.method(cls, "__init__"), edit.method(cls, "forward")
    names = {"weights", "experts", "handed_on"} & edit.names_read(forward)
    if call.extra or names or not call.given.isidentifier():
        raise Blocker(
            f"{facts.experts.cls} has experts that return their tokens as they are, and "
            f"{facts.cls} routes in a way that they cannot be told apart.",
            facts.line,
        )
    experts = f"self.{facts.experts_attr}"
    body: list[edit.Statement] = []
    for node in edit.body_of(forward):
        body.append(
            edit.replace(
                node,
                lambda n: (
                    edit.expression(f"{edit.code(n)} + handed_on")
                    if edit.is_call(n, experts)
                    else None
                ),
            )
        )
        pair = edit.assigned(node)
        if pair and edit.is_call(pair[1], f"self.{facts.router_attr}"):
            added = edit.statements(_ADDED.format(router=facts.router_attr, given=call.given))
            note = f"Experts from {facts.experts.handed_on_from} on return tokens as they are."
            body += [edit.comment_before(added[0], note), *added[1:]]
    cls = set_method(cls, edit.with_body(forward, body))
    sizes = edit.statements(
        f"self.top_k = {facts.router.top_k}\nself.num_real_experts = {facts.experts.handed_on_from}"
    )
    made: list[edit.Statement] = []
    for node in edit.body_of(init):
        if (edit.assigned_attribute(node) or ("",))[0] == facts.experts_attr:
            made += sizes
        if (edit.assigned_attribute(node) or ("",))[0] not in ("top_k", "num_real_experts"):
            made.append(node)
    cls = set_method(cls, edit.with_body(init, made))
    method = _METHOD.format(signature=ROUTE, router=facts.router_attr)
    return set_method(cls, edit.function(method))
