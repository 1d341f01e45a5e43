"""Linear layers under other names: Conv1D (weights stored as [in, out]) and plain subclasses."""

from __future__ import annotations

import libcst as cst

from portkit.draft import edit
from portkit.draft.work import Work, set_members

TRANSPOSED = "transposed_weights"
"""Class attribute of a port: linears whose weights the checkpoint stores as [in, out]."""
_CONV = "transformers.pytorch_utils"


def plain_linears(module: cst.Module) -> tuple[cst.Module, tuple[str, ...]]:
    """The file with nn.Linear for each of them, and the attributes whose weights are transposed."""
    same = {c.name.value for c in module.body if isinstance(c, cst.ClassDef) and _is_linear(c)}
    conv = "Conv1D" if _imports_conv(module) else ""
    transposed: list[str] = []

    def change(here: cst.CSTNode) -> cst.CSTNode | None:
        if isinstance(here, cst.Call) and edit.code(here.func) in same:
            return here.with_changes(func=edit.expression("nn.Linear"))
        if conv and edit.is_call(here, conv) and len(here.args) == 2:
            out, into = (a.value for a in here.args)
            return edit.expression(f"nn.Linear({edit.code(into)}, {edit.code(out)})")
        return None

    for cls in [c for c in module.body if isinstance(c, cst.ClassDef)] if conv else ():
        for call in edit.find(cls, lambda n: isinstance(n, cst.Assign)):
            target = call.targets[0].target
            if edit.is_call(call.value, conv) and isinstance(target, cst.Attribute):
                transposed.append(target.attr.value)
    if same or transposed:
        module = edit.replace(module, change)
    return module, tuple(dict.fromkeys(transposed))


def declare_transposed(work: Work, attrs: tuple[str, ...]) -> None:
    """Say on the ForCausalLM class which weights are transposed while they are loaded."""
    code = work.module.code
    attrs = tuple(a for a in attrs if f"self.{a} = nn.Linear(" in code)
    if not attrs:
        return
    cls = work.cls(work.facts.causal_lm)
    shown = ", ".join(f'"{a}"' for a in attrs) + ("," if len(attrs) == 1 else "")
    made = edit.comment_before(
        edit.statement(f"{TRANSPOSED} = ({shown})"),
        "Linears whose weights the checkpoint stores as [in, out]: transposed while loading.",
    )
    members = edit.members(cls)
    at = 1 if members and edit.is_docstring(members[0]) else 0
    members[at] = edit.blank_before(members[at])
    work.put(set_members(cls, [*members[:at], made, *members[at:]]))
    work.did.append(f"Conv1D -> nn.Linear: {', '.join(attrs)}; their weights are transposed.")


def _imports_conv(module: cst.Module) -> bool:
    return any(
        edit.code(n.module) == _CONV and any(edit.code(a.name) == "Conv1D" for a in n.names)
        for item in module.body
        if isinstance(n := edit.single(item), cst.ImportFrom) and n.module is not None
        if not isinstance(n.names, cst.ImportStar)
    )


def _is_linear(cls: cst.ClassDef) -> bool:
    """An nn.Linear that multiplies by its weight and adds its bias in two steps."""
    if [edit.code(b.value) for b in cls.bases] != ["nn.Linear"]:
        return False
    forward = edit.method(cls, "forward")
    methods = [m for m in edit.members(cls) if isinstance(m, cst.FunctionDef)]
    if forward is None or len(methods) != 1:
        return False
    x = edit.parameters(forward)[0]
    written = edit.code(forward.body)
    return f"{x} @ self.weight.T" in written and written.count("self.weight") == 1
