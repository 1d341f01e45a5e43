"""Small rewrites of modules inside a layer: one tensor in, one out; autograd functions called."""

from __future__ import annotations

import libcst as cst

from portkit.draft import edit
from portkit.draft.work import put_class, set_method


def hoist_residuals(module: cst.Module, served: set[tuple[str, str]]) -> cst.Module:
    """self.mlp(x, residual), which returns residual + y -> residual + self.mlp(x).

    Only where the second tensor is added to what the module returns and used for nothing else.
    """
    for cls in [c for c in module.body if isinstance(c, cst.ClassDef)]:
        if (cls.name.value, "forward") not in served:
            continue
        found = _added(edit.method(cls, "forward"))
        if found is None:
            continue
        parameter, new = found
        users = _users(module, cls.name.value)
        if not users:
            continue
        position = edit.parameters(edit.method(cls, "forward")).index(parameter)
        module = put_class(module, set_method(cls, new))
        for user, attr in users:
            module = _with_calls(module, user, attr, parameter, position)
    return module


def _added(forward: cst.FunctionDef) -> tuple[str, cst.FunctionDef] | None:
    """(parameter, forward without it) if forward ends in `x = parameter + y; return x`."""
    parameters = edit.parameters(forward)
    body = edit.body_of(forward)
    if len(body) < 2 or len(parameters) < 2:
        return None
    pair, last = edit.assigned(body[-2]), edit.single(body[-1])
    if pair is None or not isinstance(last, cst.Return) or not isinstance(pair[0], cst.Name):
        return None
    value = pair[1]
    if not isinstance(value, cst.BinaryOperation) or not isinstance(value.operator, cst.Add):
        return None
    first = last.value
    if isinstance(first, cst.Tuple):
        first = first.elements[0].value
    if first is None or edit.code(first) != edit.code(pair[0]):
        return None
    for one, other in ((value.left, value.right), (value.right, value.left)):
        name = edit.code(one)
        if name in parameters[1:] and isinstance(other, cst.Name):
            read = set().union(*(edit.names_read(s) for s in body[:-2]))
            if name in read | edit.names_read(other):
                return None
            kept = [p for p in forward.params.params if p.name.value != name]
            returned = body[-1].with_changes(body=[last.with_changes(value=other)])
            new = edit.with_body(forward, [*body[:-2], returned])
            return name, new.with_changes(params=forward.params.with_changes(params=kept))
    return None


def _users(module: cst.Module, name: str) -> list[tuple[str, str]]:
    """(class, attribute) of each class that makes a submodule of this class."""
    found = []
    for cls in [c for c in module.body if isinstance(c, cst.ClassDef)]:
        init = edit.method(cls, "__init__")
        for node in edit.body_of(init) if init is not None else ():
            pair = edit.assigned_attribute(node)
            if pair is not None and edit.is_call(pair[1], name):
                found.append((cls.name.value, pair[0]))
    return found


def _with_calls(
    module: cst.Module, user: str, attr: str, parameter: str, position: int
) -> cst.Module:
    cls = next(c for c in module.body if isinstance(c, cst.ClassDef) and c.name.value == user)
    forward = edit.method(cls, "forward")
    body: list[edit.Statement] = []
    for node in edit.body_of(forward):
        pair = edit.assigned(node)
        if pair is None or not edit.is_call(pair[1], f"self.{attr}"):
            body.append(node)
            continue
        call = pair[1]
        given = next(
            (a for a in call.args if a.keyword is not None and a.keyword.value == parameter),
            call.args[position] if position < len(call.args) else None,
        )
        if given is None:
            body.append(node)
            continue
        kept = [a for a in call.args if a is not given]
        kept[-1] = kept[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
        target = pair[0].elements[0].value if isinstance(pair[0], cst.Tuple) else pair[0]
        name = edit.code(target)
        small = edit.single(node)
        body.append(
            node.with_changes(body=[small.with_changes(value=call.with_changes(args=kept))])
        )
        body.append(edit.statement(f"{name} = {name} + {edit.code(given.value)}"))
    return put_class(module, set_method(cls, edit.with_body(forward, body)))


def call_autograd_functions(module: cst.Module) -> cst.Module:
    """F.apply(x) of a torch.autograd.Function -> what its forward returns: nothing is trained."""
    returned: dict[str, tuple[str, cst.BaseExpression]] = {}
    for cls in [c for c in module.body if isinstance(c, cst.ClassDef)]:
        forward = edit.method(cls, "forward")
        bases = [edit.code(b.value) for b in cls.bases]
        if forward is None or bases != ["torch.autograd.Function"]:
            continue
        context, *inputs = edit.parameters(forward)
        last = edit.single(edit.body_of(forward)[-1])
        others = edit.body_of(forward)[:-1]
        saves = all(edit.code(s).strip().startswith(f"{context}.") for s in others)
        if len(inputs) == 1 and saves and isinstance(last, cst.Return) and last.value is not None:
            returned[f"{cls.name.value}.apply"] = (inputs[0], last.value)

    def change(here: cst.CSTNode) -> cst.CSTNode | None:
        if isinstance(here, cst.Call) and edit.code(here.func) in returned and len(here.args) == 1:
            name, value = returned[edit.code(here.func)]
            return edit.replace_text(value, name, edit.code(here.args[0].value))
        return None

    return edit.replace(module, change) if returned else module
