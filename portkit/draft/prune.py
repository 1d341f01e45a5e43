"""What nobody reads any more, removed by dataflow: statements, attributes, training code.

Removing `attention_mask` from a call makes the mask dead, which makes the code that built it dead,
and so on: nothing here knows the names of masks or caches.
"""

from __future__ import annotations

import libcst as cst

from portkit.draft import edit

_NOISE = ("logger.warning", "logger.warning_once", "logger.info", "warnings.warn")


def live_body(body: list[edit.Statement], live: set[str] | None = None) -> list[edit.Statement]:
    """Keep the statements that the returns and in-place changes depend on."""
    kept, _ = _live(body, set(live or ()))
    return kept


def _live(body: list[edit.Statement], live: set[str]) -> tuple[list[edit.Statement], set[str]]:
    kept: list[edit.Statement] = []
    for node in reversed(body):
        changed, live = _live_one(node, live)
        if changed is not None:
            kept.append(changed)
    kept.reverse()
    return kept, live


def _live_one(node: edit.Statement, live: set[str]) -> tuple[edit.Statement | None, set[str]]:
    small = edit.single(node)
    if isinstance(node, cst.If):
        return _live_if(node, live)
    if isinstance(node, cst.For):
        inner, after = _live(edit.body_of(node), live)
        inner, after = _live(edit.body_of(node), after | live)  # a loop feeds itself
        if not inner:
            return None, live
        return edit.with_body(node, inner), after | live | edit.names_read(node.iter)
    if isinstance(small, cst.Raise):
        return None, live
    if isinstance(small, cst.AugAssign) and isinstance(small.target, cst.Name):
        if small.target.value not in live:
            return None, live
        return node, live | edit.names_read(small)
    if isinstance(small, cst.Expr):
        value = small.value
        if (
            edit.is_docstring(node)
            or edit.is_call(value, *_NOISE)
            or not isinstance(value, cst.Call)
        ):
            return None, live
        return node, live | edit.names_read(value)
    pair = edit.assigned(node)
    if pair is not None:
        target, value = pair
        names = _target_names(target)
        if names is not None:
            if not names & live:
                return None, live
            if isinstance(target, cst.Subscript):
                return node, live | edit.names_read(node)
            return node, (live - names) | edit.names_read(value)
    return node, live | edit.names_read(node)


def _live_if(node: cst.If, live: set[str]) -> tuple[edit.Statement | None, set[str]]:
    if edit.code(node.test) == "not return_dict":  # a tuple for callers that ask for one
        return None, live
    body, live_body_names = _live(edit.body_of(node), live)
    orelse = node.orelse
    live_else = set(live)
    if isinstance(orelse, cst.Else):
        inner, live_else = _live(edit.body_of(orelse), live)
        orelse = edit.with_body(orelse, inner) if inner else None
    elif isinstance(orelse, cst.If):
        changed, live_else = _live_if(orelse, live)
        orelse = changed if isinstance(changed, cst.If) else None
    if not body and orelse is None:
        return None, live
    return (
        edit.with_body(node, body).with_changes(orelse=orelse),
        live_body_names | live_else | edit.names_read(node.test),
    )


def _target_names(target: cst.BaseExpression) -> set[str] | None:
    """Names bound by a target; None if it changes an attribute or an element."""
    if isinstance(target, cst.Name):
        return {target.value}
    if isinstance(target, cst.Subscript) and isinstance(target.value, cst.Name):
        return {target.value.value}  # table[key] = value matters as long as the table does
    if isinstance(target, cst.Tuple) and all(
        isinstance(e.value, cst.Name) for e in target.elements
    ):
        return {e.value.value for e in target.elements if isinstance(e.value, cst.Name)}
    return None


def inference_only(node):
    """Fold what is constant when serving: not training, no gradient checkpointing, no dropout."""
    constants = {"self.training": "False", "self.gradient_checkpointing": "False"}

    def change(here: cst.CSTNode) -> cst.CSTNode | None:
        if isinstance(here, cst.Attribute) and edit.code(here) in constants:
            return cst.Name(constants[edit.code(here)])
        if edit.is_call(here, "nn.functional.dropout", "F.dropout", "torch.nn.functional.dropout"):
            return here.args[0].value
        return None

    return edit.replace(node, change)


def drop_dropout_calls(node, attributes: set[str]):
    """self.dropout(x) -> x for the attributes that are nn.Dropout."""

    def change(here: cst.CSTNode) -> cst.CSTNode | None:
        if (
            isinstance(here, cst.Call)
            and here.args
            and edit.code(here.func).removeprefix("self.") in attributes
        ) and edit.code(here.func).startswith("self."):
            return here.args[0].value
        return None

    return edit.replace(node, change)


