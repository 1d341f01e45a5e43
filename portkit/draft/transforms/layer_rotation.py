"""Step forward: a base of the rotary embedding for each layer, and layers that do not rotate.

The original may make one rotary embedding per base, and hand each layer the angles of its own, or
None. vLLM's layers each ask get_rope for theirs (it keeps one table for equal parameters). Or the
config decides whether there is a rotary embedding at all, and each attention skips a rotation by
None; then each layer decides the same by the same condition.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass

import libcst as cst

from portkit.analysis.classes import call_name, view_module
from portkit.draft import edit
from portkit.draft.blocker import Blocker
from portkit.draft.work import Work

ROTATES = "self.rotary_emb is not None"


@dataclass(frozen=True)
class LayerRotation:
    """What the model's loop says about the angles of layer `layer_idx`."""

    value: str
    """The layer's own parameter, e.g. "config.layer_rope_theta[layer_idx]"; zero: no rotation."""
    field: str
    """Its name in rope_parameters, e.g. "rope_theta"."""

    def apply(self, init: tuple[edit.Statement, ...]) -> list[edit.Statement]:
        """self.rotary_emb = get_rope(...) with this layer's parameter, or None."""
        (made,) = init
        first = edit.statement(f"{self.field} = {self.value}")
        call = edit.assigned_attribute(made)[1]
        if not edit.is_call(call, "get_rope"):
            raise Blocker(f"a {self.field} for each layer needs vLLM's get_rope, which differs.")
        arguments = [
            edit.flat(a.with_changes(comma=cst.MaybeSentinel.DEFAULT))
            if a.keyword is None or a.keyword.value != "rope_parameters"
            else f'rope_parameters={{**{edit.flat(a.value)}, "{self.field}": {self.field}}}'
            for a in call.args
        ]
        shown = ",\n        ".join(arguments)
        new = edit.statement(
            f"self.rotary_emb = (\n    get_rope(\n        {shown},\n    )\n"
            f"    if {self.field}\n    else None\n)"
        )
        first = edit.blank_before(edit.comment_before(first, "Zero: this layer does not rotate."))
        comments = [line for line in made.leading_lines if line.comment is not None]
        return [first, new.with_changes(leading_lines=comments)]


@dataclass(frozen=True)
class RotationIf:
    """The config decides which layers rotate."""

    condition: str
    """Over `config` and `layer_idx`: where the model makes its rotary class, and what its loop
    hands to the layers."""

    def apply(self, init: tuple[edit.Statement, ...]) -> list[edit.Statement]:
        """self.rotary_emb = get_rope(...) if condition else None."""
        new: list[edit.Statement] = []
        for node in init:
            pair = edit.assigned_attribute(node)
            if pair is None or pair[0] != "rotary_emb":
                new.append(node)
                continue
            made = edit.statement(
                f"self.rotary_emb = (\n    {edit.flat(pair[1])}\n"
                f"    if {self.condition}\n    else None\n)"
            )
            new.append(made.with_changes(leading_lines=node.leading_lines))
        return new


def rotation_of(work: Work) -> LayerRotation | RotationIf | None:
    """What decides how, and whether, a layer rotates; None: all layers do, by one base."""
    return layer_rotation(work) or _rotation_if(work)


def _rotation_if(work: Work) -> RotationIf | None:
    """Rotary(config) if A else None; `angles if B else None` in the loop -> A and B."""
    facts = work.facts
    if facts.rotary is None or not facts.rotary.cls:
        return None
    view = view_module(work.module.code).classes[facts.model]
    made = [a for a in view.assigned if call_name(a.value) == facts.rotary.cls]
    conditions = [a.condition.replace("self.config", "config") for a in made if a.condition]
    cls = work.cls(facts.model)
    forward = edit.method(cls, "forward")
    tables = {
        edit.code(p[0]): p[1]
        for n in edit.body_of(forward)
        if (p := edit.assigned(n)) is not None and isinstance(p[1], cst.DictComp)
    }
    for loop in edit.find(forward, lambda n: isinstance(n, cst.For)):
        handed = _handed_if(loop, tables)
        if handed is None:
            return None
        conditions += handed
    names = {n.id for c in conditions for n in ast.walk(ast.parse(c)) if isinstance(n, ast.Name)}
    if not conditions or not names <= {"config", "getattr", "hasattr", "layer_idx"}:
        return None
    return RotationIf(" and ".join(dict.fromkeys(conditions)))


