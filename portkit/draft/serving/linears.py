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


def unwrap_linears(module: cst.Module) -> tuple[cst.Module, tuple[tuple[str, str], ...]]:
    """The file with nn.Linear in place of modules that only call one, and what that renames.

    [(".q_proj.linear", ".q_proj"), ...]: piece of a checkpoint's name, and of the port's. No
    dot behind it: a quantised checkpoint's ignore list, which vLLM renames alike, ends there.
    """
    wrappers = {
        c.name.value: found
        for c in module.body
        if isinstance(c, cst.ClassDef) and (found := _wrapped(c)) is not None
    }
    renamed: list[tuple[str, str]] = []

    def change(here: cst.CSTNode) -> cst.CSTNode | None:
        pair = edit.assigned_attribute(here) if isinstance(here, cst.SimpleStatementLine) else None
        name = edit.code(pair[1].func) if pair and isinstance(pair[1], cst.Call) else ""
        if name not in wrappers:
            return None
        inner, parameters, made = wrappers[name]
        for position, parameter in enumerate(parameters):
            value = edit.call_argument(pair[1], position, parameter)
            if value is not None:
                made = _with_value(made, parameter, edit.flat(value))
        renamed.append((f".{pair[0]}.{inner}", f".{pair[0]}"))
        line = edit.statement(f"self.{pair[0]} = {edit.flat(made)}")
        return line.with_changes(leading_lines=here.leading_lines)

    if wrappers:
        module = edit.replace(module, change)
    return module, tuple(dict.fromkeys(renamed))


def _with_value(call: cst.Call, name: str, value: str) -> cst.Call:
    """The call with a value in place of a name in its arguments."""
    arguments = [a.with_changes(value=edit.replace_text(a.value, name, value)) for a in call.args]
    return call.with_changes(args=arguments)


def _wrapped(cls: cst.ClassDef) -> tuple[str, list[str], cst.Call] | None:
    """(attribute, parameters, nn.Linear call) of a module whose forward only calls the linear."""
    init, forward = edit.method(cls, "__init__"), edit.method(cls, "forward")
    if init is None or forward is None or len(edit.body_of(forward)) != 1:
        return None
    returned = edit.single(edit.body_of(forward)[0])
    pairs = [p for n in edit.body_of(init) if (p := edit.assigned_attribute(n))]
    linears = [p for p in pairs if edit.is_call(p[1], "nn.Linear")]
    others = [p for p in pairs if p not in linears and isinstance(p[1], cst.Call)]
    if len(linears) != 1 or others or not isinstance(returned, cst.Return):
        return None
    attr, made = linears[0]
    parameters = edit.parameters(forward)
    if len(parameters) != 1 or edit.code(returned.value) != f"self.{attr}({parameters[0]})":
        return None
    return attr, edit.parameters(init), made


def declare_renamed(work: Work, renamed: tuple[tuple[str, str], ...]) -> None:
    """Give the ForCausalLM class a mapper for the weights of unwrapped linears and experts."""
    code = work.module.code
    renamed = tuple(r for r in renamed if f"self{r[1].rstrip('.')} = " in code)
    if not renamed:
        return
    cls = work.cls(work.facts.causal_lm)
    lines = "".join(f'        "{old}": "{new}",\n' for old, new in renamed)
    linear = all(f"self{r[1].rstrip('.')} = nn.Linear(" in code for r in renamed)
    kind = "Linears" if linear else "Weights"
    made = edit.comment_before(
        edit.statement(
            "hf_to_vllm_mapper = WeightsMapper(\n    orig_to_new_substr={\n" + lines + "    }\n)"
        ),
        f"{kind} that the original wraps in a module of their own.",
    )
    members = edit.members(cls)
    at = 1 if members and edit.is_docstring(members[0]) else 0
    members[at] = edit.blank_before(members[at])
    work.put(set_members(cls, [*members[:at], made, *members[at:]]))
    work.did.append(f"{work.facts.causal_lm}: names of wrapped {kind.lower()} are mapped.")


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
