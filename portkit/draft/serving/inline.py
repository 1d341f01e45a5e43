"""Puts small helpers in place of their calls, so that what a forward computes stands in it."""

from __future__ import annotations

from collections.abc import Callable

import libcst as cst

from portkit.draft import edit, prune

Helper = Callable[[cst.Call], cst.FunctionDef | None]


def inline_methods(cls: cst.ClassDef, function: cst.FunctionDef) -> cst.FunctionDef:
    """Replace `x = self.helper(...)` by the helper's statements, helpers of helpers too.

    Only helpers that return at their end (or at the end of each branch) are replaced.
    """

    def helper(call: cst.Call) -> cst.FunctionDef | None:
        name = edit.code(call.func)
        found = edit.method(cls, name.removeprefix("self.")) if name.startswith("self.") else None
        return None if found is None or found.name.value == "forward" else _own(found)

    return _inlined(function, helper)


def _own(method: cst.FunctionDef) -> cst.FunctionDef:
    """A class method without its class: self stands where it is called."""
    if "classmethod" not in [edit.code(d.decorator) for d in method.decorators]:
        return method
    parameters = method.params.params
    return method.with_changes(params=method.params.with_changes(params=parameters[1:]))


def inline_functions(
    module: cst.Module, function: cst.FunctionDef, wanted: Callable[[cst.FunctionDef], bool]
) -> cst.FunctionDef:
    """Replace `x = helper(...)` for the file's functions that satisfy `wanted`."""
    functions = {f.name.value: f for f in module.body if isinstance(f, cst.FunctionDef)}

    def helper(call: cst.Call) -> cst.FunctionDef | None:
        found = functions.get(edit.code(call.func))
        return found if found is not None and wanted(found) else None

    return _inlined(function, helper)


def drops_out(function: cst.FunctionDef) -> bool:
    """Is it a helper around dropout, which serving leaves out?"""
    return bool(
        edit.find(
            function,
            lambda n: edit.is_call(
                n, "F.dropout", "nn.functional.dropout", "torch.nn.functional.dropout"
            ),
        )
    )


def makes_sequence(function: cst.FunctionDef) -> bool:
    """Does it only return an nn.Sequential?"""
    body = [s for s in edit.body_of(function) if not edit.is_docstring(s)]
    small = edit.single(body[0]) if len(body) == 1 else None
    return isinstance(small, cst.Return) and edit.is_call(small.value, "nn.Sequential")


def _inlined(function: cst.FunctionDef, helper: Helper) -> cst.FunctionDef:
    taken = _names(function)
    body = edit.body_of(function)
    for _ in range(4):
        new = _block(body, helper, taken)
        if all(a is b for a, b in zip(new, body, strict=False)) and len(new) == len(body):
            break
        body = new
    return edit.with_body(function, body)


def _block(body: list[edit.Statement], helper: Helper, taken: set[str]) -> list[edit.Statement]:
    out: list[edit.Statement] = []
    for index, node in enumerate(body):
        if isinstance(node, cst.If):
            new = edit.with_body(node, _block(edit.body_of(node), helper, taken))
            if isinstance(node.orelse, cst.Else):
                other = _block(edit.body_of(node.orelse), helper, taken)
                new = new.with_changes(orelse=edit.with_body(node.orelse, other))
            out.append(new if edit.code(new) != edit.code(node) else node)
            continue
        pair = edit.assigned(node)
        called = helper(pair[1]) if pair and isinstance(pair[1], cst.Call) else None
        if pair is None or called is None:
            out.append(node)
            continue
        later = {
            n.value
            for rest in body[index + 1 :]
            for n in edit.find(rest, lambda n: isinstance(n, cst.Name))
        }
        made = _expanded(pair[0], pair[1], called, taken, later)
        if made and node.leading_lines:
            made[0] = made[0].with_changes(leading_lines=node.leading_lines)
        out += made if made is not None else [node]
    return out


