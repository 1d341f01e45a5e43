"""Step parallel, routers: logits by a gate that is whole on every rank; the rule goes to vLLM."""

from __future__ import annotations

from dataclasses import dataclass

import libcst as cst

from portkit.analysis.classes import text, view_module
from portkit.analysis.moe_facts import MoeFacts, RouterFacts
from portkit.draft import edit
from portkit.draft.blocker import Blocker
from portkit.draft.transforms.constructors import add_parameter
from portkit.draft.work import Work, set_members, set_method

ROUTE = (
    "self, hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, renormalize: bool"
)


@dataclass(frozen=True)
class Call:
    """The block's call of its router."""

    statement: edit.Statement
    given: str
    """The tokens, as source."""
    index: int
    weights: int
    """Which of the router's results are the chosen experts and their weights."""
    extra: dict[str | int, str]
    """Further arguments, by name or position: source over the block's self."""


@dataclass(frozen=True)
class Ported:
    """What the block needs to know of its router's draft."""

    arguments: list[str]
    """For FusedMoEFactory."""
    own_class: bool
    """Does the router keep a class of its own?"""
    returns_bias: bool
    """Does calling it return (logits, bias), as vLLM's linears do?"""
    custom: bool


def port_router(work: Work, facts: MoeFacts, call: Call) -> Ported:
    """Draft the router's class, or do without it; see `Ported`."""
    router = facts.router
    arguments = _known(work, facts, call)
    if facts.experts.handed_on_from:  # the block looks at the choice, too
        arguments = None
    custom = arguments is None
    if arguments is None:
        arguments = _custom(work, facts, call)
    own_class = custom or router.linear not in ("", "super")
    if own_class:
        _own_class(work, facts, call, custom)
    return Ported(arguments, own_class, router.linear in ("", "super"), custom)


# ---- rules that vLLM has ------------------------------------------------------------------------


def _known(work: Work, facts: MoeFacts, call: Call) -> list[str] | None:
    routing, router = facts.router.routing, facts.router
    if routing is None:
        return None
    arguments = [f"renormalize={routing.renormalize}"]
    grouped = bool(routing.groups or routing.correction_bias or routing.scoring == "sigmoid")
    if grouped:
        # One group is no grouping: vLLM's name for a choice by corrected or sigmoid scores.
        arguments += [
            "use_grouped_topk=True",
            f"num_expert_group={routing.groups or 1}",
            f"topk_group={routing.topk_group or 1}",
            f'scoring_func="{routing.scoring}"',
        ]
    if routing.scale:
        arguments.append(f"routed_scaling_factor={routing.scale}")
        if not grouped:
            arguments.append("apply_routed_scale_to_output=True")
    if routing.correction_bias:
        bias = _given(work, facts, call, routing.correction_bias)
        if " if " in bias:
            return None
        arguments.append(f"e_score_correction_bias={bias}")
    if router.full_precision:
        arguments.append("router_logits_dtype=torch.float32")
    return arguments


def _given(work: Work, facts: MoeFacts, call: Call, name: str) -> str:
    """The router's own attribute, or what the block passes for this parameter."""
    if name.startswith("self."):
        return f"self.{facts.router_attr}.{name.removeprefix('self.')}"
    parameters = edit.parameters(edit.method(work.cls(facts.router.cls), "forward"))
    return call.extra.get(name) or call.extra[parameters.index(name)]


def _custom(work: Work, facts: MoeFacts, call: Call) -> list[str]:
    route = f"self.{facts.router_attr}.route"
    if call.extra:
        names = edit.parameters(edit.method(work.cls(facts.router.cls), "forward"))
        named = {names[n] if isinstance(n, int) else n: value for n, value in call.extra.items()}
        bound = ", ".join(f"{name}={value}" for name, value in named.items())
        route = f"partial({route}, {bound})"
    if facts.experts.handed_on_from:
        route = "self.route"
    return ["renormalize=False", f"custom_routing_function={route}"]


# ---- the gate -----------------------------------------------------------------------------------


def gate_statements(
    work: Work, facts: MoeFacts, node: edit.Statement, own_class: bool
) -> list[edit.Statement]:
    """self.gate = GateLinear(...), and the correction of its scores if it had one."""
    router, attr = facts.router, facts.router_attr
    if own_class:
        call = edit.assigned_attribute(node)[1]
        arguments = [edit.flat(a.with_changes(comma=cst.MaybeSentinel.DEFAULT)) for a in call.args]
        arguments.append(f'prefix=f"{{prefix}}.{attr}"')
        new = edit.make_call(router.cls, *arguments)
        return [edit.replace(node, lambda n: new if edit.is_call(n, router.cls) else None)]
    made = edit.statement(f"self.{attr} = {gate_call(router, 'prefix', attr)}")
    statements = [made.with_changes(leading_lines=node.leading_lines)]
    bias = router.routing.correction_bias if router.routing else ""
    if bias.startswith("self."):
        name = bias.removeprefix("self.")
        view = view_module(work.module.code).classes[router.cls]
        value = text(view.resolve(view.get(name).value)).replace("self.config.", "config.")
        statements.append(edit.statement(f"self.{attr}.{name} = {value}"))
    return statements


