"""Step parallel, feed-forward: gate and up in one column-parallel linear, down row-parallel."""

from __future__ import annotations

import libcst as cst

from portkit.analysis.facts import MlpFacts
from portkit.draft import edit
from portkit.draft.blocker import Blocker
from portkit.draft.transforms.constructors import add_parameter, linear_statement
from portkit.draft.transforms.parallel_chain import shard_chains
from portkit.draft.work import Work, set_method

FUSED = "gate_up_proj"
_MODULES = {"nn.SiLU()": '"silu"', "nn.GELU()": '"gelu"', "nn.ReLU()": '"relu"'}


def port_mlp(work: Work, facts: MlpFacts) -> None:
    cls = work.cls(facts.cls)
    init, forward = edit.method(cls, "__init__"), edit.method(cls, "forward")
    made = {edit.code(n.func) for n in edit.find(init, lambda n: isinstance(n, cst.Call))}
    if "nn.Linear" not in made:
        return
    parallel = {m for m in made if m.endswith("ParallelLinear")}
    if parallel:
        raise Blocker(
            f"{facts.cls} has both nn.Linear and {sorted(parallel)[0]}.",
            facts.line,
            "Finish or undo that class, then draft again.",
        )
    if facts.kind == "unknown" or (facts.kind == "plain" and not _has_name(facts)):
        _by_chains(work, cls, facts)
        return
    body: list[edit.Statement] = []
    for node in edit.body_of(init):
        attr = (edit.assigned_attribute(node) or ("",))[0]
        if facts.kind == "gated" and attr in (facts.gate.attr, facts.up.attr):
            if not any(
                edit.assigned_attribute(s) and edit.assigned_attribute(s)[0] == FUSED for s in body
            ):
                body.append(_merged(node, facts))
        elif facts.kind == "gated_fused" and attr == facts.up.attr:
            body.append(linear_statement(node, "MergedColumnParallelLinear", _halves(node)))
        elif facts.kind == "plain" and attr == facts.up.attr:
            body.append(linear_statement(node, "ColumnParallelLinear"))
        elif attr == facts.down.attr:
            body.append(linear_statement(node, "RowParallelLinear"))
        elif attr == facts.act:
            body.append(_activation(node, facts))
        else:
            body.append(node)
    cls = set_method(
        cls,
        add_parameter(edit.with_body(init, body), "quant_config: QuantizationConfig | None = None"),
    )
    up = facts.up.attr if facts.kind != "gated" else FUSED
    x = edit.parameters(forward)[0]
    first = f"{x}, _ = self.{up}({x})" if facts.kind == "plain" else f"gate_up, _ = self.{up}({x})"
    inner = x if facts.kind == "plain" else "gate_up"
    new = edit.statements(
        f"{first}\n{x} = self.{facts.act}({inner})\n"
        f"{x}, _ = self.{facts.down.attr}({x})\nreturn {x}"
    )
    work.put(set_method(cls, edit.with_body(forward, new)))
    what = {
        "gated": f"{facts.gate and facts.gate.attr} and {facts.up.attr} -> "
        f"MergedColumnParallelLinear {FUSED}",
        "gated_fused": f"{facts.up.attr} -> MergedColumnParallelLinear",
        "plain": f"{facts.up.attr} -> ColumnParallelLinear",
    }[facts.kind]
    work.did.append(f"{facts.cls}: {what}, {facts.down.attr} -> RowParallelLinear; one all-reduce.")


def _merged(node: edit.Statement, facts: MlpFacts) -> edit.Statement:
    """One linear for gate and up, in the order that the activation expects."""
    if facts.gate.bias != facts.up.bias:
        raise Blocker(
            f"{facts.cls}: {facts.gate.attr} and {facts.up.attr} differ in their bias.", facts.line
        )
    if (facts.gate.in_features, facts.gate.out_features) != (
        facts.up.in_features,
        facts.up.out_features,
    ):
        raise Blocker(
            f"{facts.cls}: {facts.gate.attr} and {facts.up.attr} differ in size.", facts.line
        )
    size = edit.flat(edit.call_argument(edit.assigned_attribute(node)[1], 1, "out_features"))
    return linear_statement(node, "MergedColumnParallelLinear", f"[{size}] * 2", FUSED)


def _halves(node: edit.Statement) -> str:
    """[size] * 2 from the 2 * size that the checkpoint's fused linear has."""
    size = edit.call_argument(edit.assigned_attribute(node)[1], 1, "out_features")
    if isinstance(size, cst.BinaryOperation) and isinstance(size.operator, cst.Multiply):
        left, right = edit.flat(size.left), edit.flat(size.right)
        if left == "2":
            return f"[{right}] * 2"
        if right == "2":
            return f"[{left}] * 2"
    shown = edit.flat(size)
    return f"[{shown if isinstance(size, cst.Name | cst.Attribute) else f'({shown})'} // 2] * 2"


def _activation(node: edit.Statement, facts: MlpFacts) -> edit.Statement:
    """The activation by the same name; vLLM's gated ones multiply by the second half themselves."""
    value = edit.assigned_attribute(node)[1]
    written = edit.flat(value)
    if written.startswith("ACT2FN[") and written.endswith("]"):
        name = written.removeprefix("ACT2FN[").removesuffix("]")
    elif written in _MODULES:
        name = _MODULES[written]
    else:
        raise Blocker(
            f"{facts.cls}.{facts.act} = {written} is no activation that vLLM has by name.",
            facts.line,
        )
    function = "get_act_fn" if facts.kind == "plain" else "get_act_and_mul_fn"
    made = edit.statement(f"self.{facts.act} = {function}({name})")
    if facts.kind != "plain":
        made = edit.comment_before(made, "act(first half) * second half, in one kernel")
    return made.with_changes(leading_lines=[*node.leading_lines, *made.leading_lines])


def _has_name(facts: MlpFacts) -> bool:
    """Does vLLM have the activation by name?"""
    return facts.activation.startswith("ACT2FN[") or facts.activation in _MODULES


def _by_chains(work: Work, cls: cst.ClassDef, facts: MlpFacts) -> None:
    """A feed-forward of another shape: split what splits exactly, the rest is whole everywhere."""
    init = edit.method(cls, "__init__")
    every = edit.find(init, lambda n: edit.is_call(n, "nn.Linear"))
    assigned = [s for s in edit.find(init, lambda n: isinstance(n, cst.Assign)) if s.value in every]
    if len(every) != len(assigned):
        raise Blocker(
            f"{facts.cls} makes linears in a way that portkit cannot follow ({facts.why}).",
            facts.line,
        )
    new = add_parameter(init, "quant_config: QuantizationConfig | None = None")
    cls, whole = shard_chains(work, set_method(cls, new))
    work.put(cls)
    if whole:
        why = f" ({facts.why})" if facts.why else ""
        work.warnings.append(
            f"{facts.cls} is whole on every rank{why}. Decide how to shard it."
            if len(whole) == len(every)
            else f"{facts.cls}: {', '.join(whole)} whole on every rank{why}."
        )
        work.did.append(f"{facts.cls}: {', '.join(whole)} -> ReplicatedLinear.")
    if len(whole) < len(every):
        work.did.append(f"{facts.cls}: linears divided by columns and rows, or gathered behind it.")
