"""Follows the tensors in an attention's expressions: heads split off, normalised, attended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import libcst as cst

from portkit.draft import edit
from portkit.draft.blocker import Blocker
from portkit.draft.transforms.attention_elementwise import (
    FUNCTIONS,
    applied,
    combined,
    function_name,
    of_positions,
)
from portkit.draft.transforms.attention_heads import chunked, joined, repeated, width
from portkit.draft.transforms.attention_values import (
    ELEMENTWISE,
    ERASED,
    IGNORED_KEYWORDS,
    KNOWN_KEYWORDS,
    Layout,
    Value,
    attention_name,
)


class AttentionExpressions:
    """Expressions of one forward. `linears`, `norms`, `dropouts` are attributes of the class."""

    def __init__(
        self,
        *,
        cls: str,
        linears: set[str],
        norms: set[str],
        dropouts: set[str],
        rotary_functions: set[str],
        rotary_call: str,
        erased: frozenset[str],
        head_dim: str,
        rotates_by_layer: bool,
        functions: dict[str, cst.FunctionDef],
        source: str,
        first_line: int,
        given: dict[str, dict[str, Value]] | None = None,
        narrow_values: bool = False,
    ) -> None:
        self.narrow_values = narrow_values
        """Are value heads narrower than those of keys?"""
        self.before: list[edit.Statement] = []
        """What the statement that is being followed needs before it."""
        self.functions = functions
        self.rotates_by_layer = rotates_by_layer
        self.of_positions: set[str] = set()
        self.rotary_call = rotary_call
        self.erased = erased
        """Attributes that only served what is now done otherwise, e.g. a table of sines."""
        self.half_rotated: tuple[str, Value] | None = None
        """The one of query and key that was rotated first, where each has a call of its own."""
        self.given = given or {}
        """Statements that are flat already, and what the names they bind stand for."""
        self.source = source.splitlines()
        self.cls, self.linears, self.norms, self.dropouts = cls, linears, norms, dropouts
        self.rotary_functions, self.head_dim, self.first_line = (
            rotary_functions,
            head_dim,
            first_line,
        )
        self.keywords: dict[str, cst.BaseExpression] = {}
        self.rotary_used = False
        self.calls = 0

    def _attend(self, call: cst.Call, env: dict[str, Value]) -> Value:
        plain = [a.value for a in call.args if a.keyword is None and not a.star]
        if len(plain) < 4:
            raise self._stop(
                "the attention call does not pass self, query, key, value in order", call
            )
        tensors = [self._value(a, env) for a in plain[1:4]]
        if any(t.kind != "tensor" or t.layout == "flat" for t in tensors):
            raise self._stop(
                "the attention call is given something other than query, key and value by heads",
                call,
            )
        for argument in call.args:
            if argument.keyword is None:
                continue
            name = argument.keyword.value
            if name in KNOWN_KEYWORDS:
                first = self.keywords.setdefault(name, argument.value)
                if edit.code(first) != edit.code(argument.value):
                    raise self._stop(f"attends with different {name}=", call)
            elif name not in IGNORED_KEYWORDS and edit.code(argument.value) != "None":
                raise self._stop(
                    f"passes {name}= to attention, which this draft does not know", call
                )
        self.calls += 1
        attend = attention_name(self.calls)
        narrow = tensors[2].dim if self.narrow_values else ""
        if self.narrow_values:
            tensors[2] = self._widened(tensors[2], call)
        inputs = ", ".join(edit.code(t.node) for t in tensors)
        made = f"self.{attend}({inputs})"
        if narrow:
            made += f".unflatten(-1, (-1, {self.head_dim}))[..., : {narrow}].flatten(-2)"
        return Value(
            "several",
            parts=(Value("tensor", edit.expression(made), "seq_heads", dim=narrow), ERASED),
        )

    def _widened(self, value: Value, call: cst.Call) -> Value:
        """Values as wide as keys, by a statement before the call."""
        if not value.dim or not isinstance(value.node, cst.Name):
            raise self._stop("attends to values of another width, which it does not name", call)
        name = value.node.value
        made = edit.statement(
            f"{name} = nn.functional.pad(\n"
            f"    {name}.unflatten(-1, (-1, {value.dim})), (0, {self.head_dim} - {value.dim})\n"
            ").flatten(-2)"
        )
        note = "vLLM's cache has values as wide as keys: zeros, which are cut off again."
        self.before.append(edit.comment_before(made, note))
        return value

    def _value(self, node: cst.BaseExpression, env: dict[str, Value]) -> Value:
        if isinstance(node, cst.Name):
            return env.get(node.value, Value("plain", node))
        if isinstance(node, cst.Tuple | cst.List):
            parts = tuple(self._value(e.value, env) for e in node.elements)
            if any(p.kind in ("tensor", "part") for p in parts):
                return Value("several", parts=parts)
            if any(p.kind in ("shape", "erased") for p in parts):
                return Value("shape", node)
            return Value("plain", node)
        if isinstance(node, cst.Call):
            return self._call(node, env)
        if isinstance(node, cst.Subscript):
            return self._subscript(node, env)
        if isinstance(node, cst.Attribute):
            if edit.code(node) in self.erased:
                return ERASED
            owner = self._value(node.value, env)
            if owner.kind in ("tensor", "positions"):
                return Value("shape" if node.attr.value in ("shape", "device") else "plain", node)
            return owner if owner.kind == "erased" else Value("plain", node)
        if isinstance(node, cst.BinaryOperation):
            return self._binary(node, env)
        if isinstance(node, cst.IfExp):
            if self._erased_inside(node.test, env):
                return ERASED
            return Value("plain", node)
        if self._erased_inside(node, env):
            return ERASED
        return Value("plain", node)

    def _binary(self, node: cst.BinaryOperation, env: dict[str, Value]) -> Value:
        left, right = self._value(node.left, env), self._value(node.right, env)
        kinds = {left.kind, right.kind}
        if kinds <= {"plain"}:
            return Value("plain", node)
        if kinds <= {"plain", "shape", "erased"}:
            return ERASED if "erased" in kinds else Value("shape", node)
        if kinds == {"tensor", "plain"}:
            tensor = left if left.kind == "tensor" else right
            return replace(tensor, node=node.with_changes(left=left.node, right=right.node))
        if kinds == {"tensor"}:
            both = combined(node, left, right, self.head_dim)
            if both is not None:
                return both
        raise self._stop(f"cannot follow `{edit.flat(node)}`", node)

    def _subscript(self, node: cst.Subscript, env: dict[str, Value]) -> Value:
        owner = self._value(node.value, env)
        if owner.kind in ("erased", "shape"):
            return owner
        if owner.kind != "tensor":
            return Value("plain", node)
        parts = [s.slice for s in node.slice]
        last = parts[-1]
        before = [edit.code(p).strip() for p in parts[:-1]]
        every = before == ["..."] or (before == [":"] * 3 and owner.layout != "flat")
        only_last = every and isinstance(last, cst.Slice)
        if only_last and owner.layout == "flat":
            return replace(owner, node=node.with_changes(value=owner.node))
        if only_last and isinstance(owner.node, cst.Name) and last.step is None:
            lower, upper = edit.flat(last.lower), edit.flat(last.upper)
            if not lower and upper:
                return Value(
                    "part", base=owner.node.value, side="rotated", bound=upper, layout=owner.layout
                )
            if lower and not upper:
                return Value(
                    "part", base=owner.node.value, side="rest", bound=lower, layout=owner.layout
                )
        raise self._stop(f"cannot follow `{edit.flat(node)}`", node)

    def _call(self, node: cst.Call, env: dict[str, Value]) -> Value:
        name = edit.code(node.func)
        plain = [a.value for a in node.args if a.keyword is None and not a.star]
        if plain and edit.code(plain[0]) == "self" and len(plain) >= 4:
            return self._attend(node, env)
        if name in self.erased:
            return ERASED
        if name in ("torch.cat", "torch.concat"):
            return self._cat(node, plain, env)
        if name in ("torch.chunk", "torch.split") and plain:
            inner = self._value(plain[0], env)
            axis = edit.call_argument(node, 2, "dim")
            made = None
            if inner.kind == "tensor" and name == "torch.chunk" and axis is not None:
                made = chunked(inner, plain[1], edit.code(axis), self.head_dim)
            if made is not None:
                return made
        if name in ("nn.functional.dropout", "F.dropout", "torch.nn.functional.dropout"):
            return self._value(plain[0], env)
        if function_name(node) in FUNCTIONS and plain:
            inner = self._value(plain[0], env)
            if inner.kind == "tensor":
                return applied(node, inner)
        if name.startswith("self.") and "." not in name.removeprefix("self."):
            return self._submodule(node, name.removeprefix("self."), plain, env)
        if isinstance(node.func, cst.Attribute):
            owner = self._value(node.func.value, env)
            if owner.kind == "tensor":
                return self._method(node, node.func.attr.value, owner, env)
            if owner.kind in ("erased", "shape"):
                return owner
        if any(self._value(a.value, env).kind == "positions" for a in node.args):
            made = of_positions(node, self.functions.get(name))
            if made is not None:
                self.of_positions.add(name)
                return made
        if "ALL_ATTENTION_FUNCTIONS" in name or self._erased_inside(node, env):
            return ERASED
        moving = ("tensor", "part", "positions")
        if any(self._value(a.value, env).kind in moving for a in node.args):
            raise self._stop(f"cannot follow `{edit.flat(node)}`", node)
        return Value("plain", node)

    def _submodule(self, node, attr, plain, env) -> Value:
        if len(plain) != 1 or len(node.args) != 1:
            raise self._stop(f"cannot follow `{edit.flat(node)}`", node)
        inner = self._value(plain[0], env)
        if inner.kind != "tensor":
            raise self._stop(f"cannot follow `{edit.flat(node)}`", node)
        if attr in self.dropouts:
            return inner
        if attr in self.linears:
            if inner.layout != "flat":
                raise self._stop(f"self.{attr} is applied to separate heads", node)
            return Value("tensor", edit.expression(f"self.{attr}({edit.code(inner.node)})"))
        if attr in self.norms:
            if inner.layout == "flat":
                return Value("tensor", edit.expression(f"self.{attr}({edit.code(inner.node)})"))
            dim = width(inner, self.head_dim)
            split = f"{edit.code(inner.node)}.unflatten(-1, (-1, {dim}))"
            return replace(inner, node=edit.expression(f"self.{attr}({split}).flatten(-2)"))
        raise self._stop(f"does not know what self.{attr} does to queries and keys", node)

    def _method(self, node: cst.Call, method: str, owner: Value, env: dict[str, Value]) -> Value:
        if method in ("size", "dim"):
            return Value("shape", node)
        if method == "contiguous":
            return owner
        if (
            method == "transpose"
            and owner.layout != "flat"
            and edit.flat(node).endswith("transpose(1, 2)")
        ):
            turned: Layout = "seq_heads" if owner.layout == "heads_seq" else "heads_seq"
            return replace(owner, layout=turned)
        if method == "unsqueeze" and owner.layout == "flat" and edit.flat(node.args[0]) == "-1":
            return replace(owner, layout="per_head")
        swaps = "".join(edit.flat(node).split()).endswith("permute(0,2,1,3)")
        if swaps and owner.layout in ("seq_heads", "heads_seq"):
            swapped: Layout = "seq_heads" if owner.layout == "heads_seq" else "heads_seq"
            return replace(owner, layout=swapped)
        if method in ("view", "reshape"):
            return self._viewed(node, owner, env)
        if method == "repeat" and (made := repeated(owner, node)) is not None:
            return made
        if method == "chunk" and owner.layout != "flat":
            axis = edit.call_argument(node, 1, "dim")
            made = axis and chunked(owner, node.args[0].value, edit.code(axis), self.head_dim)
            if made:
                return made
        if method in ("split", "chunk") and owner.layout == "flat":
            dimension = edit.call_argument(node, 1, "dim")
            if dimension is not None and edit.code(dimension) in ("-1", "2"):
                func = cst.Attribute(owner.node, cst.Name(method))
                first = node.args[0].with_changes(comma=cst.MaybeSentinel.DEFAULT)
                count = (
                    len(node.args[0].value.elements)
                    if isinstance(node.args[0].value, cst.List | cst.Tuple)
                    else 3
                )
                new = cst.Call(func, [first, cst.Arg(edit.expression("-1"), cst.Name("dim"))])
                return Value(
                    "several", edit.expression(edit.flat(new)), parts=(Value("tensor"),) * count
                )
        if method in ELEMENTWISE:
            func = node.func.with_changes(value=owner.node)
            return replace(owner, node=node.with_changes(func=func))
        raise self._stop(f"cannot follow `.{method}(...)` in `{edit.flat(node)}`", node)

    def _viewed(self, node: cst.Call, owner: Value, env: dict[str, Value]) -> Value:
        """How many axes the new shape has after batch and sequence: one (flat) or two (heads)."""
        if len(node.args) == 1 and not node.args[0].star:
            shape = node.args[0].value
            if isinstance(shape, cst.Name):
                known = env.get(shape.value)
                shape = known.node if known is not None and known.node is not None else shape
            elements = shape.elements if isinstance(shape, cst.Tuple | cst.List) else None
            items = (
                [(e.value, isinstance(e, cst.StarredElement)) for e in elements]
                if elements is not None
                else None
            )
        else:
            items = self._shape_items(node.args, env)
        if items is None:
            raise self._stop(f"does not know the shape in `{edit.flat(node)}`", node)
        starred = [v for v, star in items if star]
        rest = len(items) - (len(starred) if starred else 2)
        if not items or self._value(items[0][0], env).kind != "shape":
            raise self._stop(f"does not know the shape in `{edit.flat(node)}`", node)
        if owner.layout == "heads_seq":
            raise self._stop(
                f"views heads that are still in front of the sequence in `{edit.flat(node)}`", node
            )
        if rest == 1:
            return replace(owner, layout="flat", dim="")
        if rest == 2:
            dim = edit.flat(items[-1][0])
            return replace(
                owner, layout="seq_heads", dim="" if dim in ("-1", self.head_dim) else dim
            )
        raise self._stop(f"does not know the shape in `{edit.flat(node)}`", node)

    def _shape_items(self, arguments, env: dict[str, Value]):
        """(size, is it a starred rest?) of each item; `*shape` of a known shape is its items."""
        if len(arguments) == 1 and isinstance(arguments[0].value, cst.Name):
            known = env.get(arguments[0].value.value)
            if known is not None and isinstance(known.node, cst.Tuple | cst.List):
                return [(e.value, isinstance(e, cst.StarredElement)) for e in known.node.elements]
        return [(a.value, bool(a.star)) for a in arguments]

    def _cat(self, node: cst.Call, plain, env) -> Value:
        parts = (
            [self._value(e.value, env) for e in plain[0].elements]
            if plain and isinstance(plain[0], cst.Tuple | cst.List)
            else []
        )
        if len(parts) == 2 and all(p.kind == "part" for p in parts):
            turned, rest = parts
            if (
                (
                    turned.turned
                    and turned.side == "rotated"
                    and rest.side == "rest"
                    and not rest.turned
                )
                and turned.base == rest.base
                and turned.bound == rest.bound
            ):
                return Value("tensor", cst.Name(turned.base), turned.layout)
        if parts and all(p.kind in ("erased", "shape") for p in parts):
            return ERASED
        axis = edit.call_argument(node, 1, "dim")
        if parts and axis is not None:
            made = joined(parts, edit.code(axis), self.head_dim)
            if made is not None:
                return made
        raise self._stop(f"cannot follow `{edit.flat(node)}`", node)

    # ---- helpers ----------------------------------------------------------------------------

    def _erased_inside(self, node: cst.CSTNode, env: dict[str, Value]) -> bool:
        return any(env.get(name, Value("plain")).kind == "erased" for name in edit.names_read(node))

    def _bound(self, node: cst.If) -> set[str]:
        return {
            edit.code(t.target) for t in edit.find(node, lambda n: isinstance(n, cst.AssignTarget))
        }

    def _line(self, old: Sequence | edit.Statement, text: str) -> edit.Statement:
        return edit.statement(text).with_changes(leading_lines=old.leading_lines)  # type: ignore[union-attr]

    def _stop(self, what: str, node: cst.CSTNode) -> Blocker:
        """A blocker at the line of this forward that holds the node's text."""
        wanted = edit.code(node).strip().splitlines()[0]
        for number in range(self.first_line, len(self.source) + 1):
            if wanted in self.source[number - 1]:
                return Blocker(f"{self.cls}.forward {what}.", number)
        return Blocker(f"{self.cls}.forward {what}.", self.first_line)
