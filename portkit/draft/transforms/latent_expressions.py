"""Follows the tensors in a latent attention's expressions. See latent_flow.py for statements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import libcst as cst

from portkit.analysis.facts import LatentFacts
from portkit.draft import edit
from portkit.draft.blocker import Blocker
from portkit.draft.transforms.attention_values import (
    ELEMENTWISE,
    IGNORED_KEYWORDS,
)
from portkit.draft.transforms.latent_values import EMPTY, ERASED, Rotation, Value

_KEYWORDS = ("scaling", "sliding_window", "softcap")
_FUNCTIONS = ("torch.sigmoid", "F.silu", "nn.functional.silu", "torch.tanh")
"""Functions of one tensor that work on each element."""


class LatentExpressions:
    """Expressions of one forward; what they need is set by `latent_flow.flow_of`."""

    def __init__(
        self,
        *,
        cls: str,
        latent: LatentFacts,
        expand: cst.FunctionDef | None,
        linears: set[str],
        norms: set[str],
        rotary_functions: set[str],
        source: str,
        first_line: int,
    ) -> None:
        self.cls, self.latent, self.expand = cls, latent, expand
        self.linears, self.norms, self.rotary_functions = linears, norms, rotary_functions
        self.source, self.first_line = source.splitlines(), first_line
        self.keywords: dict[str, cst.BaseExpression] = {}
        self.rotations: list[Rotation] = []
        self.conditions: list[str] = []
        self.sizes: dict[str, str] = {}
        """Name of a part that was split off -> its size."""
        self.before: list[edit.Statement] = []
        """Statements that must stand before the one at hand."""
        self.attended = False

    def _value(self, node: cst.BaseExpression, env: dict[str, Value]) -> Value:
        if isinstance(node, cst.Name):
            found = env.get(node.value, Value("plain", node))
            if found.kind == "gone":
                raise self._stop(f"reads {node.value} where its shape is not known", node)
            return found
        if isinstance(node, cst.Tuple | cst.List):
            return self._tuple(node, env)
        if isinstance(node, cst.Call):
            return self._call(node, env)
        if isinstance(node, cst.Subscript):
            return self._subscript(node, env)
        if isinstance(node, cst.Attribute):
            owner = self._value(node.value, env)
            if owner.kind == "tensor":
                if node.attr.value == "shape":
                    return Value("shape", axes=owner.shape())
                return Value("plain", node.with_changes(value=owner.node))
            return owner if owner.kind == "erased" else Value("plain", node)
        if isinstance(node, cst.BinaryOperation):
            return self._binary(node, env)
        if self._erased_inside(node, env):
            return ERASED
        if edit.names_read(node) & {n for n, v in env.items() if v.kind in ("tensor", "shape")}:
            raise self._stop(f"cannot follow `{edit.flat(node)}`", node)
        return Value("plain", node)

    def _tuple(self, node: cst.Tuple | cst.List, env) -> Value:
        axes: list[str] = []
        parts = [self._value(e.value, env) for e in node.elements]
        if any(p.kind == "tensor" for p in parts):
            return Value("several", parts=tuple(parts))
        for element, part in zip(node.elements, parts, strict=True):
            if part.kind == "shape":
                axes += part.axes
            elif part.kind == "erased" or isinstance(element, cst.StarredElement):
                return ERASED
            else:
                axes.append(edit.flat(element.value))
        if any(p.kind == "shape" for p in parts):
            return Value("shape", axes=tuple(axes))
        return Value("plain", node)

    def _binary(self, node: cst.BinaryOperation, env) -> Value:
        left, right = self._value(node.left, env), self._value(node.right, env)
        kinds = {left.kind, right.kind}
        if kinds == {"plain"}:
            return Value("plain", node)
        tensor = left if left.kind == "tensor" else right
        alike = kinds == {"tensor"} and (left.form, left.moved) == (right.form, right.moved)
        if kinds == {"tensor", "plain"} or alike:
            return replace(tensor, node=node.with_changes(left=left.node, right=right.node))
        raise self._stop(f"cannot follow `{edit.flat(node)}`", node)

    def _subscript(self, node: cst.Subscript, env) -> Value:
        owner = self._value(node.value, env)
        if owner.kind == "erased":
            return owner
        if owner.kind == "shape":
            return self._axes_of(node, owner)
        if owner.kind != "tensor":
            return Value("plain", node)
        if self._last_slice(node) is None:
            raise self._stop(f"cannot follow `{edit.flat(node)}`", node)
        return replace(owner, node=node.with_changes(value=owner.node))

    def _axes_of(self, node: cst.Subscript, owner: Value) -> Value:
        """shape[1], shape[:-1]."""
        written = edit.flat(node.slice[0].slice).replace(" ", "")
        try:
            if ":" in written:
                low, high = (int(b) if b else None for b in written.split(":"))
                return Value("shape", axes=owner.axes[low:high])
            return Value("shape", axes=(owner.axes[int(written)],))
        except (ValueError, IndexError):
            raise self._stop(f"cannot follow `{edit.flat(node)}`", node) from None

    def _last_slice(self, node: cst.Subscript) -> tuple[str, str] | None:
        """(lower, upper) of x[..., lower:upper]."""
        parts = [s.slice for s in node.slice]
        if len(parts) != 2 or edit.code(parts[0]).strip() != "...":
            return None
        last = parts[1]
        if not isinstance(last, cst.Slice) or last.step is not None:
            return None
        return edit.flat(last.lower), edit.flat(last.upper)

    # ---- calls ------------------------------------------------------------------------------

    def _call(self, node: cst.Call, env) -> Value:
        name = edit.code(node.func)
        plain = [a.value for a in node.args if a.keyword is None and not a.star]
        if plain and edit.code(plain[0]) == "self" and len(plain) >= 4:
            return self._attend(node, plain, env)
        if name in ("torch.cat", "torch.concat") and isinstance(plain[0], cst.Tuple | cst.List):
            parts = [self._value(e.value, env) for e in plain[0].elements]
            return self._joined(parts, edit.flat(edit.call_argument(node, 1, "dim")), node)
        if name == "torch.split":
            return self._split(node, self._value(plain[0], env), 1)
        if name in _FUNCTIONS:
            inner = self._value(plain[0], env)
            if inner.kind == "tensor":
                first = node.args[0].with_changes(value=inner.node)
                return replace(inner, node=node.with_changes(args=[first, *node.args[1:]]))
        attr = name.removeprefix("self.")
        if name.startswith("self.") and "." not in attr:
            return self._submodule(node, attr, env)
        if isinstance(node.func, cst.Attribute):
            owner = self._value(node.func.value, env)
            if owner.kind == "tensor":
                return self._method(node, node.func.attr.value, owner, env)
            if owner.kind == "erased":
                return owner
        if "ALL_ATTENTION_FUNCTIONS" in name or self._erased_inside(node, env):
            return ERASED
        if any(self._value(a.value, env).kind in ("tensor", "shape") for a in node.args):
            raise self._stop(f"cannot follow `{edit.flat(node)}`", node)
        return Value("plain", node)

    def _submodule(self, node: cst.Call, attr: str, env) -> Value:
        inner = self._value(node.args[0].value, env) if len(node.args) == 1 else ERASED
        if attr in self.linears and inner.kind == "tensor" and inner.form != "heads":
            pass
        elif attr not in self.norms or inner.kind != "tensor":
            raise self._stop(f"does not know what self.{attr} does to queries and keys", node)
        called = edit.expression(f"self.{attr}({edit.code(inner.node)})")
        return Value("tensor", called, inner.form, inner.moved)

    def _method(self, node: cst.Call, method: str, owner: Value, env) -> Value:
        arguments = [edit.flat(a.value) for a in node.args]
        if method in ("contiguous", "to", "float", "type_as") and owner.form == "single":
            return owner if method == "contiguous" else self._elementwise(node, owner)
        if method == "contiguous":
            return owner
        if method == "transpose" and sorted(arguments) == ["1", "2"] and owner.form != "flat":
            return replace(owner, moved=not owner.moved)
        if method in ("view", "reshape"):
            return self._viewed(node, owner, env)
        if method == "split":
            return self._split(node, owner, 0)
        if method == "expand" and owner.form == "single" and owner.moved:
            return self._expanded(node, owner, env)
        if method in ("new_empty", "new_zeros"):
            return EMPTY
        if method in ELEMENTWISE:
            return self._elementwise(node, owner)
        raise self._stop(f"cannot follow `.{method}(...)` in `{edit.flat(node)}`", node)

    def _elementwise(self, node: cst.Call, owner: Value) -> Value:
        return replace(owner, node=node.with_changes(func=node.func.with_changes(value=owner.node)))

    def _axes(self, node: cst.Call, env) -> list[str]:
        """The shape that a call is given, each axis as in the original or as written."""
        axes: list[str] = []
        for argument in node.args:
            got = self._value(argument.value, env)
            if got.kind == "shape":
                axes += got.axes
            elif got.kind == "plain" and not argument.star and argument.keyword is None:
                axes.append(edit.flat(argument.value))
            else:
                raise self._stop(f"does not know the shape in `{edit.flat(node)}`", node)
        return axes

    def _viewed(self, node: cst.Call, owner: Value, env) -> Value:
        axes = self._axes(node, env)
        if axes[:2] == ["B", "S"] and len(axes) == 3:
            if owner.form == "heads" and not owner.moved:
                return Value("tensor", edit.expression(f"{edit.code(owner.node)}.flatten(1)"))
            if owner.form == "flat" or not owner.moved:
                return Value("tensor", owner.node)
        if len(axes) == 4 and (owner.form == "flat" or owner.form == "single"):
            if axes[:3] == ["B", "1", "S"]:
                return Value("tensor", owner.node, "single", True)
            if axes[:3] == ["B", "S", "1"]:
                return Value("tensor", owner.node, "single")
            if axes[:2] == ["B", "S"] and axes[2] in ("-1", self.latent.num_heads):
                shape = f"-1, {self.latent.num_heads}, {axes[3]}"
                made = edit.expression(f"{edit.code(owner.node)}.view({shape})")
                return Value("tensor", made, "heads")
        raise self._stop(f"does not know the shape in `{edit.flat(node)}`", node)

    def _expanded(self, node: cst.Call, owner: Value, env) -> Value:
        """One key part for all heads; a stride of 0, no copy."""
        axes = self._axes(node, env)
        if len(axes) != 4 or axes[1] not in ("H", self.latent.num_heads) or axes[3] != "-1":
            raise self._stop(f"does not know the shape in `{edit.flat(node)}`", node)
        shape = f"-1, {self.latent.num_heads}, -1"
        made = edit.expression(f"{edit.code(owner.node)}.unsqueeze(1).expand({shape})")
        return Value("tensor", made, "heads", True)

    def _split(self, node: cst.Call, owner: Value, at: int) -> Value:
        sizes = edit.call_argument(node, at, "split_size_or_sections")
        if sizes is None:
            sizes = edit.call_argument(node, at, "split_size")
        dim = edit.flat(edit.call_argument(node, at + 1, "dim"))
        if owner.kind != "tensor" or dim != "-1" or not isinstance(sizes, cst.List | cst.Tuple):
            raise self._stop(f"cannot follow `{edit.flat(node)}`", node)
        made = edit.expression(f"{edit.code(owner.node)}.split({edit.flat(sizes)}, dim=-1)")
        parts = tuple(
            Value("tensor", None, owner.form, owner.moved, size=edit.flat(e.value))
            for e in sizes.elements
        )
        return Value("several", made, parts=parts)

    def _joined(self, parts: list[Value], dim: str, node: cst.CSTNode) -> Value:
        forms = {(p.kind, p.form, p.moved) for p in parts}
        if len(forms) != 1 or parts[0].kind != "tensor" or dim != "-1":
            raise self._stop(f"cannot follow `{edit.flat(node)}`", node)
        inside = ", ".join(edit.code(p.node) for p in parts)
        return replace(parts[0], node=edit.expression(f"torch.cat(({inside}), dim=-1)"))

    # ---- attention --------------------------------------------------------------------------

    def _attend(self, call: cst.Call, plain: list[cst.BaseExpression], env) -> Value:
        tensors = [self._value(a, env) for a in plain[1:4]]
        if any(t.kind != "tensor" or t.form != "heads" or not t.moved for t in tensors):
            raise self._stop("gives attention something other than q, k and v by heads", call)
        for argument in call.args:
            if argument.keyword is None:
                continue
            name, written = argument.keyword.value, edit.code(argument.value)
            if name in _KEYWORDS:
                self.keywords[name] = argument.value
            elif name not in IGNORED_KEYWORDS and written != "None":
                raise self._stop(
                    f"passes {name}= to attention, which this draft does not know", call
                )
        self.attended = True
        query, key, value = (edit.code(t.node) for t in tensors)
        facts = self.latent
        pad = edit.statement(
            f"{value} = nn.functional.pad({value}, (0, {facts.head_dim} - {facts.value_dim}))"
        )
        self.before.append(
            edit.comment_before(
                edit.blank_before(pad),
                "The cache has one head size: values are padded to it, and cut back afterwards.",
            )
        )
        made = (
            f"self.attn({query}, {key}, {value})"
            f".view(-1, {facts.num_heads}, {facts.head_dim})[..., : {facts.value_dim}]"
        )
        return Value("several", parts=(Value("tensor", edit.expression(made), "heads"), ERASED))

    # ---- helpers ----------------------------------------------------------------------------

    def _erased_inside(self, node: cst.CSTNode, env: dict[str, Value]) -> bool:
        return any(env.get(n, Value("plain")).kind == "erased" for n in edit.names_read(node))

    def _stop(self, what: str, node: cst.CSTNode | Sequence) -> Blocker:
        """A blocker at the line of this class that holds the node's text."""
        wanted = edit.code(node).strip().splitlines()[0]  # type: ignore[arg-type]
        for number in range(self.first_line, len(self.source) + 1):
            if wanted in self.source[number - 1]:
                return Blocker(f"{self.cls}.forward {what}.", number)
        return Blocker(f"{self.cls}.forward {what}.", self.first_line)
