"""Runs tensor code on numbers: what it moves is moved, what it computes stays unknown.

The base of fused_cut.py. Sizes are chosen so that each tells what it is.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from portkit.analysis.classes import ClassView, call_name, text
from portkit.analysis.index_array import IndexArray
from portkit.analysis.symbolic import CannotTell, Interpreter

if TYPE_CHECKING:
    from portkit.analysis.facts import Linear

HEADS, KV_HEADS, HEAD_DIM = 8, 2, 6
BATCH, LENGTH = 2, 3


class _Unknown:
    def __repr__(self) -> str:
        return "?"


UNKNOWN = _Unknown()
"""A value that this run does not know."""


@dataclass(frozen=True)
class Shaped:
    """A tensor of which only the shape matters."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Sizes:
    """The sizes of the model that is run."""

    kv_heads: int

    def of(self, field: str) -> int | None:
        """Value of a config field by the words in its name; None if they say nothing."""
        if "head_dim" in field or "head_size" in field:
            return HEAD_DIM
        if "head" in field:
            return self.kv_heads if "kv" in field or "key_value" in field else HEADS
        if field in ("hidden_size", "n_embd", "d_model", "embed_dim", "n_embed"):
            return HEADS * HEAD_DIM
        return None


_SAME = ("contiguous", "to", "float", "type_as", "clone", "half", "bfloat16", "type")
_ELEMENTWISE = ("clamp", "clamp_", "mul", "div", "add", "tanh")