def gate_call(router: RouterFacts, prefix: str, attr: str) -> str:
    """GateLinear(...) for the router's linear map."""
    arguments = [router.hidden_size, router.num_experts, f"bias={router.biased}"]
    if router.full_precision:
        arguments.append("out_dtype=torch.float32")
    arguments.append(f'prefix=f"{{{prefix}}}.{attr}"' if attr else f"prefix={prefix}")
    return f"GateLinear({', '.join(arguments)})"


# ---- a class of its own -------------------------------------------------------------------------


def _own_class(work: Work, facts: MoeFacts, call: Call, custom: bool) -> None:
    router = facts.router
    cls = work.cls(router.cls)
    init, forward = edit.method(cls, "__init__"), edit.method(cls, "forward")
    is_gate = router.linear in ("", "super")
    body: list[edit.Statement] = []
    for node in edit.body_of(init):
        small = edit.single(node)
        attr = (edit.assigned_attribute(node) or ("",))[0]
        if isinstance(small, cst.Expr) and edit.code(small.value).startswith("super().__init__("):
            if is_gate:
                made = gate_call(router, "prefix", "").replace("GateLinear", "super().__init__", 1)
                node = edit.statement(made)
        elif is_gate and attr in ("weight", "bias"):
            continue
        elif attr == router.linear and attr:
            node = edit.statement(f"self.{attr} = {gate_call(router, 'prefix', attr)}")
        body.append(node)
    if is_gate:
        cls = cls.with_changes(bases=[cst.Arg(cst.Name("GateLinear"))])
    cls = set_method(cls, add_parameter(edit.with_body(init, body), 'prefix: str = ""'))
    members = [m for m in edit.members(cls) if m is not edit.method(cls, "forward")]
    cls = set_members(cls, members)
    if not is_gate:
        cls = set_method(cls, _logits(router, edit.parameters(forward)[0]))
    if custom:
        cls = set_method(cls, _route(work, facts, forward, call))
    work.put(cls)


def _logits(router: RouterFacts, hidden: str) -> cst.FunctionDef:
    return edit.function(
        f"def forward(self, {hidden}: torch.Tensor) -> torch.Tensor:\n"
        f"    router_logits, _ = self.{router.linear}({hidden})\n"
        "    return router_logits"
    )


def _route(work: Work, facts: MoeFacts, forward: cst.FunctionDef, call: Call) -> cst.FunctionDef:
    """The author's statements after the logits, as vLLM's fused experts call them."""
    router = facts.router
    statements = _unwrapped(edit.body_of(forward))
    at = next(
        (
            i
            for i, n in enumerate(statements)
            if (p := edit.assigned(n)) and edit.code(p[0]) == router.logits
        ),
        None,
    )
    if at is None:
        raise Blocker(f"{router.cls}.forward makes its logits under a condition.", router.line)
    before, after = statements[:at], statements[at + 1 :]
    first = edit.replace(
        statements[at],
        lambda n: cst.Name("gating_output") if isinstance(n, cst.Call) and _is_linear(n) else None,
    )
    last = edit.single(after[-1])
    results = [e.value for e in last.value.elements]
    after[-1] = edit.statement(
        f"return {edit.flat(results[call.weights])}, {edit.flat(results[call.index])}"
    )
    bound = {edit.code(p[0]) for n in before if (p := edit.assigned(n))}
    read = set().union(*(edit.names_read(n) for n in after))
    hidden = edit.parameters(forward)[0]
    if (bound - {hidden}) & read:
        raise Blocker(
            f"{router.cls}.forward uses more than its logits for the choice: "
            f"{sorted((bound - {hidden}) & read)[0]}.",
            router.line,
        )
    extra = "".join(
        f", {name if isinstance(name, str) else edit.parameters(forward)[name]}: torch.Tensor"
        for name in call.extra
    )
    signature = ROUTE.replace("hidden_states", hidden, 1) if hidden != "hidden_states" else ROUTE
    made = edit.function(
        f"def route({signature}{extra}) -> tuple[torch.Tensor, torch.Tensor]:\n"
        '    """The weights and the experts of each token; vLLM has no such rule of its own."""'
    )
    doc = edit.body_of(made)
    return edit.with_body(made, [*doc, first, *after])


def _is_linear(node: cst.Call) -> bool:
    name = edit.code(node.func)
    return name.endswith(".linear") or name == "super().forward" or name.startswith("self.")


def _unwrapped(body: list[edit.Statement]) -> list[edit.Statement]:
    """Statements without the `with` blocks around them (autocast off, no gradients)."""
    flat: list[edit.Statement] = []
    for node in body:
        if isinstance(node, cst.With):
            flat += _unwrapped(list(node.body.body))
        else:
            flat.append(node)
    return flat
