"""Step parallel: constructors that take quant_config and prefix, and linears to shard."""

from __future__ import annotations

import libcst as cst

from portkit.draft import edit
from portkit.draft.blocker import Blocker


def add_parameter(function: cst.FunctionDef, parameter: str) -> cst.FunctionDef:
    """Add a parameter with a default before `prefix` (or at the end); nothing if it is there."""
    name = parameter.split(":")[0].strip()
    if name in edit.parameters(function):
        return function
    written = [
        edit.code(p.with_changes(comma=cst.MaybeSentinel.DEFAULT)).strip()
        for p in function.params.params
    ]
    index = next((i for i, p in enumerate(written) if p.startswith("prefix")), len(written))
    written.insert(index, parameter)
    new = edit.function(f"def f({', '.join(written)}):\n    pass")
    return function.with_changes(params=new.params)


def pass_argument(node: edit.Statement, call: cst.Call, argument: str) -> edit.Statement:
    """Add a keyword argument before prefix= in one call of the statement, unless it is there."""
    name = argument.split("=")[0]
    if any(a.keyword is not None and a.keyword.value == name for a in call.args):
        return node
    written = [edit.flat(a.with_changes(comma=cst.MaybeSentinel.DEFAULT)) for a in call.args]
    index = next(
        (i for i, a in enumerate(written) if a.replace(" ", "").startswith("prefix=")), len(written)
    )
    written.insert(index, argument)
    new = edit.make_call(edit.code(call.func), *written)
    return edit.replace(
        node, lambda n: new if isinstance(n, cst.Call) and edit.code(n) == edit.code(call) else None
    )


def linear_statement(
    node: edit.Statement, kind: str, sizes: str = "", attr: str = "", extra: str = ""
) -> edit.Statement:
    """nn.Linear(a, b, bias=c) -> kind(a, b, bias=c, quant_config=..., prefix=...)."""
    pair = edit.assigned_attribute(node)
    if pair is None or not isinstance(pair[1], cst.Call):
        raise Blocker(f"cannot follow `{edit.flat(node)}`.")
    name, call = attr or pair[0], pair[1]
    first = edit.call_argument(call, 0, "in_features")
    second = edit.call_argument(call, 1, "out_features")
    bias = edit.call_argument(call, 2, "bias")
    shown = "True" if bias is None else edit.flat(bias)
    more = f"    {extra},\n" if extra else ""
    return edit.statement(f"""
self.{name} = {kind}(
    {edit.flat(first)},
    {sizes or edit.flat(second)},
    bias={shown},
    quant_config=quant_config,
{more}    prefix=f"{{prefix}}.{name}",
)
""").with_changes(leading_lines=node.leading_lines)
