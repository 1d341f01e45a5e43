"""[batch, seq, hidden] -> [num_tokens, hidden] in a module that treats every token alike.

What only names batch and sequence, or reshapes to tokens and back, goes; everything else stays.
"""

from __future__ import annotations

import libcst as cst

from portkit.draft import edit
from portkit.draft.blocker import Blocker

_RESHAPES = ("view", "reshape")


def flatten(forward: cst.FunctionDef, name: str, line: int) -> cst.FunctionDef:
    """Rewrite a forward for flat tokens. Blocker if it still needs the batch or the sequence."""
    shapes: set[str] = set()  # names of a whole shape
    outer: set[str] = set()  # names of the batch's and the sequence's size
    inner: dict[str, str] = {}  # name of the hidden size -> the same from the flat tensor
    tokens = set(edit.parameters(forward))  # names of the tokens' hidden states
    body: list[edit.Statement] = []
    for node in edit.body_of(forward):
        pair = edit.assigned(node)
        if pair and edit.code(pair[1]) in tokens:
            tokens.add(edit.code(pair[0]))
        tensor = _shape_of(pair[1]) if pair else ""
        if pair and tensor and isinstance(pair[0], cst.Tuple) and len(pair[0].elements) == 3:
            names = [edit.code(e.value) for e in pair[0].elements]
            outer |= {n for n in names[:2] if n != "_"}
            inner[names[2]] = f"{tensor}.shape[-1]"
        elif pair and tensor and isinstance(pair[0], cst.Name):
            shapes.add(pair[0].value)
        else:
            body.append(node)

    def change(here: cst.CSTNode) -> cst.CSTNode | None:
        product = isinstance(here, cst.BinaryOperation) and isinstance(here.operator, cst.Multiply)
        if product and outer and {edit.code(here.left), edit.code(here.right)} == outer:
            return edit.expression(f"{edit.parameters(forward)[0]}.shape[0]")
        if not isinstance(here, cst.Call) or not isinstance(here.func, cst.Attribute):
            return None
        if here.func.attr.value not in _RESHAPES or not here.args:
            return None
        given = [edit.code(a.value) for a in here.args]
        to_tokens = len(given) == 2 and given[0] == "-1" and edit.code(here.func.value) in tokens
        back = given[0] in shapes or given[0] in outer
        return here.func.value if to_tokens or back else None

    body = [edit.replace(node, change) for node in body]
    read = set().union(*(edit.names_read(node) for node in body)) if body else set()
    leftover = sorted((outer | shapes) & read)
    if leftover:
        raise Blocker(
            f"{name}.forward needs {leftover[0]!r}: tokens are flat in vLLM, without batch and "
            "sequence.",
            line,
        )
    body = [_with_size(node, inner) for node in body]
    return edit.with_body(forward, [node for node in body if not _assigns_itself(node)])


def without_training(body: list[edit.Statement]) -> list[edit.Statement]:
    """Drop branches on what is constant when serving (after `prune.inference_only`)."""
    kept: list[edit.Statement] = []
    for node in body:
        if isinstance(node, cst.If):
            test = edit.code(node.test)
            if test == "False" or test.startswith("False and "):
                if isinstance(node.orelse, cst.Else):
                    kept += without_training(edit.body_of(node.orelse))
                continue
        kept.append(node)
    return kept


def _shape_of(value: cst.BaseExpression) -> str:
    """x of x.shape or x.size()."""
    if isinstance(value, cst.Attribute) and value.attr.value == "shape":
        return edit.code(value.value)
    if isinstance(value, cst.Call) and isinstance(value.func, cst.Attribute) and not value.args:
        return edit.code(value.func.value) if value.func.attr.value == "size" else ""
    return ""


def _with_size(node: edit.Statement, inner: dict[str, str]) -> edit.Statement:
    for name, size in inner.items():
        if name in edit.names_read(node):
            node = edit.replace_text(node, name, size)
    return node


def _assigns_itself(node: edit.Statement) -> bool:
    pair = edit.assigned(node)
    return pair is not None and edit.code(pair[0]) == edit.code(pair[1])