def _handed_if(loop: cst.For, tables: dict[str, cst.DictComp]) -> list[str] | None:
    """The condition in `position_embeddings=angles if self.config.types[i] == "x" else None`.

    Or in the table of angles by type that the loop picks from, with the type that it picks.
    None if the angles are picked, too (`angles[base]`): a condition alone would lose the base.
    """
    if not isinstance(loop.target, cst.Tuple):
        return []
    index = edit.code(loop.target.elements[0].value)
    bound = {
        edit.code(p[0]): p[1] for n in edit.body_of(loop) if (p := edit.assigned(n)) is not None
    }
    found = []
    for given in edit.find(loop.body, lambda n: isinstance(n, cst.Arg)):
        if given.keyword is None or given.keyword.value != "position_embeddings":
            continue
        value = bound.get(edit.code(given.value), given.value)
        if isinstance(value, cst.IfExp) and edit.code(value.orelse) == "None":
            if isinstance(value.body, cst.Subscript):
                return None
            test = edit.flat(value.test).replace("self.config", "config")
            found.append(test.replace(f"[{index}]", "[layer_idx]"))
        if isinstance(value, cst.Subscript) and edit.code(value.value) in tables:
            table = tables[edit.code(value.value)]
            if isinstance(table.value, cst.IfExp) and edit.code(table.value.orelse) == "None":
                kind = edit.flat(value.slice[0].slice)
                test = edit.flat(edit.replace_text(table.value.test, edit.code(table.key), kind))
                test = test.replace("self.config", "config")
                found.append(test.replace(f"[{index}]", "[layer_idx]"))
    return found


def layer_rotation(work: Work) -> LayerRotation | None:
    """Read the model's loop: `angles[base] if base else None`, base = self.config.bases[i]."""
    facts = work.facts
    cls = work.cls(facts.model)
    forward, init = edit.method(cls, "forward"), edit.method(cls, "__init__")
    for loop in edit.find(forward, lambda n: isinstance(n, cst.For)):
        if not isinstance(loop.target, cst.Tuple):
            continue
        index = edit.code(loop.target.elements[0].value)
        bound = {
            edit.code(p[0]): p[1] for n in edit.body_of(loop) if (p := edit.assigned(n)) is not None
        }
        for given in edit.find(loop.body, lambda n: isinstance(n, cst.Arg)):
            if given.keyword is None or given.keyword.value != "position_embeddings":
                continue
            value = bound.get(edit.code(given.value))
            if not (isinstance(value, cst.IfExp) and edit.code(value.orelse) == "None"):
                continue
            if facts.rotary is None:
                return None
            key = edit.code(value.test)
            base = edit.flat(bound.get(key))
            field = _field(init, facts.rotary.cls)
            whole = (
                isinstance(value.body, cst.Subscript)
                and edit.code(value.body.slice[0].slice) == key
            )
            if whole and field and base.startswith("self.config.") and base.endswith(f"[{index}]"):
                shown = base.removeprefix("self.").removesuffix(f"[{index}]") + "[layer_idx]"
                return LayerRotation(shown, field)
    return None


def _field(init: cst.FunctionDef, rotary: str) -> str:
    """The one entry of rope_parameters in which the rotary embeddings made in a loop differ."""
    for loop in edit.find(init, lambda n: isinstance(n, cst.For)):
        if not edit.find(loop, lambda n: edit.is_call(n, rotary)):
            continue
        for node in edit.find(loop, lambda n: isinstance(n, cst.Dict)):
            if len(node.elements) != 2 or not isinstance(node.elements[0], cst.StarredDictElement):
                continue
            starred, own = node.elements
            same = edit.code(starred.value) == "config.rope_parameters"
            if same and edit.code(own.value) == edit.code(loop.target):
                return own.key.evaluated_value
    return ""
