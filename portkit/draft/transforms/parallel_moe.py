"""Step parallel, mixture of experts: vLLM's fused experts, a gate that is whole on every rank.

The block's own statements stay: only its router now hands out logits, and the choice of experts
moves into `FusedMoEFactory` - by its arguments where vLLM has the rule, as the author's arithmetic
in a method where it has not.
"""

from __future__ import annotations

import libcst as cst

from portkit.analysis.moe_facts import MoeFacts
from portkit.draft import edit
from portkit.draft.blocker import Blocker
from portkit.draft.transforms.constructors import add_parameter, linear_statement, pass_argument
from portkit.draft.transforms.expert_layouts import checkpoint_layout, constants_guard
from portkit.draft.transforms.handed_on import hand_on
from portkit.draft.transforms.parallel_router import Call, gate_statements, port_router
from portkit.draft.work import Work, set_method

LOGITS = "router_logits"
_QUANT = "quant_config: QuantizationConfig | None = None"


def port_moe(work: Work, facts: MoeFacts) -> None:
    """Rewrite one block; nothing if it holds no experts of its own any more."""
    cls = work.cls(facts.cls)
    if facts.experts.why:
        raise Blocker(
            f"{facts.experts.cls}: {facts.experts.why}.",
            facts.experts.line,
            "vLLM's FusedMoEFactory is where a human would start.",
        )
    init, forward = edit.method(cls, "__init__"), edit.method(cls, "forward")
    call = _router_call(facts, forward)
    routing = port_router(work, facts, call)
    cls = set_method(cls, _forward(facts, forward, call, routing.returns_bias))
    linears = [
        p[0] for s in edit.body_of(init) if (p := edit.assigned_attribute(s)) and _linear(p[1])
    ]
    cls = set_method(cls, _unpacked(edit.method(cls, "forward"), linears))
    cls = set_method(cls, _init(work, facts, init, routing.arguments, routing.own_class))
    if facts.experts.handed_on_from:
        cls = hand_on(facts, call, cls)
    work.put(cls)
    rule = "vLLM's arguments" if not routing.custom else "the author's, in a method"
    work.did.append(
        f"{facts.cls}: {facts.experts.cls} -> FusedMoEFactory, each rank has a part of every "
        f"expert; the routing rule is {rule}."
    )


def _router_call(facts: MoeFacts, forward: cst.FunctionDef) -> Call:
    """How the block calls its router and what it does with the answer."""
    attr = f"self.{facts.router_attr}"
    where = f"{facts.cls}.forward"
    found = [
        n for n in edit.body_of(forward) if (p := edit.assigned(n)) and edit.is_call(p[1], attr)
    ]
    every = edit.find(forward, lambda n: edit.is_call(n, attr))
    chosen = edit.find(forward, lambda n: edit.is_call(n, f"self.{facts.experts_attr}"))
    if len(found) != 1 or len(every) != 1 or len(chosen) != 1:
        raise Blocker(f"{where} does not call its router and its experts once each.", facts.line)
    target, call = edit.assigned(found[0])
    names = [edit.code(e.value) for e in target.elements] if isinstance(target, cst.Tuple) else []
    given = [edit.code(a.value) for a in chosen[0].args]
    order = (facts.experts.index, facts.experts.weights)
    by_name = {a.keyword.value: edit.code(a.value) for a in chosen[0].args if a.keyword}
    index, weights = (by_name.get(n) or given[1 + _at(facts, n)] for n in order)
    if index not in names or weights not in names:
        raise Blocker(
            f"{where} changes what the router chose before the experts see it.", facts.line
        )
    for name in (index, weights):
        uses = edit.find(forward, lambda n, name=name: isinstance(n, cst.Name) and n.value == name)
        if len(uses) != 2:
            raise Blocker(f"{where} needs {name!r} beside its experts.", facts.line)
    extra = {}
    inside = edit.parameters(forward)
    for position, argument in enumerate(call.args[1:], 1):
        value = _substituted(edit.code(argument.value), forward)
        if set(edit.names_read(edit.expression(value))) & set(inside):
            raise Blocker(f"{where} passes {value} to its router.", facts.line)
        extra[argument.keyword.value if argument.keyword else position] = value
    return Call(
        found[0], edit.code(call.args[0].value), names.index(index), names.index(weights), extra
    )


def _at(facts: MoeFacts, name: str) -> int:
    """0 or 1: where this parameter stands behind the tokens."""
    return 0 if facts.experts.index_first == (name == facts.experts.index) else 1


def _substituted(value: str, forward: cst.FunctionDef) -> str:
    """A local name of forward that only stands for something of the module."""
    pairs = [p for n in edit.body_of(forward) if (p := edit.assigned(n))]
    found = [p[1] for p in pairs if edit.code(p[0]) == value]
    return edit.flat(found[0]) if len(found) == 1 else value


