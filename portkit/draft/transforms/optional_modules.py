"""Modules that a config may leave out: `x = Module(...) if c else None` -> `if c: x = Module(...)`.

As vLLM's files write it, and what the later steps read: a module is made by one plain assignment.
"""

from __future__ import annotations

import libcst as cst

from portkit.draft import edit


def modules_in_branches(body: list[edit.Statement]) -> list[edit.Statement]:
    """The same statements; neighbours under one condition share its if and else.

    The attribute is no longer set to None where the module is left out, so only a forward that
    branches on the same condition may read it.
    """
    out: list[edit.Statement] = []
    open_test = ""
    branches: tuple[list[edit.Statement], list[edit.Statement]] = ([], [])
    for node in [*body, None]:
        found = _optional(node) if node is not None else None
        if found is None or (open_test and found[0] != open_test):
            if open_test:
                out.append(_branch(open_test, *branches))
            open_test, branches = "", ([], [])
        if found is None:
            out += [node] if node is not None else []
            continue
        open_test, made, is_else = found
        branches[is_else].append(made)
    return out


def _optional(node: edit.Statement) -> tuple[str, edit.Statement, bool] | None:
    """(condition without `not`, the plain assignment, does it belong to the else?)."""
    pair = edit.assigned_attribute(node)
    if pair is None or not isinstance(pair[1], cst.IfExp):
        return None
    attr, choice = pair
    for made, other, is_else in (
        (choice.body, choice.orelse, False),
        (choice.orelse, choice.body, True),
    ):
        if isinstance(made, cst.Call) and edit.code(other) == "None":
            bare = made.with_changes(lpar=[], rpar=[])
            test = edit.flat(choice.test)
            if " is not None" in test:
                test, is_else = test.replace(" is not None", " is None"), not is_else
            return test, edit.statement(f"self.{attr} = {edit.code(bare)}"), is_else
    return None


def _branch(test: str, body: list[edit.Statement], other: list[edit.Statement]) -> edit.Statement:
    if not body:
        negated = (
            test.replace(" is None", " is not None") if " is None" in test else f"not ({test})"
        )
        return edit.with_body(edit.statement(f"if {negated}:\n    pass"), other)
    made = edit.statement(f"if {test}:\n    pass" + ("\nelse:\n    pass" if other else ""))
    orelse = edit.with_body(made.orelse, other) if other else None
    return edit.with_body(made, body).with_changes(orelse=orelse)
