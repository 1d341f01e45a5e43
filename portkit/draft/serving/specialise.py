"""Follows the served call through the file and folds what its arguments decide."""

from __future__ import annotations

from dataclasses import dataclass, field

import libcst as cst

from portkit.draft import edit
from portkit.draft.serving.values import (
    NONE,
    SOMETHING,
    UNKNOWN,
    Env,
    Known,
    const,
    evaluate,
    join,
    simplified,
    tagged,
    truth,
)
from portkit.draft.work import set_method

GIVEN = ("position_ids",)
OPEN = ("input_ids", "inputs_embeds", "logits_to_keep")
"""What the served call may pass or not: nothing is folded that depends on it."""
_ROUNDS = 6


@dataclass
class _File:
    """The classes and functions of a file, and what calls were seen to pass them."""

    module: cst.Module
    classes: dict[str, cst.ClassDef] = field(default_factory=dict)
    functions: dict[str, cst.FunctionDef] = field(default_factory=dict)
    made: dict[str, dict[str, str]] = field(default_factory=dict)
    """Class -> attribute -> class of the file that it holds (in a list, too)."""
    attributes: dict[str, Env] = field(default_factory=dict)
    passed: dict[tuple[str, str], Env] = field(default_factory=dict)
    """(class or "", function) -> parameter -> what its calls pass."""
    alibi: frozenset[tuple[str, str]] = frozenset()
    """Functions whose result is an ALiBi bias."""


@dataclass(frozen=True)
class Specialised:
    """The file, and what the served call passes to each function that it reaches."""

    module: cst.Module
    passed: dict[tuple[str, str], Env]


def specialise(
    module: cst.Module, architecture: str, alibi: frozenset[tuple[str, str]] = frozenset()
) -> Specialised:
    """The file as the served call runs it; parts that no served call reaches stay as they are."""
    file = _read(module)
    file.alibi = alibi
    if architecture not in file.classes:
        return Specialised(module, {})
    forward = edit.method(file.classes[architecture], "forward")
    if forward is None:
        return Specialised(module, {})
    root: Env = {}
    for name in edit.parameters(forward):
        root[name] = SOMETHING if name in GIVEN else UNKNOWN if name in OPEN else NONE
    for name, default in _defaults(forward).items():
        if name not in GIVEN + OPEN and default is not None:
            root[name] = evaluate(default, {}, lambda *_: UNKNOWN)
    file.passed[architecture, "forward"] = root
    if edit.method(file.classes[architecture], "__init__") is not None:
        file.passed[architecture, "__init__"] = {}
    for _ in range(_ROUNDS):
        before = {key: dict(env) for key, env in file.passed.items()}
        for key in list(file.passed):
            _Run(file, *key).function()
        if file.passed == before:
            break
    for owner, name in list(file.passed):
        new = _Run(file, owner, name).function()
        if owner:
            cls = file.classes[owner]
            old = edit.method(cls, name)
            if old is not None and new is not old:
                file.classes[owner] = set_method(cls, new)
        else:
            file.functions[name] = new
    new = module.with_changes(body=[_newest(file, item) for item in module.body])
    return Specialised(new, file.passed)


def _newest(file: _File, item: cst.CSTNode) -> cst.CSTNode:
    if isinstance(item, cst.ClassDef):
        return file.classes[item.name.value]
    if isinstance(item, cst.FunctionDef):
        return file.functions[item.name.value]
    return item


def _read(module: cst.Module) -> _File:
    file = _File(module)
    for item in module.body:
        if isinstance(item, cst.ClassDef):
            file.classes[item.name.value] = item
        elif isinstance(item, cst.FunctionDef):
            file.functions[item.name.value] = item
    for name, cls in file.classes.items():
        made: dict[str, str] = {}
        optional: set[str] = set()
        init = edit.method(cls, "__init__")
        for node in _every(edit.body_of(init)) if init is not None else ():
            pair = edit.assigned_attribute(node)
            if pair is None:
                continue
            held = [
                edit.code(call.func)
                for call in edit.find(pair[1], lambda n: isinstance(n, cst.Call))
                if edit.code(call.func) in file.classes
            ]
            if held:
                made[pair[0]] = held[0]
            if edit.find(pair[1], lambda n: isinstance(n, cst.Name) and n.value == "None"):
                optional.add(pair[0])
            elif node in edit.body_of(init):  # in no branch: whatever it was before
                optional.discard(pair[0])
        file.made[name] = made
        file.attributes[name] = {
            f"self.{attr}": UNKNOWN if attr in optional else SOMETHING for attr in made
        }
    return file


