"""Drops reshapes that only serve [batch, sequence]: a server's tokens come in one row."""

from __future__ import annotations

import libcst as cst

from portkit.draft import edit


def flat_tokens(function: cst.FunctionDef) -> cst.FunctionDef:
    """The function without views to a shape that keeps each token: x.view(-1, x.shape[-1]), ...

    Only shapes made of sizes of tensors and -1 count; a view to other numbers stays.
    """
    shapes = _shape_names(function)

    def change(here: cst.CSTNode) -> cst.CSTNode | None:
        if not isinstance(here, cst.Call) or not isinstance(here.func, cst.Attribute):
            return None
        if _to_device(here):
            return here.func.value
        if edit.is_call(here, "np.sqrt", "numpy.sqrt"):
            return here.with_changes(func=edit.expression("math.sqrt"))
        if here.func.attr.value not in ("view", "reshape"):
            return None
        split = _split_features(here, shapes)
        if split is not None:
            return split
        numbers = any(isinstance(a.value, cst.Integer) for a in here.args)
        if here.args and not numbers and all(_of_sizes(a.value, shapes) for a in here.args):
            return here.func.value
        return None

    new = edit.replace(function, change)
    body = [s for s in edit.body_of(new) if not _grows_a_table(s)]
    return edit.with_body(new, tidy_blocks(body))


def _split_features(call: cst.Call, shapes: set[str]) -> cst.BaseExpression | None:
    """x.view(batch, seq, 2, -1) -> x.unflatten(-1, (2, -1)): each token's features in parts."""
    given = [a.value for a in call.args]
    if len(given) != 4 or not all(isinstance(g, cst.Name) and g.value in shapes for g in given[:2]):
        return None
    if not isinstance(given[2], cst.Integer) or edit.code(given[3]) != "-1":
        return None
    tensor = edit.code(call.func.value)
    return edit.expression(f"{tensor}.unflatten(-1, ({edit.code(given[2])}, -1))")


def free_the_name(function: cst.FunctionDef, name: str, new: str) -> cst.FunctionDef:
    """Rename a local, so that vLLM's argument can have its name."""
    bound = {
        n.value
        for t in edit.find(function, lambda n: isinstance(n, cst.AssignTarget))
        for n in edit.find(t, lambda n: isinstance(n, cst.Name))
    }
    if name not in bound or name in edit.parameters(function):
        return function

    def change(here: cst.CSTNode) -> cst.CSTNode | None:
        return cst.Name(new) if isinstance(here, cst.Name) and here.value == name else None

    return edit.with_body(function, [edit.replace(s, change) for s in edit.body_of(function)])


def _to_device(call: cst.Call) -> bool:
    """x.to(y.device): on a server everything is on one device already."""
    if edit.code(call.func).endswith(".to") and len(call.args) == 1:
        given = call.args[0].value
        return isinstance(given, cst.Attribute) and given.attr.value == "device"
    return False


def _grows_a_table(node: edit.Statement) -> bool:
    """`if length > size of a table: self.make_it_longer(...)`: vLLM's positions end in the config.

    The table that __init__ makes has a row for each position that vLLM will ask for.
    """
    if not isinstance(node, cst.If) or node.orelse is not None:
        return False
    calls = [edit.single(s) for s in edit.body_of(node)]
    only_calls = all(
        isinstance(c, cst.Expr) and edit.code(c.value).startswith("self.") for c in calls
    )
    local = edit.names_read(node.test) - {"self"}
    return only_calls and bool(local) and ".size(" in edit.code(node.test)


def tidy_blocks(body: list[edit.Statement]) -> list[edit.Statement]:
    """Without `x = x`, `pass` and the ifs that hold nothing else."""
    kept: list[edit.Statement] = []
    for node in body:
        if isinstance(node, cst.If):
            changed = _tidy_if(node)
            if changed is not None:
                kept.append(changed)
        elif _moves_itself(node):
            continue
        elif not _assigns_itself(node) and not isinstance(edit.single(node), cst.Pass):
            kept.append(node)
    return kept