def dropout_attributes(cls: cst.ClassDef) -> set[str]:
    init = edit.method(cls, "__init__")
    pairs = [edit.assigned_attribute(s) for s in edit.body_of(init)] if init else []
    return {p[0] for p in pairs if p and edit.is_call(p[1], "nn.Dropout", "torch.nn.Dropout")}


def prune_attributes(
    module: cst.Module, keep: frozenset[str] = frozenset({"config", "quant_config"})
) -> cst.Module:
    """Drop `self.x = value` that nothing reads, until nothing changes; submodules stay."""
    for _ in range(50):
        classes = {i.name.value: i for i in module.body if isinstance(i, cst.ClassDef)}
        foreign = {
            n.attr.value
            for item in module.body
            if isinstance(item, cst.ClassDef | cst.FunctionDef)
            for n in edit.find(item, lambda n: isinstance(n, cst.Attribute))
            if edit.code(n.value) != "self" and not edit.code(n.value).endswith("config")
        }
        changed = {}
        for name, cls in classes.items():
            after = _prune_class(cls, foreign, set(classes), keep)
            if after is not cls:
                changed[name] = after
        if not changed:
            return module
        module = module.with_changes(
            body=[
                changed.get(i.name.value, i) if isinstance(i, cst.ClassDef) else i
                for i in module.body
            ]
        )
    return module


def _prune_class(
    cls: cst.ClassDef, foreign: set[str], classes: set[str], keep: frozenset[str]
) -> cst.ClassDef:
    init = edit.method(cls, "__init__")
    if init is None:
        return cls
    read = edit.self_attributes_read(cls)

    def dead(node: edit.Statement) -> bool:
        pair = edit.assigned_attribute(node)
        if pair is None:
            return False
        attr, value = pair
        if attr in read or attr in foreign:
            return False
        if attr in keep and _is_top(cls):
            return False
        return not _makes_module(value, classes)

    body = _without(edit.body_of(init), dead)
    body, _ = _live_locals(body)
    if len(body) == len(edit.body_of(init)) and all(
        a is b for a, b in zip(body, edit.body_of(init), strict=False)
    ):
        return cls
    new_init = edit.with_body(init, body)
    return cls.with_deep_changes(
        cls.body, body=[new_init if m is init else m for m in edit.members(cls)]
    )


def _is_top(cls: cst.ClassDef) -> bool:
    init = edit.method(cls, "__init__")
    return init is not None and "vllm_config" in edit.parameters(init)


def _without(body: list[edit.Statement], dead) -> list[edit.Statement]:
    kept: list[edit.Statement] = []
    for node in body:
        if dead(node):
            continue
        if isinstance(node, cst.If):
            inner = _without(edit.body_of(node), dead)
            orelse = node.orelse
            if isinstance(orelse, cst.Else):
                other = _without(edit.body_of(orelse), dead)
                if len(other) != len(edit.body_of(orelse)):
                    orelse = edit.with_body(orelse, other) if other else None
            if not inner and orelse is None:
                continue
            if len(inner) != len(edit.body_of(node)) or orelse is not node.orelse:
                node = edit.with_body(node, inner).with_changes(orelse=orelse)
        kept.append(node)
    return kept


def _live_locals(body: list[edit.Statement]) -> tuple[list[edit.Statement], bool]:
    """Drop local names of `__init__` that nothing reads (and keep every other statement)."""
    kept = list(body)
    while True:
        dead = None
        for index, node in enumerate(kept):
            pair = edit.assigned(node)
            if pair and isinstance(pair[0], cst.Name):
                rest = (
                    set().union(*(edit.names_read(o) for o in kept if o is not node))
                    if len(kept) > 1
                    else set()
                )
                if pair[0].value not in rest:
                    dead = index
                    break
        if dead is None:
            return kept, len(kept) != len(body)
        del kept[dead]


def _makes_module(value: cst.BaseExpression, classes: set[str]) -> bool:
    """Does the value create a submodule, a parameter or a buffer that checkpoints have?"""
    for call in edit.find(value, lambda n: isinstance(n, cst.Call)):
        name = edit.code(call.func)
        if name in ("nn.Dropout", "torch.nn.Dropout"):
            continue
        if name in ("nn.Buffer", "torch.nn.Buffer") and "persistent=False" in edit.flat(call):
            continue
        short = name.rsplit(".", 1)[-1]
        if name in classes or name.startswith("nn.") or short[:1].isupper() or short == "get_rope":
            return True
    return False
