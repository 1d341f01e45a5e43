"""Step forward: a block's further results (routing scores) that its layer throws away."""

from __future__ import annotations

import libcst as cst

from portkit.draft import edit
from portkit.draft.work import Work, set_method


def drop_unread_results(work: Work, name: str) -> None:
    """x, _ = self.mlp(y) -> x = self.mlp(y), if nobody reads more than the block's first result."""
    cls = work.cls(name)
    forward = edit.method(cls, "forward")
    returns = edit.find(forward, lambda n: isinstance(n, cst.Return))
    if not returns or not all(isinstance(r.value, cst.Tuple) for r in returns):
        return
    changed: list[cst.ClassDef] = []
    for holder in [i for i in work.module.body if isinstance(i, cst.ClassDef)]:
        attrs = _attributes(holder, name)
        if not attrs:
            continue
        method = edit.method(holder, "forward")
        calls = edit.find(method, lambda n, attrs=attrs: edit.is_call(n, *attrs))
        lines = edit.find(method, lambda n, attrs=attrs: _unpacks(n, attrs))
        targets = [edit.assigned(line)[0] for line in lines]
        unread = {edit.code(e.value) for t in targets for e in t.elements[1:]}
        if len(calls) != len(lines) or unread & edit.names_read(method):
            return

        def first(node: cst.CSTNode, attrs: set[str] = attrs) -> cst.CSTNode | None:
            if not _unpacks(node, attrs):
                return None
            target = cst.AssignTarget(edit.assigned(node)[0].elements[0].value)
            # The author's comment would speak of what goes.
            trailing = cst.TrailingWhitespace(newline=node.trailing_whitespace.newline)
            body = [node.body[0].with_changes(targets=[target])]
            return node.with_changes(body=body, trailing_whitespace=trailing)

        changed.append(set_method(holder, edit.replace(method, first)))
    for holder in changed:
        work.put(holder)

    def only(node: cst.CSTNode) -> cst.CSTNode | None:
        if isinstance(node, cst.Return):
            return node.with_changes(value=node.value.elements[0].value)
        return None

    work.put(set_method(work.cls(name), edit.replace(forward, only)))


def _attributes(holder: cst.ClassDef, name: str) -> set[str]:
    """`self.<attr>` that the class makes of this block."""
    init = edit.method(holder, "__init__")
    pairs = (
        [] if init is None else edit.find(init, lambda n: edit.assigned_attribute(n) is not None)
    )
    return {
        f"self.{attr}"
        for attr, value in map(edit.assigned_attribute, pairs)
        if edit.find(value, lambda n: edit.is_call(n, name))
    }


def _unpacks(node: cst.CSTNode, attrs: set[str]) -> bool:
    pair = edit.assigned(node) if isinstance(node, cst.SimpleStatementLine) else None
    return pair is not None and isinstance(pair[0], cst.Tuple) and edit.is_call(pair[1], *attrs)