def _moves_itself(node: edit.Statement) -> bool:
    """self.table = self.table.to(...): vLLM builds everything where it stays."""
    pair = edit.assigned_attribute(node)
    return pair is not None and edit.is_call(pair[1], f"self.{pair[0]}.to")


def _tidy_if(node: cst.If) -> cst.If | None:
    node = _embedding_test(node)
    inner = tidy_blocks(edit.body_of(node))
    orelse = node.orelse
    if isinstance(orelse, cst.If):
        orelse = _tidy_if(orelse)
    elif isinstance(orelse, cst.Else):
        other = tidy_blocks(edit.body_of(orelse))
        orelse = edit.with_body(orelse, other) if other else None
    if not inner and orelse is None:
        return None
    return edit.with_body(node, inner).with_changes(orelse=orelse)


def _embedding_test(node: cst.If) -> cst.If:
    """`if input_ids is not None: inputs_embeds = ...` as a test of inputs_embeds."""
    pairs = [edit.assigned(s) for s in edit.body_of(node)]
    embeds = [p for p in pairs if p is not None and edit.code(p[0]) == "inputs_embeds"]
    if edit.code(node.test) == "input_ids is not None" and len(embeds) == len(pairs) == 1:
        return node.with_changes(test=edit.expression("inputs_embeds is None"))
    return node


def first_output(function: cst.FunctionDef) -> cst.FunctionDef:
    """`outputs = [x] + weights; return outputs` -> `return x`: only the tensor goes on.

    `outputs = (x,)` likewise, where nothing is added to it later.
    """
    body = edit.body_of(function)
    last = edit.single(body[-1]) if body else None
    if not isinstance(last, cst.Return) or not isinstance(last.value, cst.Name):
        return function
    for index, node in enumerate(body[:-1]):
        pair = edit.assigned(node)
        if pair is None or edit.code(pair[0]) != last.value.value:
            continue
        first = pair[1].left if isinstance(pair[1], cst.BinaryOperation) else pair[1]
        grows = any(last.value.value in _names(n) for n in body[index + 1 : -1])
        if isinstance(first, cst.List | cst.Tuple) and len(first.elements) == 1 and not grows:
            returned = body[-1].with_changes(
                body=[last.with_changes(value=first.elements[0].value)]
            )
            return edit.with_body(function, [*body[:index], *body[index + 1 : -1], returned])
    return function


def _names(node: cst.CSTNode) -> set[str]:
    return {n.value for n in edit.find(node, lambda n: isinstance(n, cst.Name))}


def _shape_names(function: cst.FunctionDef) -> set[str]:
    """Names that hold sizes or shapes of tensors, and are never anything else."""
    names: set[str] = set()
    for node in edit.find(function, lambda n: isinstance(n, cst.Assign)):
        bound = {n.value for n in edit.find(node.targets[0], lambda n: isinstance(n, cst.Name))}
        if _of_sizes(node.value, names) and not isinstance(node.value, cst.Integer):
            names |= bound
    return names


def _of_sizes(node: cst.BaseExpression, names: set[str]) -> bool:
    """Is the value made of sizes of tensors and -1 alone?"""
    if isinstance(node, cst.Name):
        return node.value in names
    if isinstance(node, cst.Attribute):
        return node.attr.value == "shape"
    if isinstance(node, cst.Call):
        return isinstance(node.func, cst.Attribute) and node.func.attr.value == "size"
    if isinstance(node, cst.Subscript):
        return _of_sizes(node.value, names)
    if isinstance(node, cst.Tuple | cst.List):
        return all(_of_sizes(e.value, names) for e in node.elements)
    if isinstance(node, cst.Integer):
        return bool(names)  # an offset on a size
    if isinstance(node, cst.BinaryOperation) and isinstance(node.operator, cst.Add):
        return _of_sizes(node.left, names) and _of_sizes(node.right, names)
    return edit.code(node) == "-1"


def _assigns_itself(node: edit.Statement) -> bool:
    pair = edit.assigned(node)
    return pair is not None and edit.code(pair[0]) == edit.code(pair[1])
