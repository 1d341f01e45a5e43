"""Causal masks that a class keeps in a buffer, and the sliding window in them."""

from __future__ import annotations

from dataclasses import dataclass

import libcst as cst

from portkit.draft import edit


@dataclass(frozen=True)
class CausalBuffers:
    """Attributes with a lower triangle of ones; `window` is its width as source, "" if it has none.

    A triangle xor the triangle W below it leaves W keys: the token and the W - 1 before it, which
    is what vLLM calls a sliding window of W.
    """

    attrs: frozenset[str] = frozenset()
    window: str = ""


def causal_buffers(cls: cst.ClassDef) -> CausalBuffers:
    init = edit.method(cls, "__init__")
    if init is None:
        return CausalBuffers()
    made: dict[str, str] = {}
    window = ""
    attrs: set[str] = set()
    for node in edit.body_of(init):
        pair = edit.assigned(node)
        if pair is not None and isinstance(pair[0], cst.Name):
            made[pair[0].value] = edit.flat(pair[1])
        elif isinstance(node, cst.If) and node.orelse is None:
            for inner in edit.body_of(node):
                name, width = _banded(inner)
                if name and "torch.tril(" in made.get(name, ""):
                    window = f"{width} if {edit.flat(node.test)} else None"
        attribute = edit.assigned_attribute(node)
        if attribute and edit.is_call(attribute[1], "nn.Buffer"):
            given = edit.flat(attribute[1].args[0].value)
            if "torch.tril(torch.ones(" in made.get(given, given):
                attrs.add(attribute[0])
    return CausalBuffers(frozenset(attrs), window)


def _banded(node: cst.CSTNode) -> tuple[str, str]:
    """(x, W) of `x = torch.bitwise_xor(x, torch.tril(x, -W))`."""
    pair = edit.assigned(node)
    if pair is None or not edit.is_call(pair[1], "torch.bitwise_xor", "torch.logical_xor"):
        return "", ""
    name = edit.code(pair[0])
    first, second = (a.value for a in pair[1].args)
    if edit.code(first) != name or not edit.is_call(second, "torch.tril"):
        return "", ""
    offset = edit.call_argument(second, 1, "diagonal")
    if not isinstance(offset, cst.UnaryOperation) or not isinstance(offset.operator, cst.Minus):
        return "", ""
    return name, edit.flat(offset.expression)


def without(cls: cst.ClassDef, attrs: frozenset[str]) -> cst.ClassDef:
    """The class without these buffers and the local names that only they read."""
    init = edit.method(cls, "__init__")
    read = set().union(
        *(
            edit.self_attributes_read(m)
            for m in edit.members(cls)
            if isinstance(m, cst.FunctionDef) and m.name.value == "forward"
        )
    )
    gone = attrs - read
    if init is None or not gone:
        return cls
    body = [s for s in edit.body_of(init) if (edit.assigned_attribute(s) or ("",))[0] not in gone]
    for _ in range(8):
        kept = [s for i, s in enumerate(body) if not _only_unread(s, body[i + 1 :], body)]
        if len(kept) == len(body):
            break
        body = kept
    from portkit.draft.work import set_method

    return set_method(cls, edit.with_body(init, body))


def _only_unread(node: edit.Statement, later: list[edit.Statement], body) -> bool:
    """Does the statement only set local names that nothing after it reads?"""
    inner = edit.body_of(node) if isinstance(node, cst.If) and node.orelse is None else [node]
    names: set[str] = set()
    for statement in inner:
        pair = edit.assigned(statement)
        if pair is None or not isinstance(pair[0], cst.Name):
            return False
        names.add(pair[0].value)
    return not names & set().union(set(), *(edit.names_read(s) for s in later))