def _expanded(
    target: cst.BaseExpression,
    call: cst.Call,
    function: cst.FunctionDef,
    taken: set[str],
    later: set[str],
) -> list[edit.Statement] | None:
    """The helper's body, ending in an assignment to `target`; None if it returns elsewhere."""
    given = _bound(call, function)
    if given is None:
        return None
    body = [s for s in edit.body_of(function) if not edit.is_docstring(s)]
    body = _decided(body, given)
    ended = _ending(body, target)
    if ended is None:
        return None
    assigned = _assigned_names(function)
    renames: dict[str, str] = {}
    before: list[edit.Statement] = []
    values: dict[str, cst.BaseExpression] = {}
    for name, value in given.items():
        shown = edit.code(value)
        if (
            name in assigned
            and isinstance(value, cst.Name)
            and (shown == edit.code(target) or shown not in later)
        ):
            renames[name] = shown  # nobody else needs what it held
        elif name in assigned:
            renames[name] = _fresh(name, taken)
            before.append(edit.statement(f"{renames[name]} = {edit.code(value)}"))
        else:
            values[name] = value
    for name in assigned - set(given):
        renames[name] = _fresh(name, taken)
    wrapped = edit.with_body(edit.function("def f():\n    pass"), ended)
    # The target keeps its own names: mark it, rename the rest, put it back.
    wrapped = _Renamed(renames, values, edit.code(target)).apply(wrapped)
    return [*before, *edit.body_of(wrapped)]


class _Renamed(cst.CSTTransformer):
    """Renames locals and substitutes arguments, except in the assignment to the call's target."""

    def __init__(
        self, renames: dict[str, str], values: dict[str, cst.BaseExpression], target: str
    ) -> None:
        self.renames, self.values, self.target = renames, values, target

    def apply(self, node: cst.FunctionDef) -> cst.FunctionDef:
        return node.visit(self)

    def visit_AssignTarget(self, node: cst.AssignTarget) -> bool:
        return not edit.code(node.target).startswith(_MARK)

    def leave_AssignTarget(self, original_node, updated_node):
        if edit.code(original_node.target).startswith(_MARK):
            return updated_node.with_changes(target=edit.expression(self.target))
        return updated_node

    def leave_Arg(self, original_node, updated_node):
        return updated_node.with_changes(keyword=original_node.keyword)

    def leave_Attribute(self, original_node, updated_node):
        return updated_node.with_changes(attr=original_node.attr)

    def leave_Name(self, original_node, updated_node):
        if original_node.value in self.values:
            value = self.values[original_node.value]
            if isinstance(value, cst.BinaryOperation | cst.IfExp | cst.BooleanOperation):
                return edit.expression(f"({edit.code(value)})")
            return value
        return cst.Name(self.renames.get(original_node.value, original_node.value))


_MARK = "__target__"


def _decided(
    body: list[edit.Statement], given: dict[str, cst.BaseExpression]
) -> list[edit.Statement]:
    """The body without branches on a flag that the call gives as True or False."""
    flags = {name: edit.code(value) for name, value in given.items()}
    kept: list[edit.Statement] = []
    for node in body:
        flag = flags.get(edit.code(node.test)) if isinstance(node, cst.If) else None
        if flag not in ("True", "False"):
            kept.append(node)
        elif flag == "True":
            kept += edit.body_of(node)
        elif isinstance(node.orelse, cst.If):
            kept += _decided([node.orelse], given)
        elif node.orelse is not None:
            kept += edit.body_of(node.orelse)
        if kept and isinstance(edit.single(kept[-1]), cst.Return):
            break
    return kept


def _ending(body: list[edit.Statement], target: cst.BaseExpression) -> list[edit.Statement] | None:
    if not body:
        return None
    *before, last = body
    if any(edit.find(s, lambda n: isinstance(n, cst.Return)) for s in before):
        return None
    small = edit.single(last)
    if isinstance(small, cst.Return) and small.value is not None:
        made = cst.Assign([cst.AssignTarget(cst.Name(_MARK))], small.value)
        return [*before, last.with_changes(body=[made])]
    if isinstance(small, cst.Raise):
        return body
    if isinstance(last, cst.If):
        first = _ending(edit.body_of(last), target)
        if isinstance(last.orelse, cst.Else):
            second = _ending(edit.body_of(last.orelse), target)
            orelse = edit.with_body(last.orelse, second) if second is not None else None
        elif isinstance(last.orelse, cst.If):
            other = _ending([last.orelse], target)
            orelse = other[0] if other is not None else None
        else:
            orelse = None
        if first is None or orelse is None:
            return None
        return [*before, edit.with_body(last, first).with_changes(orelse=orelse)]
    return None


