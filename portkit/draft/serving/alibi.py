"""ALiBi: which functions make the bias, and the slopes in it as a function of the head count.

An ALiBi bias is a product: a slope for each head times the position of each key. The slopes are
the factor that does not depend on how long the sequence is; vLLM's Attention takes just them.
"""

from __future__ import annotations

from dataclasses import dataclass

import libcst as cst

from portkit.draft import edit, prune
from portkit.draft.serving.values import Env
from portkit.draft.work import set_method

SLOPES = "get_alibi_slopes"


@dataclass(frozen=True)
class Slopes:
    """The slopes of one ALiBi function."""

    function: cst.FunctionDef
    """get_alibi_slopes(num_heads, ...) -> [num_heads], the author's own computation."""
    rounds: bool
    """Does the author round slopes to bfloat16, which vLLM's Attention does not?"""


def alibi_functions(module: cst.Module) -> frozenset[tuple[str, str]]:
    """("", function) and (class, method that only calls it) for each that makes an ALiBi bias."""
    found: set[tuple[str, str]] = set()
    for item in module.body:
        if isinstance(item, cst.FunctionDef) and slopes_of(item) is not None:
            found.add(("", item.name.value))
    names = {name for _, name in found}
    for item in module.body:
        for member in edit.members(item) if isinstance(item, cst.ClassDef) else ():
            if not isinstance(member, cst.FunctionDef) or len(edit.body_of(member)) != 1:
                continue
            small = edit.single(edit.body_of(member)[0])
            if isinstance(small, cst.Return) and edit.is_call(small.value, *sorted(names)):
                found.add((item.name.value, member.name.value))
    return frozenset(found)


def slopes_of(function: cst.FunctionDef) -> Slopes | None:
    """The slopes, if the function returns slopes times key positions (reshaped, cast)."""
    body = [s for s in edit.body_of(function) if not edit.is_docstring(s)]
    small = edit.single(body[-1]) if body else None
    if not isinstance(small, cst.Return) or small.value is None:
        return None
    names = edit.names_read(small.value)
    for index in range(len(body) - 2, -1, -1):
        pair = edit.assigned(body[index])
        if pair is None or edit.code(pair[0]) not in names:
            continue
        if not isinstance(pair[1], cst.BinaryOperation):
            return None
        if not isinstance(pair[1].operator, cst.Multiply):
            return None
        return _factors(function, body[:index], pair[1])
    return None


def _factors(
    function: cst.FunctionDef, before: list[edit.Statement], product: cst.BinaryOperation
) -> Slopes | None:
    sequence = _sequence_names(function, before)
    heads = [p for p in edit.parameters(function) if "head" in p]
    for slopes, positions in ((product.left, product.right), (product.right, product.left)):
        if _free(slopes, sequence) or not _free(positions, sequence) or len(heads) != 1:
            continue
        reach = _reaching(positions, before)
        if not any(word in reach for word in ("arange(", "cumsum(")) or "pow(" in reach:
            continue
        if "pow(" not in _reaching(slopes, before):
            continue
        return _slopes(function, before, slopes, sequence)
    return None


def _sequence_names(function: cst.FunctionDef, body: list[edit.Statement]) -> set[str]:
    """Names that depend on the sequence: parameters but the heads and numbers, and from those."""
    numbers = {p.name.value for p in function.params.params if p.default is not None}
    numbers |= {p for p in edit.parameters(function) if "head" in p}
    names = set(edit.parameters(function)) - numbers
    for node in body:
        pair = edit.assigned(node)
        if pair is not None and _free(pair[1], names):
            names |= {n.value for n in edit.find(pair[0], lambda n: isinstance(n, cst.Name))}
    return names


def _free(node: cst.CSTNode, names: set[str]) -> bool:
    """Does an expression read one of the names for more than its device?"""
    return bool(edit.names_read(_anywhere(node)) & names)