def _every(body: list[edit.Statement]) -> list[edit.Statement]:
    """Statements of a body and of the blocks inside it."""
    found: list[edit.Statement] = []
    for node in body:
        found.append(node)
        if isinstance(node, cst.If):
            found += _every(edit.body_of(node))
            if isinstance(node.orelse, cst.Else):
                found += _every(edit.body_of(node.orelse))
            elif node.orelse is not None:
                found += _every([node.orelse])
    return found


def _defaults(function: cst.FunctionDef) -> dict[str, cst.BaseExpression | None]:
    every = [*function.params.params, *function.params.kwonly_params]
    return {p.name.value: p.default for p in every}


class _Run:
    """One pass over a function with what its calls pass; calls inside are recorded in the file."""

    def __init__(self, file: _File, owner: str, name: str) -> None:
        self.file, self.owner, self.name = file, owner, name
        cls = file.classes.get(owner)
        self.node = edit.method(cls, name) if cls is not None else file.functions[name]
        self.holds: dict[str, str] = {}
        """Loop variable -> class of the list that it runs over."""

    def function(self) -> cst.FunctionDef:
        env: Env = dict(self.file.attributes.get(self.owner, {}))
        env |= self.file.passed[self.owner, self.name]
        new = edit.with_body(self.node, self._block(edit.body_of(self.node), env))
        if self.name == "__init__":
            self._keep_constants(env)
        return new

    def _keep_constants(self, env: Env) -> None:
        """Attributes that __init__ sets once, to a truth value that all its calls agree on."""
        counts: dict[str, int] = {}
        for node in _every(edit.body_of(self.node)):
            pair = edit.assigned_attribute(node)
            if pair is not None:
                counts[pair[0]] = counts.get(pair[0], 0) + 1
        for attr, count in counts.items():
            known = env.get(f"self.{attr}", UNKNOWN)
            constant = known.kind == "const" and isinstance(known.value, bool)
            if count == 1 and attr not in self.file.made[self.owner]:
                self.file.attributes[self.owner][f"self.{attr}"] = known if constant else UNKNOWN

    # ---- statements -------------------------------------------------------------------------

    def _block(self, body: list[edit.Statement], env: Env) -> list[edit.Statement]:
        out: list[edit.Statement] = []
        for node in body:
            out += self._statement(node, env)
            if out and isinstance(edit.single(out[-1]), cst.Return | cst.Continue):
                break
        return out

    def _statement(self, node: edit.Statement, env: Env) -> list[edit.Statement]:
        if isinstance(node, cst.If):
            return self._if(node, env)
        if isinstance(node, cst.For):
            self._loop_variable(node)
            for name in edit.find(node.target, lambda n: isinstance(n, cst.Name)):
                env[name.value] = SOMETHING
            once = dict(env)
            self._block(edit.body_of(node), once)
            for name in {*env, *once}:
                env[name] = join(env.get(name, UNKNOWN), once.get(name, UNKNOWN))
            return [edit.with_body(node, self._block(edit.body_of(node), env))]
        if isinstance(node, cst.With):
            inner = self._block(list(node.body.body), env)
            return [node.with_changes(body=cst.IndentedBlock(inner))]
        if not isinstance(node, cst.SimpleStatementLine):
            return [node]
        if self._only_about_arguments(node):
            return []
        node = self._simplified(node, env)
        small = edit.single(node)
        pair = edit.assigned(node)
        if pair is not None:
            self._bind(pair[0], pair[1], env)
            if self.name == "__init__" and (found := edit.assigned_attribute(node)):
                known = env.get(f"self.{found[0]}", UNKNOWN)
                if known.kind == "const" and isinstance(known.value, bool):
                    node = node.with_changes(
                        body=[small.with_changes(value=cst.Name(str(known.value)))]
                    )
        elif isinstance(small, cst.AugAssign):
            evaluate(small.value, env, self._call)
            env[edit.code(small.target)] = SOMETHING
        elif isinstance(small, cst.Expr | cst.Return) and small.value is not None:
            evaluate(small.value, env, self._call)
        return [node]

    def _simplified(self, node: cst.SimpleStatementLine, env: Env) -> cst.SimpleStatementLine:
        small = edit.single(node)
        kinds = cst.Assign | cst.AugAssign | cst.AnnAssign | cst.Return | cst.Expr
        if not isinstance(small, kinds) or small.value is None:
            return node
        value = simplified(small.value, env, self._call)
        if value is small.value:
            return node
        return node.with_changes(body=[small.with_changes(value=value)])

    def _only_about_arguments(self, node: cst.SimpleStatementLine) -> bool:
        """kwargs.pop(...), warnings: calls that change nothing a server sees."""
        small = edit.single(node)
        if not isinstance(small, cst.Expr) or not isinstance(small.value, cst.Call):
            return False
        star = self.node.params.star_kwarg
        called = edit.code(small.value.func)
        return "warn" in called or (star is not None and called.startswith(f"{star.name.value}."))

    def _if(self, node: cst.If, env: Env) -> list[edit.Statement]:
        known = truth(evaluate(node.test, env, self._call))
        if known is True:
            return self._spliced(node, self._block(edit.body_of(node), env))
        if known is False:
            if node.orelse is None:
                return []
            if isinstance(node.orelse, cst.If):
                return self._if(node.orelse, env)
            return self._block(edit.body_of(node.orelse), env)
        inside, outside = dict(env), dict(env)
        body = self._block(edit.body_of(node), inside)
        orelse = node.orelse
        if isinstance(orelse, cst.Else):
            orelse = edit.with_body(orelse, self._block(edit.body_of(orelse), outside))
        elif isinstance(orelse, cst.If):
            other = self._if(orelse, outside)
            if len(other) == 1 and isinstance(other[0], cst.If):
                orelse = other[0]
            else:
                orelse = cst.Else(cst.IndentedBlock(other)) if other else None
        left = _leaves(body)
        for name in {*inside, *outside}:
            first, second = inside.get(name, UNKNOWN), outside.get(name, UNKNOWN)
            env[name] = second if left else self._either(node.test, first, second)
        test = simplified(node.test, env, self._call)
        return [edit.with_body(node, body).with_changes(test=test, orelse=orelse)]

    def _either(self, test: cst.BaseExpression, inside: Known, outside: Known) -> Known:
        """A value that is None unless a test on the config holds is remembered with that test."""
        if outside == NONE and inside.kind in ("something", "unknown"):
            attr = edit.code(test).removeprefix("self.")
            shown = self._config_test(attr)
            if shown:
                return Known("optional", inside.value, shown)
        return join(inside, outside)

    def _config_test(self, attr: str) -> str:
        """`self.config.x` for an attribute that __init__ sets to `config.x`; "" if it is not."""
        init = edit.method(self.file.classes[self.owner], "__init__") if self.owner else None
        for node in edit.body_of(init) if init is not None else ():
            pair = edit.assigned_attribute(node)
            if pair and pair[0] == attr and edit.code(pair[1]).startswith("config."):
                return f"self.{edit.code(pair[1])}"
        return f"self.{attr}" if attr.startswith("config.") else ""

    def _spliced(self, node: cst.If, body: list[edit.Statement]) -> list[edit.Statement]:
        """The body of an `if` that always holds, under the comments that stood above it."""
        if body and node.leading_lines:
            lines = [*node.leading_lines, *(x for x in body[0].leading_lines if x.comment)]
            body = [body[0].with_changes(leading_lines=lines), *body[1:]]
        return body

    def _bind(self, target: cst.BaseExpression, value: cst.BaseExpression, env: Env) -> None:
        if isinstance(target, cst.Tuple):
            known = evaluate(value, env, self._call)
            parts = (
                [evaluate(e.value, env, self._call) for e in value.elements]
                if isinstance(value, cst.Tuple) and len(value.elements) == len(target.elements)
                else [SOMETHING if known.kind == "something" else UNKNOWN] * len(target.elements)
            )
            for element, part in zip(target.elements, parts, strict=True):
                env[edit.code(element.value)] = part
        else:
            env[edit.code(target)] = evaluate(value, env, self._call)

    def _loop_variable(self, node: cst.For) -> None:
        target = node.target
        variable = target.elements[-1].value if isinstance(target, cst.Tuple) else target
        made = self.file.made.get(self.owner, {})
        for attr, cls in made.items():
            if f"self.{attr}" in edit.code(node.iter):
                self.holds[edit.code(variable)] = cls

    # ---- calls ------------------------------------------------------------------------------

    def _call(self, node: cst.Call, env: Env) -> Known:
        name = edit.code(node.func)
        if name == "isinstance" and len(node.args) == 2:
            subject = evaluate(node.args[0].value, env, self._call)
            return const(False) if subject == NONE else UNKNOWN
        callee = self._callee(name)
        if callee is not None:
            self._record(callee, node, env)
            return Known("something", "alibi" if callee in self.file.alibi else None)
        parts = [evaluate(argument.value, env, self._call) for argument in node.args]
        if name.startswith("create_") and name.endswith("mask"):
            return Known("unknown", "mask")
        if isinstance(node.func, cst.Attribute):
            owner = evaluate(node.func.value, env, self._call)
            root = name.split(".")[0]
            if owner.kind == "something" or root in ("torch", "nn", "F", "math", "super()"):
                return tagged(SOMETHING, [owner, *parts])
            return tagged(UNKNOWN, [owner])
        return UNKNOWN

    def _callee(self, name: str) -> tuple[str, str] | None:
        """(class, method) or ("", function) of this file that a call reaches."""
        if name in self.file.functions:
            return "", name
        if name in self.file.classes:
            made = edit.method(self.file.classes[name], "__init__") is not None
            return (name, "__init__") if made and self.name == "__init__" else None
        if name in self.holds:
            return self._forward_of(self.holds[name])
        owner, *path = name.split(".")
        if owner != "self" or not path:
            return None
        cls = self.owner
        for attr in path[:-1]:
            cls = self.file.made.get(cls, {}).get(attr, "")
        held = self.file.made.get(cls, {}).get(path[-1])
        if held:
            return self._forward_of(held)
        if cls and edit.method(self.file.classes[cls], path[-1]) is not None:
            return cls, path[-1]
        return None

    def _forward_of(self, cls: str) -> tuple[str, str] | None:
        return (cls, "forward") if edit.method(self.file.classes[cls], "forward") else None

    def _record(self, callee: tuple[str, str], call: cst.Call, env: Env) -> None:
        owner, name = callee
        function = (
            edit.method(self.file.classes[owner], name) if owner else self.file.functions[name]
        )
        given: Env = {}
        names = edit.parameters(function)
        positions = iter(names)
        for argument in call.args:
            known = evaluate(argument.value, env, self._call)
            if argument.star:
                continue
            key = argument.keyword.value if argument.keyword is not None else next(positions, "")
            if key in names:
                given[key] = known
        for key, default in _defaults(function).items():
            if key not in given and key != "self":
                given[key] = UNKNOWN if default is None else evaluate(default, {}, self._call)
        if callee == (self.owner, self.name):
            return
        seen = self.file.passed.get(callee)
        new = {key: join(seen.get(key) if seen else None, value) for key, value in given.items()}
        self.file.passed[callee] = new


def _leaves(body: list[edit.Statement]) -> bool:
    """Does the block always leave the function?"""
    return bool(body) and isinstance(edit.single(body[-1]), cst.Return | cst.Raise)
