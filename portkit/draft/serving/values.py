"""What an expression is known to be while a file is reduced to what a server calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import libcst as cst

from portkit.draft import edit


@dataclass(frozen=True)
class Known:
    """What is known about a value: a constant, only that it is not None, or nothing."""

    kind: str
    """"const", "something" (not None), "optional" (None unless `test`) or "unknown"."""
    value: Any = None
    """Of a constant; for other kinds a tag that says what it carries: "mask", "alibi"."""
    test: str = ""
    """For "optional": a test on the config that is true when the value is not None."""


SOMETHING = Known("something")
UNKNOWN = Known("unknown")
NONE = Known("const", None)
SERVING: dict[str, Any] = {
    "use_cache": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
    "use_return_dict": True,
    "_attn_implementation": "sdpa",
}
"""Config fields that say how Transformers runs a model, and their value when vLLM runs it."""
FALSE_ATTRIBUTES = ("training", "gradient_checkpointing")

Env = dict[str, Known]
Call = Callable[[cst.Call, Env], Known]


def const(value: Any) -> Known:
    return Known("const", value)


def join(first: Known | None, second: Known | None) -> Known:
    """What is known if the value is one of the two; None stands for no call seen yet."""
    if first is None or second is None:
        return first or second or UNKNOWN
    if first == second:
        return first
    tags = {k.value for k in (first, second) if k.kind != "const"}
    tag = tags.pop() if len(tags) == 1 else None
    never_none = all(
        k.kind == "something" or (k.kind == "const" and k.value is not None)
        for k in (first, second)
    )
    return Known("something" if never_none else "unknown", tag)


def tagged(known: Known, parts: list[Known]) -> Known:
    """The same knowledge of a value that is made from these, with the tag that they carry."""
    tags = {p.value for p in parts if p.kind != "const" and p.value}
    return Known(known.kind, sorted(tags)[0]) if tags and known.kind != "const" else known


def truth(known: Known) -> bool | None:
    """Truth value of a constant; None if it is not known."""
    return bool(known.value) if known.kind == "const" else None


def evaluate(node: cst.BaseExpression, env: Env, call: Call) -> Known:
    """What is known about an expression; `call` is asked about calls."""
    if isinstance(node, cst.Name):
        literal = {"None": None, "True": True, "False": False}
        if node.value in literal:
            return const(literal[node.value])
        return env.get(node.value, UNKNOWN)
    if isinstance(node, cst.Integer):
        return const(int(node.value, 0))
    if isinstance(node, cst.Float):
        return const(float(node.value))
    if isinstance(node, cst.SimpleString):
        return const(node.evaluated_value)
    if isinstance(node, cst.Tuple | cst.List) and not node.elements:
        return const(())
    if isinstance(node, cst.Attribute):
        return _attribute(node, env)
    if isinstance(node, cst.UnaryOperation):
        inner = evaluate(node.expression, env, call)
        if isinstance(node.operator, cst.Not):
            known = truth(inner)
            return UNKNOWN if known is None else const(not known)
        return SOMETHING
    if isinstance(node, cst.BooleanOperation):
        return _boolean(node, env, call)
    if isinstance(node, cst.Comparison):
        return _comparison(node, env, call)
    if isinstance(node, cst.IfExp):
        known = truth(evaluate(node.test, env, call))
        branches = {True: (node.body,), False: (node.orelse,)}.get(known, (node.body, node.orelse))
        values = [evaluate(branch, env, call) for branch in branches]
        return values[0] if len(values) == 1 else join(*values)
    if isinstance(node, cst.BinaryOperation | cst.Tuple | cst.List | cst.Dict):
        parts = [
            evaluate(child if isinstance(child, cst.BaseExpression) else child.value, env, call)
            for child in node.children
            if isinstance(child, cst.BaseExpression | cst.BaseElement)
        ]
        return tagged(SOMETHING, parts)
    if isinstance(node, cst.ListComp | cst.GeneratorExp):
        evaluate(node.elt, env, call)
        return SOMETHING
    if isinstance(node, cst.Subscript):
        owner = evaluate(node.value, env, call)
        return tagged(UNKNOWN if owner.kind != "something" else SOMETHING, [owner])
    if isinstance(node, cst.Call):
        return call(node, env)
    return UNKNOWN


def _attribute(node: cst.Attribute, env: Env) -> Known:
    owner, attr = edit.code(node.value), node.attr.value
    if owner == "self" and attr in FALSE_ATTRIBUTES:
        return const(False)
    if owner in ("self.config", "config") and attr in SERVING:
        return const(SERVING[attr])
    if owner == "self":
        return env.get(f"self.{attr}", UNKNOWN)
    return UNKNOWN


def _boolean(node: cst.BooleanOperation, env: Env, call: Call) -> Known:
    left = evaluate(node.left, env, call)
    known = truth(left)
    conjunction = isinstance(node.operator, cst.And)
    if known is not None and known is not conjunction:
        return left
    right = evaluate(node.right, env, call)
    if known is not None:
        return right
    if truth(right) is (not conjunction) and truth(right) is not None:
        return const(not conjunction)
    return UNKNOWN


def _comparison(node: cst.Comparison, env: Env, call: Call) -> Known:
    left = evaluate(node.left, env, call)
    if len(node.comparisons) != 1:
        return UNKNOWN
    target = node.comparisons[0]
    right = evaluate(target.comparator, env, call)
    if isinstance(target.operator, cst.Is | cst.IsNot) and right == NONE:
        positive = isinstance(target.operator, cst.Is)
        if left.kind == "const":
            return const((left.value is None) is positive)
        return const(not positive) if left.kind == "something" else UNKNOWN
    if left.kind == right.kind == "const":
        if isinstance(target.operator, cst.Equal):
            return const(left.value == right.value)
        if isinstance(target.operator, cst.NotEqual):
            return const(left.value != right.value)
    return UNKNOWN


def simplified(node: cst.BaseExpression, env: Env, call: Call) -> cst.BaseExpression:
    """The expression without the parts that are constant: branches, tests, `x is None`."""

    def change(here: cst.CSTNode) -> cst.CSTNode | None:
        if isinstance(here, cst.IfExp):
            known = truth(evaluate(here.test, env, call))
            if known is not None:
                return here.body if known else here.orelse
        if isinstance(here, cst.BinaryOperation) and isinstance(here.operator, cst.Add):
            for side, other in ((here.left, here.right), (here.right, here.left)):
                if evaluate(side, env, call) == const(0):
                    return other
        if isinstance(here, cst.Comparison):
            known = evaluate(here, env, call)
            if known.kind == "const":
                return cst.Name(str(known.value))
            return _optional_test(here, env, call)
        if isinstance(here, cst.BooleanOperation):
            conjunction = isinstance(here.operator, cst.And)
            for side, other in ((here.left, here.right), (here.right, here.left)):
                known = truth(evaluate(side, env, call))
                if known is conjunction:
                    return other
                if known is not None and side is here.left:
                    return side
        return None

    return edit.replace(node, change)


def _optional_test(node: cst.Comparison, env: Env, call: Call) -> cst.BaseExpression | None:
    """`x is None`, where x is None unless a test on the config holds: that test."""
    left = evaluate(node.left, env, call)
    if left.kind != "optional" or not isinstance(node.comparisons[0].operator, cst.Is | cst.IsNot):
        return None
    if isinstance(node.comparisons[0].operator, cst.IsNot):
        return edit.expression(left.test)
    return edit.expression(f"not {left.test}")
