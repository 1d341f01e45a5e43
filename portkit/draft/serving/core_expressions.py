"""Expressions of a hand-written attention: which axes a tensor has, scores, weights, output."""

from __future__ import annotations

from dataclasses import replace

import libcst as cst

from portkit.draft import edit
from portkit.draft.blocker import Blocker
from portkit.draft.serving.core_values import (
    HEADS,
    MASK,
    OTHER,
    PLAIN,
    ZEROS,
    Value,
    dimension,
    viewed,
)

_PRODUCTS = ("torch.matmul", "torch.bmm")
_SOFTMAX = (
    "nn.functional.softmax",
    "F.softmax",
    "torch.softmax",
    "torch.nn.functional.softmax",
    "nn.Softmax(dim=-1)",
)
_SDPA = ("F.scaled_dot_product_attention", "torch.nn.functional.scaled_dot_product_attention")
_SAME = ("contiguous", "to", "float", "type", "type_as", "clone")


class CoreExpressions:
    """`inputs`, `masks`, `biases`: parameters that carry tokens, the causal mask, ALiBi.

    `buffers`: attributes that hold a causal mask; `window`: the sliding window in it as source;
    `cut`: the statement that cuts a fused projection (whole_cut.py), "" if there is none.
    """

    def __init__(
        self,
        *,
        cls: str,
        linears: set[str],
        inputs: set[str],
        masks: set[str],
        biases: set[str],
        buffers: set[str],
        window: str,
        cut: str,
        source: str,
        first_line: int,
    ) -> None:
        self.cls, self.linears, self.inputs = cls, linears, inputs
        self.cut = cut
        self.masks, self.biases, self.buffers, self.window = masks, biases, buffers, window
        self.source, self.first_line = source.splitlines(), first_line
        self.names: dict[str, str] = {}
        """Source of a size -> its letter, once a view of a projection has shown it."""
        self.head_dim = ""
        self.attended = False
        self.lost: Blocker | None = None
        """Where the first tensor went out of sight; of no matter if it attends all the same."""

    def value(self, node: cst.BaseExpression, env: dict[str, Value]) -> Value:
        if isinstance(node, cst.Name):
            return env.get(node.value, PLAIN)
        if isinstance(node, cst.Call):
            return self._call(node, env)
        if isinstance(node, cst.BinaryOperation):
            return self._binary(node, env)
        if isinstance(node, cst.Subscript):
            return self._subscript(node, env)
        if isinstance(node, cst.Attribute):
            return self._attribute(node, env)
        if isinstance(node, cst.Tuple | cst.List):
            if len(node.elements) == 1 and isinstance(node, cst.List):
                return replace(self.value(node.elements[0].value, env))
            elements = [(e.value, isinstance(e, cst.StarredElement)) for e in node.elements]
            return Value("shape", items=self._items(elements, env))
        return PLAIN

    def _attribute(self, node: cst.Attribute, env: dict[str, Value]) -> Value:
        if edit.code(node.value) == "self":
            return MASK if node.attr.value in self.buffers else Value("size", text=edit.code(node))
        owner = self.value(node.value, env)
        if node.attr.value == "shape" and owner.axes:
            return Value("shape", items=owner.axes)
        return PLAIN

    # ---- sizes and shapes -------------------------------------------------------------------

    def _items(self, elements, env: dict[str, Value]) -> tuple[str, ...]:
        items: list[str] = []
        for node, starred in elements:
            got = self.value(node, env)
            if got.kind == "shape" and (starred or len(elements) == 1):
                items += got.items
            else:
                items.append(self._size(node, env))
        return tuple(items)

    def _size(self, node: cst.BaseExpression, env: dict[str, Value]) -> str:
        """Letters of a size, "b * self.num_heads", or its source."""
        if isinstance(node, cst.BinaryOperation) and isinstance(node.operator, cst.Multiply):
            left, right = self._size(node.left, env), self._size(node.right, env)
            lettered = set(left + right) <= set("bshdw")
            return left + right if lettered else f"{left} * {right}"
        if isinstance(node, cst.BinaryOperation) and isinstance(node.operator, cst.FloorDivide):
            left, right = self._size(node.left, env), self._size(node.right, env)
            letter = self.names.get(right, right)
            if left == f"b{letter}":
                return "b"
            return f"{left} // {right}"
        got = self.value(node, env)
        return got.text if got.kind == "size" and got.text else edit.flat(node)

    def _view(self, node: cst.Call, owner: Value, env: dict[str, Value]) -> Value:
        items = self._items([(a.value, bool(a.star)) for a in node.args], env)
        if owner.kind in ("scores", "probs", "mask", "bias"):
            return owner
        if owner.axes == ("b", "s", "w"):
            if len(items) == 4 and items[:2] in (("b", "s"), ("b", "-1")):
                self._named(items[2], items[3])
                return Value("tensor", ("b", "s", "h", "d"))
            if len(items) == 5 and items[:2] == ("b", "s") and "3" in items[2:4]:
                heads = items[3] if items[2] == "3" else items[2]
                self._named(heads, items[4])
                order = ("t", "h") if items[2] == "3" else ("h", "t")
                return Value("tensor", ("b", "s", *order, "d"))
            return OTHER if len(items) != 3 else owner
        axes = viewed(owner.axes, items, self.names)
        return self._regrouped(owner, axes) if axes else OTHER

    def _named(self, heads: str, dim: str) -> None:
        """Remember what counts heads, and what a head's dimension is called."""
        for item, letter in ((heads, "h"), (dim, "d")):
            if item != "-1":
                self.names[item] = letter
        if dim != "-1":
            self.head_dim = dim

    def _regrouped(self, owner: Value, axes: tuple[str, ...]) -> Value:
        if owner.kind == "context" and axes == ("b", "s", "hd"):
            return Value("merged", text=owner.text)
        if owner.kind == "tensor" and axes == HEADS and not owner.canonical:
            return Value("tensor", HEADS)
        return replace(owner, axes=axes)

    def _moved(self, node: cst.Call, owner: Value) -> Value:
        """transpose(i, j) and permute(...)."""
        if owner.kind in ("scores", "probs", "mask", "bias"):
            return owner
        numbers = [dimension(a.value) for a in node.args]
        axes = list(owner.axes)
        if not axes or any(n is None or not -len(axes) <= n < len(axes) for n in numbers):
            return OTHER
        if edit.code(node.func).endswith("permute"):
            axes = [axes[n] for n in numbers]
        else:
            first, second = numbers
            axes[first], axes[second] = axes[second], axes[first]
        return self._regrouped(owner, tuple(axes))

    # ---- calls ------------------------------------------------------------------------------

    def _call(self, node: cst.Call, env: dict[str, Value]) -> Value:
        name = edit.code(node.func)
        plain = [a.value for a in node.args if a.keyword is None and not a.star]
        if name in _PRODUCTS and len(plain) == 2:
            return self._product(self.value(plain[0], env), self.value(plain[1], env), node)
        if name == "torch.zeros":
            return ZEROS
        if name == "torch.cat":
            return self._joined_heads(node, env)
        if name == "torch.baddbmm" or name.endswith(".baddbmm"):
            return self._baddbmm(node, env)
        if name in _SDPA:
            return self._sdpa(node, plain, env)
        if name in _SOFTMAX:
            got = self.value(plain[0], env)
            return replace(got, kind="probs") if got.kind == "scores" else OTHER
        if name in ("torch.where", "torch.max", "torch.maximum"):
            return self._masked([self.value(a, env) for a in plain])
        if name.startswith("self.") and name.removeprefix("self.") in self.linears:
            return Value("tensor", ("b", "s", "w"))
        if isinstance(node.func, cst.Attribute):
            return self._method(node, node.func.attr.value, self.value(node.func.value, env), env)
        return PLAIN

    def _method(self, node: cst.Call, method: str, owner: Value, env: dict[str, Value]) -> Value:
        if method == "size":
            if not node.args:
                return Value("shape", items=owner.axes)
            number = dimension(node.args[0].value)
            if owner.kind in ("tensor", "context") and number is not None and owner.axes:
                letters = owner.axes[number]
                if letters == "w" and owner.text:
                    return Value("size", text=owner.text)
                return Value("size", text=letters)
            return PLAIN
        if owner.kind in ("plain", "other", "size", "shape"):
            return OTHER if owner.kind == "other" else PLAIN
        if method in _SAME:
            return owner
        if method in ("view", "reshape"):
            return self._view(node, owner, env)
        if method in ("transpose", "permute"):
            return self._moved(node, owner)
        if method == "softmax" and owner.kind == "scores":
            return replace(owner, kind="probs")
        if method in ("masked_fill", "masked_fill_") and owner.kind == "scores":
            return self._masked([owner, self.value(node.args[0].value, env)])
        if method in ("split", "chunk") and owner.axes == ("b", "s", "w"):
            width = edit.flat(node.args[0].value) if method == "split" else ""
            part = Value("tensor", owner.axes, text=width if width.startswith("self.") else "")
            return Value("several", parts=(part,) * 3)
        merges = method == "flatten" and [edit.code(a.value) for a in node.args] == ["0", "1"]
        if merges and owner.kind == "context" and owner.axes == HEADS:
            return replace(owner, axes=("bh", "s", "d"))
        if method in ("clamp", "clamp_") and owner.axes == ("b", "s", "w"):
            return owner
        return owner if owner.kind in ("mask", "bias") else OTHER

    def _subscript(self, node: cst.Subscript, env: dict[str, Value]) -> Value:
        owner = self.value(node.value, env)
        if owner.kind == "shape" and len(node.slice) == 1:
            part = node.slice[0].slice
            if isinstance(part, cst.Index):
                number = dimension(part.value)
                if number is not None and -len(owner.items) <= number < len(owner.items):
                    return Value("size", text=owner.items[number])
            elif isinstance(part, cst.Slice) and part.lower is None:
                stop = dimension(part.upper)
                if stop is not None:
                    return replace(owner, items=owner.items[:stop])
        if owner.kind in ("mask", "bias"):
            return owner
        if "t" in owner.axes:
            return self._one_of_three(node, owner)
        if owner.kind == "tensor" and owner.axes[-1:] == ("d",):
            return self._part_of_heads(node, owner)
        if owner.kind == "attend" and edit.code(node).endswith("[0]"):
            return owner
        if owner.kind == "context" and edit.code(node).endswith("[0]"):
            return owner  # the first of the outputs of a helper, which has no others now
        return OTHER

    def _one_of_three(self, node: cst.Subscript, owner: Value) -> Value:
        """qkv[..., 0, :]: one of query, key and value."""
        parts = [edit.code(e.slice) for e in node.slice]
        if parts.count("...") == 1:
            at = parts.index("...")
            missing = len(owner.axes) - len(parts) + 1
            parts[at : at + 1] = [":"] * missing
        if len(parts) != len(owner.axes):
            return OTHER
        numbers = [a for a, p in zip(owner.axes, parts, strict=True) if p != ":"]
        if numbers != ["t"] or parts[owner.axes.index("t")] not in ("0", "1", "2"):
            return OTHER
        return Value("tensor", tuple(a for a in owner.axes if a != "t"))

    def _part_of_heads(self, node: cst.Subscript, owner: Value) -> Value:
        """query[..., : self.rotary_dim]: some dimensions of each head."""
        parts = [e.slice for e in node.slice]
        whole = all(edit.code(p) in (":", "...") for p in parts[:-1])
        if not whole or not isinstance(parts[-1], cst.Slice) or len(parts) < 2:
            return OTHER
        return Value("tensor", (*owner.axes[:-1], "r"))

    def _joined_heads(self, node: cst.Call, env: dict[str, Value]) -> Value:
        """torch.cat([rotated, passed], dim=-1): whole heads again."""
        first = node.args[0].value
        dim = edit.call_argument(node, 1, "dim")
        if not isinstance(first, cst.List | cst.Tuple) or dimension(dim) != -1:
            return OTHER
        found = [self.value(e.value, env) for e in first.elements]
        if len(found) < 2 or any(f.kind != "tensor" or f.axes != found[0].axes for f in found):
            return OTHER
        *lead, last = found[0].axes or ("",)
        return Value("tensor", (*lead, "d")) if last == "r" else OTHER

    # ---- scores -----------------------------------------------------------------------------

    def _product(self, left: Value, right: Value, node: cst.CSTNode) -> Value:
        if left.kind == right.kind == "tensor" and left.axes and right.axes:
            if left.axes[-2:] == ("s", "d") and right.axes[-2:] == ("d", "s"):
                return Value("scores", parts=(left, right))
            return OTHER
        if left.kind == "probs" and right.kind == "tensor" and right.axes[-2:] == ("s", "d"):
            return replace(left, kind="attend", axes=right.axes, parts=(*left.parts, right))
        return OTHER

    def _baddbmm(self, node: cst.Call, env: dict[str, Value]) -> Value:
        """beta * bias + alpha * (batch1 @ batch2)."""
        method = not edit.code(node.func).startswith("torch.")
        given = {a.keyword.value: a.value for a in node.args if a.keyword is not None}
        plain = [a.value for a in node.args if a.keyword is None]
        if method:
            plain.insert(0, node.func.value)
        first = given.get("batch1") or plain[1]
        second = given.get("batch2") or plain[2]
        scores = self._product(self.value(first, env), self.value(second, env), node)
        if scores.kind != "scores":
            return OTHER
        alpha, beta = (edit.flat(given[n]) if n in given else "1" for n in ("alpha", "beta"))
        base = self.value(plain[0], env)
        if base.kind == "bias":
            return replace(scores, factor=alpha, bias=beta)
        return replace(scores, factor=alpha) if beta == "0" or base == ZEROS else OTHER

    def _sdpa(self, node: cst.Call, plain, env: dict[str, Value]) -> Value:
        given = {a.keyword.value: a.value for a in node.args if a.keyword is not None}
        tensors = [self.value(a, env) for a in plain[:3]]
        if len(tensors) != 3 or any(t.kind != "tensor" or t.axes != HEADS for t in tensors):
            return OTHER
        if not set(given) <= {"attn_mask", "dropout_p", "is_causal", "scale"}:
            return OTHER
        mask = self.value(given["attn_mask"], env) if "attn_mask" in given else MASK
        scale = edit.flat(given["scale"]) if "scale" in given else f"{self.head_dim}**-0.5"
        bias = mask.text or "1" if mask.kind == "bias" else ""
        return Value("attend", HEADS, parts=tuple(tensors), factor=scale, bias=bias)

    def _masked(self, values: list[Value]) -> Value:
        scores = [v for v in values if v.kind == "scores"]
        rest = [v for v in values if v.kind not in ("scores", "mask", "plain", "size")]
        return scores[0] if len(scores) == 1 and not rest else OTHER

    def _binary(self, node: cst.BinaryOperation, env: dict[str, Value]) -> Value:
        left, right = self.value(node.left, env), self.value(node.right, env)
        operator = node.operator
        if isinstance(operator, cst.MatrixMultiply):
            return self._product(left, right, node)
        kinds = {left.kind, right.kind}
        if left.kind == right.kind == "shape" and isinstance(operator, cst.Add):
            return Value("shape", items=(*left.items, *right.items))
        if "scores" in kinds:
            return self._on_scores(node, left, right, env)
        if "mask" in kinds and kinds <= {"mask", "plain", "size"}:
            return MASK
        if "bias" in kinds and kinds <= {"bias", "plain", "size"}:
            return left if left.kind == "bias" else right
        tensors = [v for v in (left, right) if v.kind == "tensor"]
        if len(tensors) == 1 and kinds <= {"tensor", "plain", "size"}:
            flat = tensors[0].axes == ("b", "s", "w")
            return replace(tensors[0], canonical="") if flat else OTHER
        if len(tensors) == 2 and left.axes == right.axes == ("b", "s", "w"):
            return left
        if kinds <= {"plain", "size"}:
            return PLAIN
        return OTHER

    def _on_scores(self, node, left: Value, right: Value, env: dict[str, Value]) -> Value:
        scores, other = (left, right) if left.kind == "scores" else (right, left)
        shown = node.right if left.kind == "scores" else node.left
        operator = node.operator
        if isinstance(operator, cst.Add):
            if other.kind == "mask":
                return scores
            if other.kind == "bias" and not scores.bias:
                return replace(scores, bias="1")
            return OTHER
        if other.kind == "mask" and isinstance(operator, cst.Multiply):
            return scores
        if other.kind not in ("plain", "size"):
            return OTHER
        text = self._number(shown, env)
        if isinstance(operator, cst.Divide) and left.kind == "scores":
            factor = f"{scores.factor or '1.0'} / {text}"
            bias = f"{scores.bias} / {text}" if scores.bias else ""
        elif isinstance(operator, cst.Multiply):
            factor = f"{scores.factor} * {text}" if scores.factor else text
            bias = scores.bias and (text if scores.bias == "1" else f"{scores.bias} * {text}")
        else:
            return OTHER
        return replace(scores, factor=factor, bias=bias)

    def _number(self, node: cst.BaseExpression, env: dict[str, Value]) -> str:
        """Source of a number, with the sizes of tensors in it named by the class."""

        def change(here: cst.CSTNode) -> cst.CSTNode | None:
            if isinstance(here, cst.Call) and edit.code(here.func).endswith(".size"):
                got = self.value(here, env)
                if got.kind == "size" and got.text == "d" and self.head_dim:
                    return edit.expression(f"({self.head_dim})")
            return None

        text = edit.flat(edit.replace(node, change))
        return text if isinstance(node, cst.Name | cst.Attribute | cst.Call) else f"({text})"
