"""attention(x, x, x): one parameter where all calls pass the same tensor for several."""

from __future__ import annotations

import libcst as cst

from portkit.draft import edit
from portkit.draft.work import set_method


def merge_same_arguments(module: cst.Module, served: set[tuple[str, str]]) -> cst.Module:
    """Give self-attention one input: encoder-decoder code passes v, k and q, all the same here."""
    classes = {c.name.value: c for c in module.body if isinstance(c, cst.ClassDef)}
    for name, cls in classes.items():
        forward = edit.method(cls, "forward")
        if forward is None or (name, "forward") not in served:
            continue
        names = edit.parameters(forward)
        calls = _calls(classes, name)
        groups = [_same(call, names) for _, call in calls]
        if not groups or not groups[0] or any(g != groups[0] for g in groups):
            continue
        first, *others = groups[0]
        kept = "hidden_states" if "hidden_states" not in names else first
        taken = {n.value for n in edit.find(forward, lambda n: isinstance(n, cst.Name))}
        if kept != first and kept in taken:
            kept = first
        parameters = [
            p.with_changes(name=cst.Name(kept)) if p.name.value == first else p
            for p in forward.params.params
            if p.name.value not in others
        ]
        renames = {n: kept for n in groups[0] if n != kept}
        body = [edit.rename_reads(s, renames) for s in edit.body_of(forward)]
        new = edit.with_body(forward, body).with_changes(
            params=forward.params.with_changes(params=parameters)
        )
        module = _put(module, set_method(cls, new))
        for user, call in calls:
            module = _put(module, _with_fewer(_class(module, user), call, names, others, kept))
    return module


def _class(module: cst.Module, name: str) -> cst.ClassDef:
    return next(c for c in module.body if isinstance(c, cst.ClassDef) and c.name.value == name)


def _put(module: cst.Module, new: cst.ClassDef) -> cst.Module:
    old = _class(module, new.name.value)
    return module.with_changes(body=[new if i is old else i for i in module.body])


def _calls(classes: dict[str, cst.ClassDef], name: str) -> list[tuple[str, cst.Call]]:
    """(class, call in its forward) of each call of a submodule of the class `name`."""
    found: list[tuple[str, cst.Call]] = []
    for user, cls in classes.items():
        init, forward = edit.method(cls, "__init__"), edit.method(cls, "forward")
        if init is None or forward is None:
            continue
        attrs = {
            f"self.{pair[0]}"
            for node in edit.body_of(init)
            if (pair := edit.assigned_attribute(node)) and edit.is_call(pair[1], name)
        }
        found += [
            (user, n)
            for n in edit.find(
                forward,
                lambda n, a=attrs: isinstance(n, cst.Call) and edit.code(n.func) in a,
            )
        ]
    return found


def _same(call: cst.Call, names: list[str]) -> list[str]:
    """Parameters that the call passes one and the same name, in their order; [] if just one."""
    given: dict[str, list[str]] = {}
    for index, argument in enumerate(call.args):
        if argument.star or not isinstance(argument.value, cst.Name):
            continue
        key = argument.keyword.value if argument.keyword is not None else names[index]
        if argument.value.value not in ("None", "True", "False"):
            given.setdefault(argument.value.value, []).append(key)
    return next((keys for keys in given.values() if len(keys) > 1), [])


def _with_fewer(
    cls: cst.ClassDef, call: cst.Call, names: list[str], gone: list[str], kept: str
) -> cst.ClassDef:
    wanted = edit.code(call)

    def change(here: cst.CSTNode) -> cst.CSTNode | None:
        if not isinstance(here, cst.Call) or edit.code(here) != wanted:
            return None
        arguments: list[cst.Arg] = []
        for index, argument in enumerate(here.args):
            positional = names[index] if index < len(names) else ""
            key = argument.keyword.value if argument.keyword is not None else positional
            if argument.star or key not in gone:
                arguments.append(argument)
        first = arguments[0]
        if first.keyword is not None:
            arguments[0] = first.with_changes(keyword=cst.Name(kept))
        return here.with_changes(args=arguments)

    return edit.replace(cls, change)