def _bound(call: cst.Call, function: cst.FunctionDef) -> dict[str, cst.BaseExpression] | None:
    """Parameter -> argument or default; None if an argument is starred or missing."""
    names = edit.parameters(function)
    given: dict[str, cst.BaseExpression] = {}
    positions = iter(names)
    for argument in call.args:
        if argument.star:
            return None
        key = argument.keyword.value if argument.keyword is not None else next(positions, "")
        given[key] = argument.value
    for parameter in [*function.params.params, *function.params.kwonly_params]:
        name = parameter.name.value
        if name not in given and name != "self":
            if parameter.default is None:
                return None
            given[name] = parameter.default
    return given if set(given) == set(names) else None


def _assigned_names(function: cst.FunctionDef) -> set[str]:
    names: set[str] = set()
    for node in edit.find(
        function, lambda n: isinstance(n, cst.AssignTarget | cst.AugAssign | cst.For | cst.CompFor)
    ):
        names |= {n.value for n in edit.find(node.target, lambda n: isinstance(n, cst.Name))}
    return names - {"self"}


def _names(function: cst.FunctionDef) -> set[str]:
    return {n.value for n in edit.find(function, lambda n: isinstance(n, cst.Name))}


def _fresh(name: str, taken: set[str]) -> str:
    number, fresh = 1, name
    while fresh in taken:
        number += 1
        fresh = f"{name}_{number}"
    taken.add(fresh)
    return fresh


def inference_body(function: cst.FunctionDef, dropouts: set[str]) -> cst.FunctionDef:
    """Without dropout, without what nothing reads, and without copies that inlining left."""
    clean = prune.drop_dropout_calls(prune.inference_only(function), dropouts)
    return edit.with_body(clean, without_copies(prune.live_body(edit.body_of(clean))))


def without_copies(body: list[edit.Statement]) -> list[edit.Statement]:
    """Join `a = b` with the `a = f(a)` after it, and `a = f(b)` with the `b = a` after it."""
    done = False
    while not done:
        done = True
        for index, node in enumerate(body):
            pair = edit.assigned(node)
            if pair is None or not isinstance(pair[0], cst.Name):
                continue
            if edit.code(pair[0]) == edit.code(pair[1]):
                body = [*body[:index], *body[index + 1 :]]
            elif (joined := _joined(pair, body, index)) is not None:
                body = [*body[:index], joined, *body[index + 2 :]]
            else:
                continue
            done = False
            break
    return body


def _joined(pair, body: list[edit.Statement], index: int) -> edit.Statement | None:
    after = edit.assigned(body[index + 1]) if index + 1 < len(body) else None
    if after is None or not isinstance(after[0], cst.Name):
        return None
    target, value = (edit.code(n) for n in pair)
    small = edit.single(body[index + 1])
    if isinstance(pair[1], cst.Name) and edit.code(after[0]) == target:
        new = edit.rename_reads(after[1], {target: value})
        return body[index + 1].with_changes(
            leading_lines=body[index].leading_lines, body=[small.with_changes(value=new)]
        )
    read_later = {n for s in body[index + 2 :] for n in edit.names_read(s)}
    if edit.code(after[1]) == target and target not in read_later:
        return body[index].with_changes(body=[cst.Assign([cst.AssignTarget(after[0])], pair[1])])
    return None


def without_aliases(function: cst.FunctionDef) -> cst.FunctionDef:
    """Read `b` where `a = b` only gave it another name; neither is assigned again."""
    counts: dict[str, int] = {}
    for node in edit.find(function, lambda n: isinstance(n, cst.AssignTarget | cst.AugAssign)):
        for name in edit.find(node.target, lambda n: isinstance(n, cst.Name)):
            counts[name.value] = counts.get(name.value, 0) + 1
    parameters = set(edit.parameters(function))
    body = edit.body_of(function)
    for node in body:
        pair = edit.assigned(node)
        if pair is None or not all(isinstance(p, cst.Name) for p in pair):
            continue
        name, other = (p.value for p in pair)
        if counts[name] == 1 and other in parameters and other not in counts:
            kept = [s for s in body if s is not node]
            new = edit.with_body(function, [edit.rename_reads(s, {name: other}) for s in kept])
            return without_aliases(new)
    return function