def _forward(
    facts: MoeFacts, forward: cst.FunctionDef, call: Call, returns_bias: bool
) -> cst.FunctionDef:
    """router_logits = gate(x); experts(x, router_logits)."""
    target = f"{LOGITS}, _" if returns_bias else LOGITS
    made = edit.statement(f"{target} = self.{facts.router_attr}({call.given})")
    made = made.with_changes(leading_lines=call.statement.leading_lines)

    def change(here: cst.CSTNode) -> cst.CSTNode | None:
        if edit.is_call(here, f"self.{facts.experts_attr}"):
            first = edit.flat(here.args[0].value)
            return edit.expression(f"self.{facts.experts_attr}({first}, {LOGITS})")
        return None

    unused = {v for v in _locals_for(forward, call)}
    body = [made if n is call.statement else edit.replace(n, change) for n in edit.body_of(forward)]
    body = [n for n in body if not ((p := edit.assigned(n)) and edit.code(p[0]) in unused)]
    return edit.with_body(forward, body)


def _locals_for(forward: cst.FunctionDef, call: Call) -> list[str]:
    """Local names that only the router's call read."""
    passed = [edit.code(a.value) for a in edit.assigned(call.statement)[1].args[1:]]
    rest = [n for n in edit.body_of(forward) if n is not call.statement]
    return [
        p for p in passed if p.isidentifier() and not any(p in edit.names_read(n) for n in rest)
    ]


def _linear(value: cst.BaseExpression) -> bool:
    return edit.is_call(value, "nn.Linear", "torch.nn.Linear")


def _unpacked(forward: cst.FunctionDef, linears: list[str]) -> cst.FunctionDef:
    """self.x(y) -> self.x(y)[0]: vLLM's linears return (output, bias)."""
    names = [f"self.{attr}" for attr in linears]
    if not names:
        return forward
    return edit.replace(
        forward,
        lambda n: (
            cst.Subscript(n, [cst.SubscriptElement(cst.Index(cst.Integer("0")))])
            if edit.is_call(n, *names)
            else None
        ),
    )


# ---- __init__ -----------------------------------------------------------------------------------


def _init(
    work: Work,
    facts: MoeFacts,
    init: cst.FunctionDef,
    arguments: list[str],
    own_class: bool,
) -> cst.FunctionDef:
    made = _experts(work, facts, arguments)
    body: list[edit.Statement] = []
    for node in edit.body_of(init):
        pair = edit.assigned_attribute(node)
        attr = pair[0] if pair else ""
        if attr == facts.experts_attr:
            continue
        if attr == facts.router_attr:
            body += gate_statements(work, facts, node, own_class)
        elif pair and _linear(pair[1]):
            body.append(linear_statement(node, "ReplicatedLinear"))
        elif isinstance(node, cst.If):
            body.append(_quantised(work, facts, _optional_linears(node)))
        else:
            body.append(_quantised(work, facts, node))
    body += [*constants_guard(facts.experts), edit.blank_before(made)]
    written = "".join(edit.code(n) for n in body)
    if "layer_idx" in written and "layer_idx = " not in written:
        body.insert(1, edit.statement("layer_idx = extract_layer_index(prefix)"))
    return add_parameter(edit.with_body(init, body), _QUANT)


def _optional_linears(node: cst.If) -> cst.If:
    """Linears that the config may leave out: they return a tensor, as what is there instead."""

    def change(here: cst.CSTNode) -> cst.CSTNode | None:
        pair = edit.assigned_attribute(here) if isinstance(here, cst.SimpleStatementLine) else None
        if pair is None or not _linear(pair[1]):
            return None
        made = linear_statement(here, "ReplicatedLinear")
        return pass_argument(made, edit.assigned_attribute(made)[1], "return_bias=False")

    return edit.replace(node, change)


def _quantised(work: Work, facts: MoeFacts, node: edit.Statement) -> edit.Statement:
    """Pass quant_config to the feed-forwards beside the experts."""
    calls = edit.find(node, lambda n: bool(facts.shared) and edit.is_call(n, *facts.shared))
    for call in calls:
        made = edit.method(work.cls(edit.code(call.func)), "__init__")
        if "quant_config" in edit.parameters(made):
            node = pass_argument(node, call, "quant_config=quant_config")
    return node


def _experts(work: Work, facts: MoeFacts, arguments: list[str]) -> edit.Statement:
    experts, router = facts.experts, facts.router
    written = [
        f"num_experts={experts.num_experts}",
        f"top_k={router.top_k}",
        f"hidden_size={experts.hidden_size}",
        f"intermediate_size={experts.intermediate_size}",
        *arguments,
    ]
    if not experts.has_gate:
        written.append(f"activation=activation_without_mul({experts.activation})")
        work.warnings.append(
            f"{experts.cls}: experts without a gate. vLLM runs them on GPUs only: what was checked "
            "on a CPU, was checked without layers of them."
        )
    elif experts.activation.strip("'\"") != "silu":
        written.append(f"activation={experts.activation}")
    written += checkpoint_layout(work, experts, facts)
    written += ["quant_config=quant_config", f'prefix=f"{{prefix}}.{facts.experts_attr}"']
    missing = [w for w in written if w.endswith("=")]
    if missing:
        raise Blocker(f"{facts.cls}: cannot tell {missing[0][:-1]} of its experts.", facts.line)
    return edit.statement(
        f"self.{facts.experts_attr} = FusedMoEFactory(\n    " + ",\n    ".join(written) + ",\n)"
    )
