"""Rewrites an attention's forward from [batch, seq, ...], masks and caches to [num_tokens, ...].

It follows each value through the author's statements: whether it is a tensor, and whether its heads
have been split off and moved (`view`, `transpose`), which flat tokens no longer need. Statements
stay where they are; what only served shapes, masks and caches disappears. A statement whose meaning
is not certain stops the draft with its line.
"""

from __future__ import annotations

from dataclasses import replace

import libcst as cst

from portkit.draft import edit
from portkit.draft.blocker import Blocker
from portkit.draft.transforms.attention_elementwise import in_place
from portkit.draft.transforms.attention_expressions import AttentionExpressions
from portkit.draft.transforms.attention_values import (
    ERASED,
    FlowResult,
    Value,
)
from portkit.draft.transforms.layer_rotation import ROTATES


class AttentionFlow(AttentionExpressions):
    """Statements: runs over one forward and keeps what flat tokens still need."""

    def run(self, forward: cst.FunctionDef, hidden: str) -> FlowResult:
        env = {name: ERASED for name in edit.parameters(forward)}
        star = forward.params.star_kwarg
        if star is not None:
            env[star.name.value] = ERASED
        env[hidden] = Value("tensor", cst.Name(hidden))
        if "position_ids" in env:
            env["position_ids"] = Value("positions", cst.Name("positions"))
        env["self"] = Value("plain", cst.Name("self"))
        body = self._block(edit.body_of(forward), env)
        if not self.calls:
            raise Blocker(f"{self.cls}.forward never calls the attention.", self.first_line)
        of_positions = frozenset(self.of_positions)
        return FlowResult(body, self.keywords, self.rotary_used, self.calls, of_positions)

    # ---- statements -------------------------------------------------------------------------

    def _block(self, body: list[edit.Statement], env: dict[str, Value]) -> list[edit.Statement]:
        out: list[edit.Statement] = []
        for node in body:
            # the author's blank line or comment stays above the first statement that survives
            made = self._statement(node, env)
            out += [*self.before, *made]
            self.before.clear()
        return out

    def _statement(self, node: edit.Statement, env: dict[str, Value]) -> list[edit.Statement]:
        if edit.is_docstring(node):
            return []
        if edit.code(node) in self.given:
            env.update(self.given[edit.code(node)])
            return [node]
        if isinstance(node, cst.If):
            return self._if(node, env)
        small = edit.single(node)
        if isinstance(small, cst.Return) and small.value is not None:
            returned = self._value(small.value, env)
            first = returned.parts[0] if returned.kind == "several" else returned
            if first.kind != "tensor" or first.layout != "flat":
                raise self._stop("returns something other than the attention's output", node)
            return [node.with_changes(body=[small.with_changes(value=first.node)])]
        pair = edit.assigned(node)
        if pair is not None:
            return self._assign(node, *pair, env)
        changed = in_place(small)
        if changed is not None and self._value(changed[0], env).kind == "tensor":
            return self._assign(node, *changed, env)
        if isinstance(small, cst.Raise) or (
            isinstance(small, cst.Expr) and "warn" in edit.code(small.value)
        ):
            return []
        raise self._stop(f"cannot follow `{edit.flat(node)}`", node)

    def _if(self, node: cst.If, env: dict[str, Value]) -> list[edit.Statement]:
        if self._erased_inside(node.test, env):
            test = edit.code(node.test)
            if "is None" in test and node.orelse is not None:
                raise self._stop(f"cannot decide `if {test}` without Transformers' arguments", node)
            if edit.find(
                node, lambda n: edit.is_call(n, *self.rotary_functions, "self.rotary_emb")
            ):
                if self.rotates_by_layer and test.endswith("is not None") and node.orelse is None:
                    body = self._block(edit.body_of(node), env)
                    made = node.with_changes(test=edit.expression(ROTATES))
                    return [edit.with_body(made, body)]
                raise self._stop(f"rotates only `if {test}`, which other classes decide", node)
            if node.orelse is None:
                for name in self._bound(node):
                    if env.get(name, ERASED).kind == "plain":
                        env[name] = ERASED
                return []
            raise self._stop(f"cannot decide `if {test}` without Transformers' arguments", node)
        inside, outside = dict(env), dict(env)
        body = self._block(edit.body_of(node), inside)
        other: list[edit.Statement] = []
        if isinstance(node.orelse, cst.Else):
            other = self._block(edit.body_of(node.orelse), outside)
        elif node.orelse is not None:
            raise self._stop("cannot follow an elif here", node)
        for name in {*inside, *outside}:
            first, second = inside.get(name), outside.get(name)
            if (
                first is not None
                and second is not None
                and (first.kind, first.layout) != (second.kind, second.layout)
            ):
                raise self._stop(
                    f"has two shapes of {name} after `if {edit.code(node.test)}`",
                    node,
                )
            env[name] = first or second  # type: ignore[assignment]
        if [edit.code(s) for s in body] == [edit.code(s) for s in other]:
            return body
        if not body:
            raise self._stop("cannot follow a branch that only its else needs", node)
        orelse = edit.with_body(node.orelse, other) if other else None
        return [edit.with_body(node, body).with_changes(orelse=orelse)]

    def _assign(self, node, target, value, env) -> list[edit.Statement]:
        if isinstance(target, cst.Tuple):
            names = [edit.code(e.value) for e in target.elements]
            call = self._rotary_call(value, env)
            if call is not None:
                return self._rotate(node, names, call, env)
            if isinstance(value, cst.GeneratorExp):
                return self._each(node, names, value, env)
            got = self._value(value, env)
            if edit.code(value) in ("None, None", "(None, None)"):  # cos and sin, before they are
                got = ERASED
            if got.kind in ("erased", "shape"):
                env.update({name: got for name in names})
                return []
            if got.kind != "several" or len(got.parts) != len(names):
                raise self._stop(f"cannot follow `{edit.flat(node)}`", node)
            return self._bind_several(node, names, got, env)
        name = edit.code(target)
        call = self._rotary_call(value, env)
        if call is not None and [v.kind in ("tensor", "part") for v in call].count(True) == 1:
            return self._rotate_one(node, name, call[0], env)
        got = self._value(value, env)
        if got.kind == "tensor":
            new = node.with_changes(body=[cst.Assign([cst.AssignTarget(cst.Name(name))], got.node)])
            env[name] = replace(got, node=cst.Name(name))
            return [] if edit.code(got.node) == name else [new]
        env[name] = got
        if got.kind == "plain":
            env[name] = Value("plain", cst.Name(name))
            return [node]
        if got.kind in ("erased", "shape", "part"):
            return []
        raise self._stop(f"cannot follow `{edit.flat(node)}`", node)

    def _each(self, node, names, value: cst.GeneratorExp, env) -> list[edit.Statement]:
        """a, b = (f(x) for x in parts): the parts by name, then f of each."""
        over = value.for_in
        parts = self._value(over.iter, env)
        if parts.kind != "several" or len(parts.parts) != len(names) or over.ifs:
            raise self._stop(f"cannot follow `{edit.flat(node)}`", node)
        out = self._bind_several(node, names, parts, env)
        for name in names:
            inner = {**env, edit.code(over.target): env[name]}
            made = self._value(value.elt, inner)
            if made.kind != "tensor":
                raise self._stop(f"cannot follow `{edit.flat(node)}`", node)
            out.append(edit.statement(f"{name} = {edit.code(made.node)}"))
            env[name] = replace(made, node=cst.Name(name))
        return out

    def _bind_several(self, node, names, got, env) -> list[edit.Statement]:
        kept = [(n, p) for n, p in zip(names, got.parts, strict=False)]
        for name, part in kept:
            env[name] = replace(part, node=cst.Name(name)) if part.kind == "tensor" else part
        tensors = [(n, p) for n, p in kept if p.kind == "tensor"]
        if not tensors:
            return []
        if got.node is not None:  # one expression that yields them all, e.g. a split
            return [
                node.with_changes(
                    body=[
                        cst.Assign([cst.AssignTarget(edit.expression(", ".join(names)))], got.node)
                    ]
                )
            ]
        if len(tensors) == 1:
            name, part = tensors[0]
            if edit.code(part.node) == name:
                return []
            return [
                node.with_changes(body=[cst.Assign([cst.AssignTarget(cst.Name(name))], part.node)])
            ]
        left = ", ".join(n for n, _ in tensors)
        right = ", ".join(edit.code(p.node) for _, p in tensors)
        return [
            node.with_changes(
                body=[cst.Assign([cst.AssignTarget(edit.expression(left))], edit.expression(right))]
            )
        ]

    # ---- rotary and attention ---------------------------------------------------------------

    def _rotary_call(self, value: cst.BaseExpression, env: dict[str, Value]) -> list[Value] | None:
        if not (isinstance(value, cst.Call) and edit.code(value.func) in self.rotary_functions):
            return None
        return [
            self._value(a.value, env)
            for a in value.args
            if a.keyword is None or a.keyword.value in ("q", "k")
        ]

    def _rotate_one(self, node, name, value: Value, env) -> list[edit.Statement]:
        """Query and key rotated by a call each: the second call does both."""
        base = value.base if value.kind == "part" else edit.code(value.node)
        if value.kind == "tensor" and (value.layout == "flat" or base != name):
            raise self._stop("rotates something other than query and key", node)
        if self.half_rotated is None:
            self.half_rotated = (name, value)
            env[name] = replace(value, turned=True)
            return []
        (other, first), self.half_rotated = self.half_rotated, None
        pair = [(name, value), (other, first)]
        if base.startswith("k"):
            pair.reverse()
        return self._rotate(node, [n for n, _ in pair], [v for _, v in pair], env)

    def _rotate(self, node, names, values, env) -> list[edit.Statement]:
        query, key = values[:2]
        if len(names) != 2:
            raise self._stop(f"cannot follow `{edit.flat(node)}`", node)
        self.rotary_used = True
        if query.kind == key.kind == "part":
            if query.side != "rotated" or key.side != "rotated" or query.bound != key.bound:
                raise self._stop("rotates parts of query and key that differ", node)
            left = f"{query.base}, {key.base}"
            for name, part in zip(names, (query, key), strict=False):
                env[name] = replace(part, turned=True)
        elif query.kind == key.kind == "tensor" and "flat" not in (query.layout, key.layout):
            left = ", ".join(names)
            for name, part in zip(names, (query, key), strict=False):
                env[name] = replace(part, node=cst.Name(name))
            return [
                self._line(
                    node,
                    f"{left} = {self.rotary_call}"
                    f"(positions, {edit.code(query.node)}, {edit.code(key.node)})",
                )
            ]
        else:
            raise self._stop("rotates something other than query and key", node)
        return [self._line(node, f"{left} = {self.rotary_call}(positions, {left})")]
