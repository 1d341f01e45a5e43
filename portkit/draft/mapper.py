"""The ForCausalLM class's WeightsMapper, as a statement that several steps add to."""

from __future__ import annotations

import libcst as cst

from portkit.draft import edit

NAME = "hf_to_vllm_mapper"


def mapper_of(node: edit.Statement) -> cst.Call | None:
    """The call of `hf_to_vllm_mapper = WeightsMapper(...)`; None for any other statement."""
    pair = edit.assigned(node)
    if pair and edit.code(pair[0]) == NAME and isinstance(pair[1], cst.Call):
        return pair[1]
    return None


def with_mapper(members: list[edit.Statement], made: edit.Statement) -> list[edit.Statement]:
    """The class's members with this mapper, merged with the one that is there."""
    old = next((m for m in members if mapper_of(m) is not None), None)
    if old is not None:
        both = _merged(old, made)
        return [both if m is old else m for m in members]
    at = 1 if members and edit.is_docstring(members[0]) else 0
    return [*members[:at], made, *members[at:]]


def _merged(old: edit.Statement, made: edit.Statement) -> edit.Statement:
    """The class's own WeightsMapper (renamed parameters) with the other names as well."""
    call = mapper_of(old)
    arguments = {a.keyword.value: a for a in call.args}
    for argument in mapper_of(made).args:
        name = argument.keyword.value
        new = argument.value
        if name in arguments and isinstance(arguments[name].value, cst.Dict):
            new = _both(arguments[name].value, new)
        arguments[name] = argument.with_changes(value=new)
    every = [a.with_changes(comma=cst.MaybeSentinel.DEFAULT) for a in arguments.values()]
    both = call.with_changes(args=every)
    return edit.replace(old, lambda n: both if edit.is_call(n, "WeightsMapper") else None)


def _both(old: cst.Dict, new: cst.Dict) -> cst.Dict:
    """The elements of both, each under its comment; of two with one key, the new one."""
    kept = [e for e in old.elements if edit.code(e.key) not in edit.code(new)]
    if not kept:
        return new
    between = cst.Comma(whitespace_after=new.lbrace.whitespace_after)
    kept[-1] = kept[-1].with_changes(comma=between)
    return new.with_changes(lbrace=old.lbrace, elements=[*kept, *new.elements])