def _anywhere(node):
    """Without `device=...`: the default device is where vLLM makes its tensors."""

    def change(here: cst.CSTNode) -> cst.CSTNode | None:
        if isinstance(here, cst.Call) and any(
            a.keyword is not None and a.keyword.value == "device" for a in here.args
        ):
            kept = [a for a in here.args if a.keyword is None or a.keyword.value != "device"]
            if kept:
                kept[-1] = kept[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
            return here.with_changes(args=kept)
        return None

    return edit.replace(node, change)


def _reaching(node: cst.CSTNode, body: list[edit.Statement]) -> str:
    """Source of an expression and of what it is made from."""
    names, text = edit.names_read(node), edit.code(node)
    for statement in reversed(body):
        bound = {
            n.value
            for t in edit.find(statement, lambda n: isinstance(n, cst.AssignTarget))
            for n in edit.find(t, lambda n: isinstance(n, cst.Name))
        }
        if bound & names:
            names |= edit.names_read(statement)
            text += edit.code(statement)
    return text


def _slopes(
    function: cst.FunctionDef,
    before: list[edit.Statement],
    slopes: cst.BaseExpression,
    sequence: set[str],
) -> Slopes:
    rounds = ".bfloat16()" in edit.code(slopes)
    plain = slopes
    while isinstance(plain, cst.Subscript) or (
        isinstance(plain, cst.Call) and edit.code(plain.func).endswith(".bfloat16")
    ):
        plain = plain.value if isinstance(plain, cst.Subscript) else plain.func.value
    body = [_anywhere(s) for s in before]
    body = prune.live_body([*body, edit.statement(f"return {edit.code(plain)}.flatten()")])
    kept = [
        edit.code(p.with_changes(comma=cst.MaybeSentinel.DEFAULT)).strip()
        for p in function.params.params
        if p.name.value not in sequence and p.name.value != "device"
    ]
    head = edit.function(f"def {SLOPES}({', '.join(kept)}) -> torch.Tensor:\n    pass")
    doc = edit.statement('"""ALiBi: how much each head minds how far a key is; [num_heads]."""')
    apart = [cst.EmptyLine(indent=False)] * 2
    new = edit.with_body(head, [doc, *body]).with_changes(leading_lines=apart)
    return Slopes(new, rounds)


def with_slopes(module: cst.Module) -> tuple[cst.Module, list[str]]:
    """The file with get_alibi_slopes beside the function that makes the bias, and notes."""
    body: list[cst.BaseStatement] = []
    notes: list[str] = []
    done = False
    for item in module.body:
        found = slopes_of(item) if isinstance(item, cst.FunctionDef) and not done else None
        if found is not None:
            done = True
            body.append(found.function)
            if found.rounds:
                notes.append(
                    f"{item.name.value} rounds the ALiBi bias to bfloat16; vLLM's Attention keeps "
                    "it exact: scores of keys far away differ a little."
                )
        body.append(item)
    return module.with_changes(body=body), notes


def refuse_optional(
    module: cst.Module, passed: dict[tuple[str, str], Env]
) -> tuple[cst.Module, list[str]]:
    """Leave out an ALiBi bias that a config field turns on and that only the mask carries.

    The attention asks just whether there is one. Its __init__ refuses such a config.
    """
    notes: list[str] = []
    for cls in [c for c in module.body if isinstance(c, cst.ClassDef)]:
        for name, known in passed.get((cls.name.value, "forward"), {}).items():
            forward = edit.method(cls, "forward")
            field = known.test.removeprefix("self.config.")
            if known.kind != "optional" or known.value != "alibi" or not field.isidentifier():
                continue
            if name in edit.names_read(edit.with_body(forward, edit.body_of(forward)).body):
                continue
            if known.test not in edit.code(forward):
                continue
            module = _without_field(module, field, cls.name.value)
            notes.append(
                f"{cls.name.value}: config.{field} is not ported, it adds an ALiBi bias to the "
                "mask, and vLLM's Attention takes no mask; __init__ refuses it."
            )
    return module, notes


def _without_field(module: cst.Module, field: str, refusing: str) -> cst.Module:
    """The file with config.<field> taken as False, and a class whose __init__ says so."""
    settings = {f"self.config.{field}", f"config.{field}"}
    named = {
        pair[0]
        for init in edit.find(module, lambda n: isinstance(n, cst.FunctionDef))
        for node in edit.body_of(init)
        if (pair := edit.assigned_attribute(node)) and edit.code(pair[1]) in settings
    }
    read = settings | {f"self.{attr}" for attr in named}

    def change(here: cst.CSTNode) -> cst.CSTNode | None:
        if isinstance(here, cst.Attribute) and edit.code(here) in read:
            return cst.Name("False")
        return None

    body: list[cst.CSTNode] = []
    for item in module.body:
        init = edit.method(item, "__init__") if isinstance(item, cst.ClassDef) else None
        if init is not None:
            kept = [
                s
                for s in edit.body_of(init)
                if (edit.assigned_attribute(s) or ("",))[0] not in named
            ]
            item = set_method(item, edit.with_body(init, kept))
        item = edit.replace(item, change)
        if init is not None and item.name.value == refusing:
            init = edit.method(item, "__init__")
            refusal = edit.statement(f"""
if config.{field}:
    raise NotImplementedError(
        "config.{field} is not ported: the original puts the ALiBi bias into the "
        "attention mask, and vLLM's Attention takes no mask"
    )
""")
            item = set_method(item, edit.with_body(init, [*edit.body_of(init), refusal]))
        body.append(item)
    return module.with_changes(body=body)
