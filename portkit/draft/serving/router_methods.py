"""A router that is a linear of the block and a method beside it -> one class, as others have it.

What the later steps read (logits, chosen experts and their weights come from one call) and what
keeps the checkpoint's names: the class is the linear.
"""

from __future__ import annotations

from itertools import pairwise

import libcst as cst

from portkit.draft import edit
from portkit.draft.work import set_members


def router_classes(module: cst.Module) -> cst.Module:
    """logits = self.router(x); a, b = self.choose(x, logits) -> _, a, b = self.router(x)."""
    body: list[cst.CSTNode] = []
    for item in module.body:
        made = _split(item) if isinstance(item, cst.ClassDef) else None
        body += made or [item]
    return module.with_changes(body=body)


def _split(cls: cst.ClassDef) -> list[cst.ClassDef] | None:
    """[router class, block that holds one]; None if the block is not of this form."""
    forward, init = edit.method(cls, "forward"), edit.method(cls, "__init__")
    if forward is None or init is None:
        return None
    body = edit.body_of(forward)
    for at, (first, second) in enumerate(pairwise(body)):
        logits, chosen = edit.assigned(first), edit.assigned(second)
        if not (logits and chosen and isinstance(chosen[1], cst.Call)):
            continue
        name, linear = edit.code(logits[0]), _linear(init, logits[1])
        method = edit.method(cls, edit.code(chosen[1].func).removeprefix("self."))
        given = [edit.code(a.value) for a in chosen[1].args]
        tokens = edit.code(logits[1].args[0].value) if linear else ""
        if not linear or method is None or not set(given) <= {name, tokens} or name not in given:
            continue
        rest = [*body[:at], *body[at + 2 :]]
        if any(name in edit.names_read(n) for n in rest) or not isinstance(chosen[0], cst.Tuple):
            continue
        router = _router(cls, init, linear, (name, tokens), method, given)
        if router is None:
            return None
        targets = ", ".join(edit.code(e.value) for e in chosen[0].elements)
        call = edit.statement(f"_, {targets} = {edit.code(logits[1].func)}({tokens})")
        call = call.with_changes(leading_lines=first.leading_lines)
        new = edit.with_body(forward, [*body[:at], call, *body[at + 2 :]])
        attr = edit.code(logits[1].func)
        made = edit.with_body(
            init,
            [
                edit.statement(f"{attr} = {router.name.value}(config)").with_changes(
                    leading_lines=n.leading_lines
                )
                if (p := edit.assigned_attribute(n)) and f"self.{p[0]}" == attr
                else n
                for n in edit.body_of(init)
            ],
        )
        members = [
            new if m is forward else made if m is init else m
            for m in edit.members(cls)
            if m is not method
        ]
        return [router, set_members(cls, members)]
    return None


def _linear(init: cst.FunctionDef, called: cst.BaseExpression) -> cst.Call | None:
    """nn.Linear(...) of the attribute that is called with one tensor."""
    if not isinstance(called, cst.Call) or len(called.args) != 1:
        return None
    for node in edit.body_of(init):
        pair = edit.assigned_attribute(node)
        if pair and edit.code(called.func) == f"self.{pair[0]}":
            return pair[1] if edit.is_call(pair[1], "nn.Linear", "torch.nn.Linear") else None
    return None


def _router(
    cls: cst.ClassDef,
    init: cst.FunctionDef,
    linear: cst.Call,
    names: tuple[str, str],
    method: cst.FunctionDef,
    given: list[str],
) -> cst.ClassDef | None:
    """The class, made of the config; None if it needs more of the block than its numbers."""
    logits, tokens = names
    own = {p[0]: n for n in edit.body_of(init) if (p := edit.assigned_attribute(n))}
    needed = [
        n.attr.value
        for n in edit.find(method, lambda n: isinstance(n, cst.Attribute))
        if edit.code(n.value) == "self"
    ]
    arguments = [edit.flat(a.with_changes(comma=cst.MaybeSentinel.DEFAULT)) for a in linear.args]
    sizes = [
        n.attr.value
        for a in linear.args
        for n in edit.find(a, lambda n: isinstance(n, cst.Attribute))
        if edit.code(n.value) == "self"
    ]
    *before, last = edit.body_of(method)
    returned = edit.single(last)
    if not all(n in own for n in [*needed, *sizes]) or not isinstance(returned, cst.Return):
        return None
    if not isinstance(returned.value, cst.Tuple) or len(returned.value.elements) != 2:
        return None
    parameters = edit.parameters(method)
    if dict(zip(parameters, given, strict=False)) != {p: p for p in parameters}:
        return None
    for name in sizes:
        value = edit.flat(edit.assigned_attribute(own[name])[1])
        arguments = [a.replace(f"self.{name}", value) for a in arguments]
    kept = [edit.flat(own[n]) for n in dict.fromkeys(needed)]
    if any(edit.names_read(own[n]) - {"self", "config"} for n in needed):
        return None
    made = edit.statement(
        f"class {cls.name.value}Router(nn.Linear):\n"
        "    def __init__(self, config):\n"
        f"        super().__init__({', '.join(arguments)})\n"
        + "".join(f"        {line}\n" for line in kept)
        + f"\n    def forward(self, {tokens}):\n"
        f"        {logits} = super().forward({tokens})\n"
    )
    forward = edit.method(made, "forward")
    results = ", ".join(edit.code(e.value) for e in returned.value.elements)
    body = [*edit.body_of(forward), *before, edit.statement(f"return {logits}, {results}")]
    new = edit.with_body(forward, body)
    made = set_members(made, [new if m is forward else m for m in edit.members(made)])
    return made.with_changes(leading_lines=cls.leading_lines)
