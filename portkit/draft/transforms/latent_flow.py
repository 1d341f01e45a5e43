"""Rewrites the forward of a multi-head latent attention to flat tokens, statement by statement.

The author's statements stay where they are. Shapes, masks and caches disappear, the method that
expands the latent comes in line, and values are padded to the head size of queries and keys around
vLLM's Attention, whose cache has one. A statement whose meaning is not certain stops the draft.
"""

from __future__ import annotations

import libcst as cst

from portkit.analysis.facts import LatentFacts
from portkit.draft import edit
from portkit.draft.blocker import Blocker
from portkit.draft.transforms.latent_expressions import LatentExpressions
from portkit.draft.transforms.latent_values import EMPTY, ERASED, GONE, Rotation, Value


class LatentFlow(LatentExpressions):
    """Statements of one forward. See LatentExpressions for what they are made of."""

    def run(self, forward: cst.FunctionDef, hidden: str) -> list[edit.Statement]:
        env = {name: ERASED for name in edit.parameters(forward)}
        star = forward.params.star_kwarg
        if star is not None:
            env[star.name.value] = ERASED
        env[hidden] = Value("tensor", cst.Name(hidden))
        body = self._block(edit.body_of(forward), env)
        if not self.attended:
            raise Blocker(f"{self.cls}.forward never calls the attention.", self.first_line)
        return body

    def _block(self, body: list[edit.Statement], env: dict[str, Value]) -> list[edit.Statement]:
        out: list[edit.Statement] = []
        for node in body:
            made = self._statement(node, env)
            out += [*self.before, *made]
            self.before = []
        return out

    def _statement(self, node: edit.Statement, env: dict[str, Value]) -> list[edit.Statement]:
        if edit.is_docstring(node):
            return []
        if isinstance(node, cst.If):
            return self._if(node, env)
        small = edit.single(node)
        if isinstance(small, cst.Return) and small.value is not None:
            got = self._value(small.value, env)
            first = got.parts[0] if got.kind == "several" else got
            if first.kind != "tensor" or first.form != "flat":
                raise self._stop("returns something other than the attention's output", node)
            return [node.with_changes(body=[small.with_changes(value=first.node)])]
        if isinstance(small, cst.Expr) and isinstance(small.value, cst.Call):
            return self._fill(node, small.value, env)
        pair = edit.assigned(node)
        if pair is None:
            raise self._stop(f"cannot follow `{edit.flat(node)}`", node)
        return self._assign(node, *pair, env)

    # ---- branches ---------------------------------------------------------------------------

    def _if(self, node: cst.If, env: dict[str, Value]) -> list[edit.Statement]:
        test = edit.flat(node.test)
        if self._erased_inside(node.test, env):
            if node.orelse is not None:
                raise self._stop(f"cannot decide `if {test}` without Transformers' arguments", node)
            return []
        if node.orelse is not None and not isinstance(node.orelse, cst.Else):
            raise self._stop("cannot follow an elif here", node)
        inside, outside = dict(env), dict(env)
        self.conditions.append(test)
        body = self._block(edit.body_of(node), inside)
        self.conditions[-1] = f"not ({test})"
        other = self._block(edit.body_of(node.orelse), outside) if node.orelse else []
        self.conditions.pop()
        for name in {*inside, *outside}:
            first, second = inside.get(name), outside.get(name)
            if first is None or second is None:
                env[name] = GONE
                continue
            if (first.kind, first.form, first.moved) != (second.kind, second.form, second.moved):
                raise self._stop(f"has two shapes of {name} after `if {test}`", node)
            env[name] = first
        if [edit.flat(s) for s in body] == [edit.flat(s) for s in other]:
            return body
        if not body:
            raise self._stop("cannot follow a branch that only its else needs", node)
        orelse = edit.with_body(node.orelse, other) if other and node.orelse else None
        return [edit.with_body(node, body).with_changes(orelse=orelse)]

    # ---- assignments ------------------------------------------------------------------------

    def _assign(self, node, target, value, env) -> list[edit.Statement]:
        if isinstance(target, cst.Tuple):
            return self._unpack(node, [edit.code(e.value) for e in target.elements], value, env)
        if not isinstance(target, cst.Name):
            raise self._stop(f"cannot follow `{edit.flat(node)}`", node)
        got = self._value(value, env)
        return self._bind(node, target.value, got, value, env)

    def _bind(self, node, name, got: Value, value, env) -> list[edit.Statement]:
        env[name] = got
        if got.kind == "plain":
            env[name] = Value("plain", cst.Name(name))
            return [node]
        if got.kind in ("erased", "shape", "filled"):
            return []
        if got.kind != "tensor" or got.node is None:
            raise self._stop(f"cannot follow `{edit.flat(node)}`", node)
        env[name] = Value("tensor", cst.Name(name), got.form, got.moved)
        if edit.code(got.node) == name:
            return []
        new = edit.statement(f"{name} = {edit.code(got.node)}")
        same = edit.flat(got.node) == edit.flat(value)
        return [new.with_changes(leading_lines=node.leading_lines) if same else new]

    def _unpack(self, node, names: list[str], value, env) -> list[edit.Statement]:
        if isinstance(value, cst.Call) and edit.code(value.func) in self.rotary_functions:
            return self._rotate(names, value, env)
        inner = self._expansion(value, env)
        statements, got = inner if inner is not None else ([], self._value(value, env))
        if got.kind == "erased":
            env.update({n: ERASED for n in names})
            return statements
        if got.kind == "shape" and len(got.axes) == len(names):
            env.update({n: Value("shape", axes=(a,)) for n, a in zip(names, got.axes, strict=True)})
            return statements
        if got.kind != "several" or len(got.parts) != len(names):
            raise self._stop(f"cannot follow `{edit.flat(node)}`", node)
        if got.node is not None:  # one expression that yields them all
            for name, part in zip(names, got.parts, strict=True):
                env[name] = Value("tensor", cst.Name(name), part.form, part.moved)
                self.sizes[name] = part.size
            made = edit.statement(f"{', '.join(names)} = {edit.code(got.node)}")
            return [*statements, made]
        for name, part in zip(names, got.parts, strict=True):
            statements += self._bind(node, name, part, part.node, env)
        return statements

    def _rotate(self, names: list[str], call: cst.Call, env) -> list[edit.Statement]:
        """rotate(q, k, cos, sin) -> vLLM's layer, which takes [tokens, heads * size]."""
        tensors = [self._value(a.value, env) for a in call.args[:2]]
        by_heads = [t.kind == "tensor" and t.form != "flat" and t.moved for t in tensors]
        if by_heads != [True, True] or len(names) != 2:
            raise self._stop("rotates something other than queries and keys by heads", call)
        size = self.sizes.get(edit.code(tensors[0].node), self.latent.shared_dim)
        condition = " and ".join(self.conditions)
        self.rotations.append(Rotation(edit.code(call.func), condition, size))
        given, after = [], []
        for name, tensor in zip(names, tensors, strict=True):
            written = edit.code(tensor.node)
            given.append(f"{written}.flatten(1)" if tensor.form == "heads" else written)
            if tensor.form == "heads":
                shape = f"-1, {self.latent.num_heads}, {size}"
                after.append(edit.statement(f"{name} = {name}.view({shape})"))
            env[name] = Value("tensor", cst.Name(name), tensor.form, tensor.moved)
        turned = f"{', '.join(names)} = self.rotary_emb(positions, {', '.join(given)})"
        return [edit.blank_before(edit.statement(turned)), *after]

    # ---- the expansion ----------------------------------------------------------------------

    def _fill(self, node, call: cst.Call, env) -> list[edit.Statement]:
        """buffer[..., a:b].copy_(x), one part after the other -> one torch.cat."""
        func = call.func
        if not (
            isinstance(func, cst.Attribute)
            and func.attr.value == "copy_"
            and isinstance(func.value, cst.Subscript)
            and isinstance(func.value.value, cst.Name)
        ):
            raise self._stop(f"cannot follow `{edit.flat(node)}`", node)
        name, part = func.value.value.value, self._value(call.args[0].value, env)
        bounds = self._last_slice(func.value)
        buffer = env.get(name, ERASED)
        start = buffer.ends[-1] if buffer.ends else ""
        if buffer.kind != "filled" or part.kind != "tensor" or bounds is None or bounds[0] != start:
            raise self._stop(f"cannot follow `{edit.flat(node)}`", node)
        parts, ends = (*buffer.parts, part), (*buffer.ends, bounds[1])
        if bounds[1]:
            env[name] = Value("filled", parts=parts, ends=ends)
            return []
        env[name] = EMPTY
        whole = self._joined(list(parts), "-1", node)
        return self._bind(node, name, whole, whole.node, env)

    def _expansion(self, value, env) -> tuple[list[edit.Statement], Value] | None:
        """self.expand_kv(latent, shared) -> its statements in line, and what it returns."""
        if self.expand is None or not edit.is_call(value, f"self.{self.latent.expand}"):
            return None
        names = edit.parameters(self.expand)
        inner: dict[str, Value] = {}
        for index, argument in enumerate(value.args):
            name = argument.keyword.value if argument.keyword is not None else names[index]
            inner[name] = self._value(argument.value, env)
        body = edit.body_of(self.expand)
        last = edit.single(body[-1])
        if not isinstance(last, cst.Return) or last.value is None:
            raise self._stop(f"does not end self.{self.latent.expand} by a return", value)
        statements = self._block(body[:-1], inner)
        result = self._value(last.value, inner)
        targets = edit.find(cst.Module(statements), lambda n: isinstance(n, cst.AssignTarget))
        env.update({name: GONE for t in targets for name in edit.code(t.target).split(", ")})
        return statements, result


def flow_of(
    cls: cst.ClassDef,
    latent: LatentFacts,
    *,
    linears: set[str],
    norms: set[str],
    rotary_functions: set[str],
    source: str,
    first_line: int,
) -> LatentFlow:
    """A flow over the class's forward."""
    return LatentFlow(
        cls=cls.name.value,
        latent=latent,
        expand=edit.method(cls, latent.expand) if latent.expand else None,
        linears=linears,
        norms=norms,
        rotary_functions=rotary_functions,
        source=source,
        first_line=first_line,
    )
