"""Parameters of inner modules that serving does not read: dropped, with the arguments for them."""

from __future__ import annotations

import ast
import re

import libcst as cst

from portkit.analysis.classes import ClassView, call_name, text, view_module
from portkit.draft import edit
from portkit.draft.work import set_method


def drop_unread_parameters(
    module: cst.Module, served: set[tuple[str, str]], architecture: str
) -> cst.Module:
    """Give position embeddings, feed-forwards and norms only the arguments that they read.

    The attention, the layers and what holds them get their signatures from the transforms.
    """
    for cls in [c for c in module.body if isinstance(c, cst.ClassDef)]:
        name = cls.name.value
        forward = edit.method(cls, "forward")
        if (name, "forward") not in served or forward is None or name == architecture:
            continue
        if "attention_interface(" in edit.code(cls) or _holds_attention(module, cls):
            continue
        names = edit.parameters(forward)
        read = edit.names_read(forward.body)
        gone = [n for n in names if n not in read]
        if not gone or len(gone) == len(names):
            continue
        kept = [p for p in forward.params.params if p.name.value not in gone]
        kept[-1] = kept[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
        if kept[-1].name.value == "position_ids" and len(kept) == 2:
            forward = _of_positions(forward)
            tensor = cst.Annotation(edit.expression("torch.Tensor"))
            kept[-1] = cst.Param(cst.Name("positions"), tensor)
        new = forward.with_changes(params=forward.params.with_changes(params=kept))
        module = _put(module, set_method(cls, new))
        module = _without_arguments(module, name, names, set(gone))
    return module


def _of_positions(forward: cst.FunctionDef) -> cst.FunctionDef:
    """A module that takes positions alone calls them as vLLM does."""

    def change(here: cst.CSTNode) -> cst.CSTNode | None:
        if isinstance(here, cst.Name) and here.value == "position_ids":
            return cst.Name("positions")
        return None

    return edit.with_body(forward, [edit.replace(s, change) for s in edit.body_of(forward)])


def _holds_attention(module: cst.Module, cls: cst.ClassDef) -> bool:
    written = edit.code(cls)
    if "softmax(" in written or "scaled_dot_product_attention(" in written:
        return True
    names = {
        c.name.value
        for c in module.body
        if isinstance(c, cst.ClassDef)
        and c is not cls
        and ("attention_interface(" in edit.code(c) or "softmax(" in edit.code(c))
    }
    reached = {edit.code(n.func) for n in edit.find(cls, lambda n: isinstance(n, cst.Call))}
    if reached & names:
        return True
    inner = [
        c
        for c in module.body
        if isinstance(c, cst.ClassDef) and c.name.value in reached and c is not cls
    ]
    return any(_holds_attention(module, c) for c in inner)


def _class(module: cst.Module, name: str) -> cst.ClassDef:
    return next(c for c in module.body if isinstance(c, cst.ClassDef) and c.name.value == name)


def _put(module: cst.Module, new: cst.ClassDef) -> cst.Module:
    name = new.name.value
    return module.with_changes(
        body=[
            new if isinstance(i, cst.ClassDef) and i.name.value == name else i for i in module.body
        ]
    )


def _without_arguments(
    module: cst.Module, name: str, names: list[str], gone: set[str]
) -> cst.Module:
    """Drop the arguments for `gone` where a class calls its submodule of this class."""
    for cls in [c for c in module.body if isinstance(c, cst.ClassDef)]:
        init = edit.method(cls, "__init__")
        attrs = {
            pair[0]
            for node in (edit.body_of(init) if init is not None else ())
            if (pair := edit.assigned_attribute(node)) and edit.is_call(pair[1], name)
        }
        if not attrs:
            continue

        def change(here: cst.CSTNode, attrs=attrs) -> cst.CSTNode | None:
            if not isinstance(here, cst.Call):
                return None
            if edit.code(here.func).removeprefix("self.") not in attrs:
                return None
            kept: list[cst.Arg] = []
            for index, argument in enumerate(here.args):
                keyword = argument.keyword.value if argument.keyword is not None else ""
                if argument.star:
                    continue
                if (keyword or names[index]) not in gone:
                    kept.append(argument)
            if len(kept) == 1:
                kept = [cst.Arg(kept[0].value)]
            elif kept:
                kept[-1] = kept[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
            return here.with_changes(args=kept)

        module = _put(module, edit.replace(cls, change))
    return module


def read_config_instead(module: cst.Module) -> cst.Module:
    """Attention(nx, config) with nx = config.n_embd: the class reads config.n_embd itself.

    For constructor arguments that are config fields alone, where the class has the config, too.
    """
    views = view_module(module.code).classes
    # From the outside in: what a holder is given may be a field that it passes on.
    for name in reversed([c.name.value for c in module.body if isinstance(c, cst.ClassDef)]):
        cls = _class(module, name)
        init = edit.method(cls, "__init__")
        names = edit.parameters(init) if init is not None else []
        users = [(u, call) for u in views.values() for call in _constructions(u, name)]
        if "config" not in names or len(users) != 1:
            continue
        user, call = users[0]
        fields = {
            key: text(user.resolve(value)).replace("self.config.", "config.")
            for key, value in _given(call, names).items()
            if key != "config"
        }
        fields = {k: v for k, v in fields.items() if _CONFIG_FIELD.fullmatch(v)}
        assigned = {
            n.value
            for t in edit.find(init, lambda n: isinstance(n, cst.AssignTarget))
            for n in edit.find(t.target, lambda n: isinstance(n, cst.Name))
        }
        fields = {k: v for k, v in fields.items() if k not in assigned}
        if not fields:
            continue
        kept = [p for p in init.params.params if p.name.value not in fields]
        body = [_with_fields(s, fields) for s in edit.body_of(init)]
        new = edit.with_body(init, body).with_changes(params=init.params.with_changes(params=kept))
        module = _put(module, set_method(cls, new))
        holder = _class(module, user.name)
        module = _put(module, _without_constructed(holder, name, names, set(fields)))
        views = view_module(module.code).classes
    return module


def drop_unread_constructor_parameters(module: cst.Module) -> cst.Module:
    """Drop parameters of __init__ that no longer matter (dropout, is_decoder), and what is passed.

    What vLLM's constructors are given stays, read or not.
    """
    for name in [c.name.value for c in module.body if isinstance(c, cst.ClassDef)]:
        # Found anew each time: it may just have lost arguments of its calls.
        cls = _class(module, name)
        init = edit.method(cls, "__init__")
        names = edit.parameters(init) if init is not None else []
        if init is None or init.params.star_kwarg is not None or "config" not in str(names):
            continue
        gone = {n for n in names if n not in edit.names_read(init.body) and n not in _STANDARD}
        if not gone:
            continue
        kept = [p for p in init.params.params if p.name.value not in gone]
        new = init.with_changes(params=init.params.with_changes(params=kept))
        module = _put(module, set_method(cls, new))
        for user in [c for c in module.body if isinstance(c, cst.ClassDef)]:
            if edit.find(user, lambda n, name=name: edit.is_call(n, name)):
                module = _put(module, _without_constructed(user, name, names, gone))
    return module


_STANDARD = {
    *("config", "vllm_config", "cache_config", "quant_config", "model_config", "prefix"),
}
_CONFIG_FIELD = re.compile(r"config\.\w+")


def _constructions(user: ClassView, name: str) -> list[ast.Call]:
    if user.init is None:
        return []
    return [n for n in ast.walk(user.init) if isinstance(n, ast.Call) and call_name(n) == name]


def _given(call: ast.Call, names: list[str]) -> dict[str, ast.expr]:
    given = dict(zip(names, call.args, strict=False))
    return given | {k.arg: k.value for k in call.keywords if k.arg}


def _with_fields(node, fields: dict[str, str]):
    for name, field in fields.items():

        def change(here: cst.CSTNode, name=name, field=field) -> cst.CSTNode | None:
            if isinstance(here, cst.Arg) and edit.code(here.value) == name:
                return here.with_changes(value=edit.expression(field))
            return None

        node = edit.replace(node, change)
        node = edit.rename_reads(node, {name: f"__{name}"})
        node = edit.replace_text(node, f"__{name}", field)
    return node


def _without_constructed(
    cls: cst.ClassDef, name: str, names: list[str], gone: set[str]
) -> cst.ClassDef:
    def change(here: cst.CSTNode) -> cst.CSTNode | None:
        if not edit.is_call(here, name):
            return None
        kept = [
            a.with_changes(comma=cst.MaybeSentinel.DEFAULT)
            for i, a in enumerate(here.args)
            if (a.keyword.value if a.keyword is not None else names[i]) not in gone
        ]
        return here.with_changes(args=kept)

    return edit.replace(cls, change)