class NumberRun(Interpreter):
    """Runs statements of one class with one setting of its flags."""

    view: ClassView
    linear: Linear
    """The projection whose output is numbered, and how wide it is."""
    width: int = 0
    sizes: Sizes
    flags: dict[str, bool]
    asked: set[str]
    """Config fields that decided something and were taken as true."""
    own: dict[str, Any]
    config: dict[str, int]
    depth: int = 0

    def steps(self, body: list[ast.stmt], values: dict[str, Any]) -> tuple[Any] | None:
        """Run statements; what they cannot compute becomes unknown. (value,) after a return."""
        for node in body:
            if isinstance(node, ast.Return):
                return (UNKNOWN if node.value is None else self._try(node.value, values),)
            if isinstance(node, ast.Assign):
                value = self._try(node.value, values)
                for target in node.targets:
                    self._set(target, value, values)
            elif isinstance(node, ast.AnnAssign) and node.value is not None:
                self._set(node.target, self._try(node.value, values), values)
            elif isinstance(node, ast.If):
                done = self._branch(node, values)
                if done is not None:
                    return done
            elif isinstance(node, ast.With):
                done = self.steps(node.body, values)
                if done is not None:
                    return done
        return None

    def _branch(self, node: ast.If, values: dict[str, Any]) -> tuple[Any] | None:
        test = self.truth(node.test, values)
        if test is not UNKNOWN:
            return self.steps(node.body if test else node.orelse, values)
        # Either way may be taken: keep what both agree on.
        first, second = dict(values), dict(values)
        self.steps(node.body, first)
        self.steps(node.orelse, second)
        for name in {*first, *second}:
            same = name in first and name in second and first[name] == second[name]
            values[name] = first[name] if same else self._either(first, second, name, values)
        return None

    def _either(self, first, second, name, values) -> Any:
        """A name after an undecided branch: an array that was only changed element by element."""
        a, b = first.get(name), second.get(name)
        if is_array(a) and is_array(b) and a.data == b.data and a.shape == b.shape:
            return a if a.touched else b
        return UNKNOWN

    def _try(self, node: ast.expr, values: dict[str, Any]) -> Any:
        try:
            return self.value(node, values)
        except (CannotTell, ValueError, TypeError, IndexError, ZeroDivisionError):
            return UNKNOWN

    def _set(self, target: ast.expr, value: Any, values: dict[str, Any]) -> None:
        if isinstance(target, ast.Name):
            values[target.id] = value
        elif isinstance(target, ast.Attribute) and text(target.value) == "self":
            self.own[target.attr] = value
        elif isinstance(target, ast.Tuple):
            parts = value if isinstance(value, tuple | list) else ()
            if len(parts) != len(target.elts):
                parts = (UNKNOWN,) * len(target.elts)
            for element, part in zip(target.elts, parts, strict=True):
                self._set(element, part, values)

    # ---- expressions ------------------------------------------------------------------------

    def truth(self, node: ast.expr, values: dict[str, Any]) -> Any:
        """True, False or UNKNOWN."""
        value = self._try(node, values)
        if value is UNKNOWN and isinstance(node, ast.Attribute | ast.Name):
            field = self._flag(node)
            if field:
                if field not in self.flags:
                    self.asked.add(field)
                return self.flags.get(field, True)
        if isinstance(value, bool | int) or value is None:
            return bool(value)
        return UNKNOWN

    def _flag(self, node: ast.expr) -> str:
        """config.<field> behind a test, if it is nothing else."""
        source = text(self.view.resolve(node)).replace("self.config.", "config.")
        field = source.removeprefix("config.")
        return field if source != field and field.isidentifier() else ""

    def value(self, node: ast.expr, values: dict[str, Any]) -> Any:
        if isinstance(node, ast.BoolOp):
            found = [self.truth(v, values) for v in node.values]
            stop = isinstance(node.op, ast.Or)
            if stop in found:
                return stop
            return UNKNOWN if UNKNOWN in found else not stop
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            found = self.truth(node.operand, values)
            return UNKNOWN if found is UNKNOWN else not found
        if isinstance(node, ast.IfExp):
            test = self.truth(node.test, values)
            if test is UNKNOWN:
                return UNKNOWN
            return self.value(node.body if test else node.orelse, values)
        if isinstance(node, ast.Tuple | ast.List):
            out: list[Any] = []
            for element in node.elts:
                if isinstance(element, ast.Starred):
                    out += self._sequence(element.value, values)
                else:
                    out.append(self.value(element, values))
            return out if isinstance(node, ast.List) else tuple(out)
        if isinstance(node, ast.ListComp | ast.GeneratorExp):
            return self._comprehension(node, values)
        if isinstance(node, ast.Compare):
            return self._compare(node, values)
        return super().value(node, values)

    def _compare(self, node: ast.Compare, values: dict[str, Any]) -> Any:
        left, right = self.value(node.left, values), self.value(node.comparators[0], values)
        if UNKNOWN in (left, right) or len(node.ops) != 1:
            return UNKNOWN
        operations: dict[type, Callable[[Any, Any], bool]] = {
            ast.Eq: lambda a, b: a == b,
            ast.NotEq: lambda a, b: a != b,
            ast.Is: lambda a, b: a is b,
            ast.IsNot: lambda a, b: a is not b,
            ast.Gt: lambda a, b: a > b,
            ast.Lt: lambda a, b: a < b,
        }
        known = operations.get(type(node.ops[0]))
        return known(left, right) if known else UNKNOWN

    def _comprehension(self, node, values: dict[str, Any]) -> Any:
        loop = node.generators[0]
        if len(node.generators) != 1 or loop.ifs:
            return UNKNOWN
        out = []
        for item in self._sequence(loop.iter, values):
            inner = dict(values)
            self._set(loop.target, item, inner)
            out.append(self.value(node.elt, inner))
        return out

    def _sequence(self, node: ast.expr, values: dict[str, Any]) -> list[Any]:
        found = self.value(node, values)
        if not isinstance(found, tuple | list):
            raise CannotTell(f"cannot follow `{text(node)}`", node)
        return list(found)

    def free(self, node: ast.Name) -> Any:
        return UNKNOWN

    def unary(self, node: ast.UnaryOp, operand: Any) -> Any:
        return -operand if isinstance(node.op, ast.USub) and type(operand) is int else UNKNOWN

    def binary(self, node: ast.BinOp, left: Any, right: Any) -> Any:
        if is_array(left) or is_array(right):
            array, other = (left, right) if is_array(left) else (right, left)
            if is_array(other):
                return UNKNOWN
            return IndexArray(array.shape, array.data, True)
        if UNKNOWN in (left, right) if not isinstance(left, tuple | list) else right is UNKNOWN:
            return UNKNOWN
        if isinstance(node.op, ast.Add) and isinstance(left, tuple) and isinstance(right, tuple):
            return left + right
        if isinstance(node.op, ast.Mult) and {type(left), type(right)} == {int, list}:
            return left * right
        if type(left) is int and type(right) is int:
            operations: dict[type, Callable[[int, int], Any]] = {
                ast.Add: lambda a, b: a + b,
                ast.Sub: lambda a, b: a - b,
                ast.Mult: lambda a, b: a * b,
                ast.FloorDiv: lambda a, b: a // b,
                ast.Mod: lambda a, b: a % b,
            }
            known = operations.get(type(node.op))
            return known(left, right) if known else UNKNOWN
        return UNKNOWN

    def attribute(self, node: ast.Attribute, values: dict[str, Any]) -> Any:
        owner = text(node.value)
        holder = text(self.view.resolve(node.value)).removeprefix("self.")
        if holder == "config" or re.fullmatch(r"config\.\w+", holder):  # or a config inside it
            size = self.sizes.of(node.attr)
            if size is not None:
                self.config[f"{holder}.{node.attr}".removeprefix("config.")] = size
                return size
            return self.flags.get(node.attr, UNKNOWN)
        if owner == "self":
            return self.own.get(node.attr, UNKNOWN)
        subject = self.value(node.value, values)
        if node.attr == "shape" and isinstance(subject, IndexArray | Shaped):
            return subject.shape
        return UNKNOWN

    def subscript(self, node: ast.Subscript, values: dict[str, Any]) -> Any:
        subject = self.value(node.value, values)
        key = self._key(node.slice, values)
        if isinstance(subject, IndexArray):
            return subject.index(key)
        if isinstance(subject, tuple | list) and isinstance(key, int | slice):
            return subject[key]
        return UNKNOWN

    def _key(self, node: ast.expr, values: dict[str, Any]) -> Any:
        if isinstance(node, ast.Slice):
            bounds = [
                None if b is None else self.value(b, values)
                for b in (node.lower, node.upper, node.step)
            ]
            if UNKNOWN in bounds:
                raise CannotTell(f"cannot follow `{text(node)}`", node)
            return slice(*bounds)
        if isinstance(node, ast.Tuple):
            return tuple(self._key(e, values) for e in node.elts)
        return self.value(node, values)

    def call(self, node: ast.Call, values: dict[str, Any]) -> Any:
        name = call_name(node)
        arguments: list[Any] = []
        for given in node.args:
            if isinstance(given, ast.Starred):
                arguments += self._sequence(given.value, values)
            else:
                arguments.append(self.value(given, values))
        keywords = {k.arg: self._try(k.value, values) for k in node.keywords if k.arg}
        attr = name.removeprefix("self.")
        if name == f"self.{self.linear.attr}" and arguments:
            if isinstance(arguments[0], Shaped):
                return IndexArray.numbered((*arguments[0].shape[:-1], self.width))
            return UNKNOWN
        if name.startswith("self.") and attr in self.view.methods:
            return self._own_method(self.view.methods[attr], arguments, keywords)
        if name in ("int", "len") and len(arguments) == 1:
            return arguments[0] if name == "int" else len(arguments[0])
        if name in ("tuple", "list") and isinstance(arguments[0], tuple | list):
            return tuple(arguments[0]) if name == "tuple" else list(arguments[0])
        if name == "getattr" and len(node.args) >= 2 and text(node.args[0]) == "config":
            size = self.sizes.of(str(arguments[1]))
            return size if size is not None else UNKNOWN
        if not isinstance(node.func, ast.Attribute):
            return UNKNOWN
        method = node.func.attr
        if text(node.func.value) == "torch" and arguments:
            subject, arguments = arguments[0], arguments[1:]
        else:
            subject = self.value(node.func.value, values)
        if isinstance(subject, IndexArray | Shaped) and method == "size":
            return subject.shape[arguments[0]] if arguments else subject.shape
        if not isinstance(subject, IndexArray):
            return UNKNOWN
        return self._moved(subject, method, arguments, keywords)

    def _own_method(self, function: ast.FunctionDef, arguments, keywords) -> Any:
        if self.depth > 3:
            return UNKNOWN
        names = [a.arg for a in function.args.args]
        values = dict.fromkeys(names, UNKNOWN)
        values |= dict(zip([n for n in names if n not in ("self", "cls")], arguments, strict=False))
        values |= keywords
        self.depth += 1
        try:
            done = self.steps(function.body, values)
        finally:
            self.depth -= 1
        return done[0] if done else UNKNOWN

    def _moved(self, array: IndexArray, method: str, given: list[Any], named: dict) -> Any:
        """A tensor method that only moves elements, on an array."""
        if method in _SAME:
            return array
        if method in _ELEMENTWISE:
            return IndexArray(array.shape, array.data, True)
        axis = named.get("dim", given[1] if len(given) > 1 else 0)
        shape = given[0] if given and isinstance(given[0], tuple | list) else given
        if any(isinstance(v, _Unknown) for v in [*given, *named.values()]):
            return UNKNOWN
        if method in ("view", "reshape"):
            return array.reshape(shape)
        if method == "permute":
            return array.permute(shape)
        if method == "transpose":
            return array.transpose(*given[:2])
        if method in ("expand", "broadcast_to"):
            return array.expand(shape)
        if method == "split":
            sizes = given[0] if given else named.get("split_size_or_sections")
            return array.split(sizes, axis)
        if method == "chunk":
            return array.chunk(given[0] if given else named["chunks"], axis)
        if method == "unbind":
            return array.unbind(named.get("dim", given[0] if given else 0))
        if method in ("squeeze", "unsqueeze"):
            return getattr(array, method)(named.get("dim", given[0] if given else 0))
        if method == "flatten":
            return array.flatten(*given, **{k.removesuffix("_dim"): v for k, v in named.items()})
        if method == "unflatten":
            return array.unflatten(given[0], given[1])
        return UNKNOWN


def is_array(value: Any) -> bool:
    return isinstance(value, IndexArray)
