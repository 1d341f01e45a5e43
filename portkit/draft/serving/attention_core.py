"""Turns a hand-written attention into the `attention_interface` call of today's files.

Old files write softmax(Q K^T * scale + mask) V by hand: matmul, baddbmm, masks, views that merge
batch and heads. Whatever the spelling, axes tell what is what: a product that sums over the head
dimension makes scores, one that sums over keys makes the output. Statements that only serve that
core give way to one call; projections, clipping and what follows the heads stay as they are.
"""

from __future__ import annotations

import re
from dataclasses import replace

import libcst as cst

from portkit.draft import edit
from portkit.draft.blocker import Blocker
from portkit.draft.serving.core_expressions import CoreExpressions
from portkit.draft.serving.core_values import HEADS, OTHER, Value
from portkit.draft.work import set_method

Env = dict[str, Value]
_WORD = re.compile(r"\w+")
_SETTINGS = re.compile(r"\w+\.(dtype|device|shape\b|size\()")
"""What is asked of a tensor without its numbers."""


class AttentionCore(CoreExpressions):
    """Reads one forward, statement by statement."""

    def run(self, function: cst.FunctionDef) -> cst.FunctionDef:
        """The forward with its core as one call; unchanged if it attends in no such way."""
        env: Env = {name: OTHER for name in edit.parameters(function)}
        for name in self.masks:
            env[name] = Value("mask")
        for name in self.biases:
            env[name] = Value("bias", text="")
        for name in self.inputs:
            env[name] = Value("tensor", ("b", "s", "w"))
        body = self._block(edit.body_of(function), env)
        return edit.with_body(function, body) if self.attended else function

    def name_head_dim(self, cls: cst.ClassDef) -> cst.ClassDef:
        """The class with an attribute for the dimension of a head, if it has none."""
        if not self.attended or not self.head_dim or self.head_dim.startswith("self.head_dim"):
            return cls
        init = edit.method(cls, "__init__")
        body = list(edit.body_of(init))
        made = edit.statement(f"self.head_dim = {self.head_dim}")
        # Before the projections, whose sizes it gives; after the attributes that it reads.
        read = edit.self_attributes_read(made)
        assigned = [(edit.assigned_attribute(s) or ("",))[0] for s in body]
        at = max((i + 1 for i, attr in enumerate(assigned) if attr in read), default=len(body))
        return set_method(cls, edit.with_body(init, [*body[:at], made, *body[at:]]))

    # ---- statements -------------------------------------------------------------------------

    def _block(self, body: list[edit.Statement], env: Env) -> list[edit.Statement]:
        out: list[edit.Statement] = []
        for node in body:
            out += self._statement(node, env)
        return out

    def _statement(self, node: edit.Statement, env: Env) -> list[edit.Statement]:
        if isinstance(node, cst.If):
            taken = self._of_rank(node, env)
            return self._if(node, env) if taken is None else self._block(taken, env)
        small = edit.single(node)
        if isinstance(small, cst.Return) and self.attended:
            return [self._returned(node, small)]
        if isinstance(small, cst.AugAssign):
            return self._augmented(node, small, env)
        pair = edit.assigned(node)
        if pair is None:
            return [node]
        target, value = pair
        if self.cut and edit.code(node).strip() == self.cut.strip():
            tensor = Value("tensor", ("b", "s", "w"))
            env.update({edit.code(e.value): tensor for e in target.elements})
            return [node]
        if isinstance(target, cst.Tuple):
            return self._tuple(node, target, value, env)
        name = edit.code(target)
        if self._rotates(value, env, [name]):
            return [node]
        got = self.value(value, env)
        return self._bound(node, name, got, env)

    def _bound(self, node, name: str, got: Value, env: Env) -> list[edit.Statement]:
        if got.kind == "attend":
            return self._attend(node, name, got, env)
        if got.kind == "merged":  # the heads put back together: [b, s, h * d]
            made = f"{name} = {got.text}.reshape(*{got.text}.shape[:-2], -1)"
            env[name] = Value("tensor", ("b", "s", "w"))
            return [edit.statement(made).with_changes(leading_lines=node.leading_lines)]
        if got.kind == "tensor" and not got.canonical and got.axes in (HEADS, ("b", "h", "d", "s")):
            env[name] = replace(got, canonical=name)
            return [self._plain_view(_by_transpose(node), got)]
        if got.kind == "tensor" and got.axes == HEADS and got.canonical == name:
            return []
        if got.kind == "tensor" and got.axes == ("b", "s", "h", "d"):
            node = self._plain_view(node, got)
        if got.kind in ("other", "plain"):
            self._loses(node, edit.assigned(node)[1], env)
        env[name] = got
        if got.kind in ("scores", "probs", "context", "mask", "bias"):
            return []
        if got.kind == "tensor" and set("hd") & set("".join(got.axes)) and got.canonical:
            return []
        return [node]

    def _plain_view(self, node, got: Value):
        """x.view(new_shape) into heads as x.view(*x.shape[:-1], -1, self.head_dim)."""
        dim = self.head_dim if self.head_dim.startswith("self.") else "self.head_dim"

        def change(here: cst.CSTNode) -> cst.CSTNode | None:
            if isinstance(here, cst.Call) and edit.code(here.func).endswith((".view", ".reshape")):
                owner = edit.code(here.func.value)
                if len(here.args) == 1 and isinstance(here.func.value, cst.Name):
                    return edit.expression(f"{owner}.view(*{owner}.shape[:-1], -1, {dim})")
                if got.axes == HEADS and edit.code(here.func.value).endswith(".transpose(1, 2)"):
                    return here.func.value  # a view of [b, h, s, d] as itself
            return None

        return edit.replace(node, change)

    def _tuple(self, node, target: cst.Tuple, value, env: Env) -> list[edit.Statement]:
        names = [edit.code(e.value) for e in target.elements]
        if isinstance(value, cst.Tuple | cst.List) and len(value.elements) == len(names):
            made: list[edit.Statement] = []
            found = [self.value(e.value, env) for e in value.elements]
            for name, got, element in zip(names, found, value.elements, strict=True):
                one = edit.statement(f"{name} = {edit.code(element.value)}")
                made += self._bound(one, name, got, env)
            if made:
                made[0] = made[0].with_changes(leading_lines=node.leading_lines)
            return made
        if self._rotates(value, env, names):
            return [node]
        got = self.value(value, env)
        if got.kind == "shape" and len(got.items) == len(names):
            env.update({n: Value("size", text=i) for n, i in zip(names, got.items, strict=True)})
            return [node]
        if got.kind == "attend":
            made = self._attend(node, names[0], got, env)
            env.update({name: OTHER for name in names[1:]})
            return made
        parts = got.parts if len(got.parts) == len(names) else (OTHER,) * len(names)
        if any(part.kind == "other" for part in parts):
            self._loses(node, value, env)
        for name, part in zip(names, parts, strict=True):
            keeps = part.kind == "tensor" and part.axes == HEADS
            env[name] = replace(part, canonical=name) if keeps else part
        return [node]

    def _rotates(self, value: cst.BaseExpression, env: Env, names: list[str]) -> bool:
        """Whether it is `q, k = rotate(q, k, ...)`: a function of the file that keeps shapes."""
        if not isinstance(value, cst.Call) or not isinstance(value.func, cst.Name):
            return False
        given = [edit.code(a.value) for a in value.args if a.keyword is None][: len(names)]
        found = [env.get(name, OTHER) for name in given]
        if len(found) < len(names) or any(f.kind != "tensor" or not f.axes for f in found):
            return False
        if any(f.canonical not in ("", n) for f, n in zip(found, given, strict=True)):
            return False
        for name, got in zip(names, found, strict=True):
            env[name] = replace(got, canonical=got.canonical and name)
        return True

    def _augmented(self, node, small: cst.AugAssign, env: Env) -> list[edit.Statement]:
        """x *= y as x = x * y."""
        operators = {
            cst.AddAssign: cst.Add,
            cst.MultiplyAssign: cst.Multiply,
            cst.DivideAssign: cst.Divide,
        }
        kind = operators.get(type(small.operator))
        name = edit.code(small.target)
        if kind is None or env.get(name, OTHER).kind != "scores":
            return [node]
        product = cst.BinaryOperation(small.target, kind(), small.value)
        return self._bound(node, name, self.value(product, env), env)

    def _if(self, node: cst.If, env: Env) -> list[edit.Statement]:
        inside, outside = dict(env), dict(env)
        attended = self.attended
        body = self._block(edit.body_of(node), inside)
        first, self.attended = self.attended, attended
        orelse = node.orelse
        if isinstance(orelse, cst.Else):
            other = self._block(edit.body_of(orelse), outside)
            orelse = edit.with_body(orelse, other) if other else None
        elif isinstance(orelse, cst.If):
            made = self._if(orelse, outside)
            orelse = made[0] if len(made) == 1 else None
        self.attended = self.attended or first
        for name in {*inside, *outside}:
            env[name] = self._joined(node, inside.get(name, OTHER), outside.get(name, OTHER))
        if not body and orelse is None:
            return []
        return [edit.with_body(node, body).with_changes(orelse=orelse)]

    def _of_rank(self, node: cst.If, env: Env) -> list[edit.Statement] | None:
        """The branch that is taken if the test is `len(x.shape) == n`; None for another test."""
        for name, got in env.items():
            asked = f"len({name}.shape) == "
            number = edit.code(node.test).removeprefix(asked)
            if got.axes and number.isdigit() and edit.code(node.test) == asked + number:
                if len(got.axes) == int(number):
                    return edit.body_of(node)
                if isinstance(node.orelse, cst.If):
                    return [node.orelse]
                return edit.body_of(node.orelse) if node.orelse is not None else []
        return None

    def _joined(self, node: cst.If, inside: Value, outside: Value) -> Value:
        if inside == outside:
            return inside
        if inside.kind == outside.kind == "scores" and inside.parts == outside.parts:
            if inside.bias and outside.bias and inside.bias != outside.bias:
                raise self.stop("adds its position bias in two ways", node)
            factor = inside.factor
            if inside.factor != outside.factor:
                one, two = inside.factor or "1.0", outside.factor or "1.0"
                factor = f"({one} if {edit.flat(node.test)} else {two})"
            return replace(inside, factor=factor, bias=inside.bias or outside.bias)
        if {inside.kind, outside.kind} <= {"mask", "other"}:
            return Value("mask")
        if inside.kind == outside.kind == "tensor":
            return Value("tensor", inside.axes) if inside.axes == outside.axes else OTHER
        return OTHER

    # ---- the call ---------------------------------------------------------------------------

    def _attend(self, node, name: str, got: Value, env: Env) -> list[edit.Statement]:
        query, key, value = got.parts
        for part in got.parts:
            if not part.canonical:
                raise self.stop("attends to something other than q, k and v by heads", node)
        scale = got.factor or "1.0"
        arguments = f"self, {query.canonical}, {key.canonical}, {value.canonical}, None"
        extra = f", position_bias={got.bias}" if got.bias else ""
        if self.window:
            extra += f", sliding_window={self.window}"
        env[name] = Value("context", got.axes, text=name)
        self.attended = True
        made = f"{name}, _ = attention_interface({arguments}, scaling={scale}{extra})"
        return [edit.statement(made).with_changes(leading_lines=node.leading_lines)]

    def _returned(self, node, small: cst.Return) -> edit.Statement:
        """Only the output leaves: attention weights are nothing that vLLM keeps."""
        value = small.value
        if isinstance(value, cst.Tuple):
            value = value.elements[0].value
        if isinstance(value, cst.BinaryOperation) and isinstance(value.left, cst.List):
            value = value.left.elements[0].value  # [output] + weights
        return node.with_changes(body=[small.with_changes(value=value)])

    def _loses(self, node: edit.Statement, value: cst.BaseExpression, env: Env) -> None:
        """Keep the first statement whose result is unknown though it reads what was followed."""
        followed = {n for n, v in env.items() if v.kind in ("tensor", "scores", "probs")}
        read = set(_WORD.findall(_SETTINGS.sub("", edit.code(value))))
        if self.lost is None and read & followed:
            written = edit.code(node).strip().splitlines()
            code = [line for line in written if line and not line.startswith("#")]
            shown = code[0] + (" ..." if len(code) > 1 else "")
            self.lost = self.stop(f"attends by hand and cannot be followed beyond `{shown}`", node)
            adds = isinstance(value, cst.BinaryOperation) and isinstance(value.operator, cst.Add)
            if adds and any(env[n].kind == "scores" for n in read & followed):
                self.lost.next = "vLLM's Attention adds nothing to scores but ALiBi's bias."

    def stop(self, what: str, node: cst.CSTNode) -> Blocker:
        written = edit.code(node).strip().splitlines()
        wanted = next(line for line in written if line and not line.startswith("#"))
        line = next((n for n, x in enumerate(self.source, 1) if wanted in x), self.first_line)
        return Blocker(f"{self.cls}.forward {what}.", line)


def _by_transpose(node: edit.Statement) -> edit.Statement:
    """x.permute(0, 2, 1, 3) of [b, s, h, d] as x.transpose(1, 2); keys are not turned further."""

    def change(here: cst.CSTNode) -> cst.CSTNode | None:
        if not isinstance(here, cst.Call) or not isinstance(here.func, cst.Attribute):
            return None
        if here.func.attr.value == "permute" and len(here.args) == 4:
            return edit.expression(f"{edit.code(here.func.value)}.transpose(1, 2)")
        return None

    return edit.replace(node, change)
