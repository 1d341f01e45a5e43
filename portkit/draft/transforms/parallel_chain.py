"""Step parallel: linears that stand in a layer or in an uncommon feed-forward.

Two linears with nothing but elementwise operations between them split over ranks exactly: the first
by columns, the second by rows, with one sum behind it. Of any other as wide as the model each rank
computes its columns, which are gathered behind it; smaller ones are whole on every rank.
"""

from __future__ import annotations

import re

import libcst as cst

from portkit.draft import edit
from portkit.draft.work import Work, set_method

_ACTIVATIONS = ("GELU", "ReLU", "SiLU", "Tanh", "Sigmoid", "Mish", "ReLU6", "Identity")
_FUNCTIONS = ("gelu", "relu", "silu", "tanh", "sigmoid")
_GATHERED = "ColumnParallelLinear, gathered"
_WIDE = re.compile(
    r"(self\.|config\.)+(hidden_size|intermediate_size|d_model|n_embd|ffn_dim|n_inner)"
)
_WHOLE = "PORT: whole on every rank; shard it (column, then row) to save memory."
_MIXING = ("softmax", "mean", "sum(", "norm", "chunk", "split", "view", "dim", "matmul", "cat(")


def shard_chains(work: Work, cls: cst.ClassDef) -> tuple[cst.ClassDef, list[str]]:
    """The class with vLLM's linears for its nn.Linear, and the attributes that stay whole.

    Its __init__ must take quant_config and prefix.
    """
    cls = _sequences(cls)
    init, forward = edit.method(cls, "__init__"), edit.method(cls, "forward")
    linears = _linears(init)
    if not linears:
        return cls, []
    kinds = dict.fromkeys(linears, "ReplicatedLinear")
    for first, second in _pairs(work, cls, forward, set(linears)):
        kinds[first], kinds[second] = "ColumnParallelLinear", "RowParallelLinear"
    for attr in _wide(init, [a for a, kind in kinds.items() if kind == "ReplicatedLinear"]):
        kinds[attr] = _GATHERED
    body = edit.with_body(init, [_constructed(s, kinds) for s in edit.body_of(init)])
    cls = set_method(cls, body)
    for method in [m for m in edit.members(cls) if isinstance(m, cst.FunctionDef)]:
        if method.name.value != "__init__":
            cls = set_method(cls, unpacked(method, set(linears)))
    return cls, [attr for attr, kind in kinds.items() if kind == "ReplicatedLinear"]


def _linears(init: cst.FunctionDef) -> list[str]:
    """Attributes that __init__ sets to nn.Linear, in branches too."""
    found = edit.find(
        init,
        lambda n: (
            isinstance(n, cst.Assign)
            and edit.is_call(n.value, "nn.Linear")
            and edit.code(n.targets[0].target).startswith("self.")
        ),
    )
    return list(dict.fromkeys(edit.code(n.targets[0].target).removeprefix("self.") for n in found))


def _wide(init: cst.FunctionDef, attrs: list[str]) -> list[str]:
    """Those of the attributes that take, and give, as many values as the model is wide or more."""
    return [
        pair[0]
        for node in edit.find(init, lambda n: isinstance(n, cst.SimpleStatementLine))
        if (pair := edit.assigned_attribute(node)) is not None
        and pair[0] in attrs
        and edit.is_call(pair[1], "nn.Linear")
        and all(
            _WIDE.fullmatch(edit.flat(edit.call_argument(pair[1], at, name)))
            for at, name in enumerate(("in_features", "out_features"))
        )
    ]


def _constructed(node: edit.Statement, kinds: dict[str, str]) -> edit.Statement:
    """nn.Linear(a, b, bias=c) -> the class of that attribute, with quant_config and prefix."""

    def change(here: cst.CSTNode) -> cst.CSTNode | None:
        if not isinstance(here, cst.SimpleStatementLine):
            return None
        pair = edit.assigned_attribute(here)
        if pair is None:
            return None
        attr, value = pair
        if edit.is_call(value, "nn.Linear"):
            kind, _, gathered = kinds[attr].partition(", ")
            extra = "    gather_output=True,\n" if gathered else ""
            made = edit.statement(f"self.{attr} = {linear(value, kind, attr, extra)}")
            if gathered:
                made = edit.comment_before(made, "What follows needs all of it: gathered.")
            if kinds[attr] == "ReplicatedLinear":
                made = edit.comment_before(made, _WHOLE)
            return made.with_changes(leading_lines=[*here.leading_lines, *made.leading_lines])
        if edit.is_call(value, "get_activation") or edit.code(value).startswith("ACT2FN["):
            named = value.args[0] if isinstance(value, cst.Call) else value.slice[0].slice
            made = edit.statement(f"self.{attr} = get_act_fn({edit.code(named.value)})")
            return made.with_changes(leading_lines=here.leading_lines)
        return None

    return edit.replace(node, change)


def linear(call: cst.Call, kind: str, name: str, extra: str = "") -> str:
    """Source of `kind(in, out, bias=..., quant_config=..., prefix=...)`."""
    bias = edit.call_argument(call, 2, "bias")
    return (
        f"{kind}(\n    {edit.flat(edit.call_argument(call, 0, 'in_features'))},\n"
        f"    {edit.flat(edit.call_argument(call, 1, 'out_features'))},\n"
        f"    bias={'True' if bias is None else edit.flat(bias)},\n"
        f'    quant_config=quant_config,\n{extra}    prefix=f"{{prefix}}.{name}",\n)'
    )


# ---- which linears follow each other -----------------------------------------------------------


def _pairs(
    work: Work, cls: cst.ClassDef, forward: cst.FunctionDef, linears: set[str]
) -> list[tuple[str, str]]:
    """(first, second) where the second is fed by the first through elementwise operations only."""
    calls = edit.find(forward, lambda n: _linear_name(n, linears) != "")
    counts: dict[str, int] = {}
    for call in calls:
        counts[_linear_name(call, linears)] = counts.get(_linear_name(call, linears), 0) + 1
    acts = _elementwise_attributes(work, cls)
    flow = _Flow(linears, acts)
    flow.block(edit.body_of(forward))
    return [
        (first, second)
        for first, second in flow.pairs
        if counts.get(first) == counts.get(second) == 1 and first not in flow.escaped
    ]


def _linear_name(node: cst.CSTNode, linears: set[str]) -> str:
    if not isinstance(node, cst.Call):
        return ""
    name = edit.code(node.func)
    attr = name.removeprefix("self.")
    return attr if name.startswith("self.") and attr in linears else ""


class _Flow:
    """Follows the output of each linear through a forward."""

    def __init__(self, linears: set[str], acts: set[str]) -> None:
        self.linears, self.acts = linears, acts
        self.names: dict[str, str] = {}
        """Local name -> linear whose output it is, elementwise operations aside."""
        self.pairs: list[tuple[str, str]] = []
        self.escaped: set[str] = set()
        """Linears whose output goes anywhere but elementwise into another."""

    def block(self, body: list[edit.Statement]) -> None:
        for node in body:
            if isinstance(node, cst.If):
                self.source(node.test)
                self.block(edit.body_of(node))
                if isinstance(node.orelse, cst.Else):
                    self.block(edit.body_of(node.orelse))
                continue
            pair = edit.assigned(node)
            if pair is not None and isinstance(pair[0], cst.Name):
                source = self.source(pair[1])
                self.names[pair[0].value] = source
                continue
            for child in node.children:
                self._escape(self._everything(child))

    def source(self, node: cst.BaseExpression) -> str:
        """The linear whose output this is up to elementwise operations; "" otherwise."""
        if isinstance(node, cst.Name):
            return self.names.get(node.value, "")
        if isinstance(node, cst.Call):
            return self._call(node)
        if isinstance(node, cst.BinaryOperation):
            left, right = self.source(node.left), self.source(node.right)
            if (left and right) or not isinstance(node.operator, cst.Multiply | cst.Divide):
                self._escape({left, right})
                return ""
            plain = node.right if left else node.left
            if not edit.names_read(plain) <= {"self"} or edit.find(
                plain, lambda n: isinstance(n, cst.Call)
            ):
                self._escape({left, right})
                return ""
            return left or right
        self._escape(self._everything(node))
        return ""

    def _call(self, node: cst.Call) -> str:
        name = _linear_name(node, self.linears)
        inner = self.source(node.args[0].value) if node.args else ""
        if name:
            if inner:
                self.pairs.append((inner, name))
            return name
        called = edit.code(node.func)
        single = len(node.args) == 1 and (
            called.removeprefix("self.") in self.acts
            or (
                called.rsplit(".", 1)[-1] in _FUNCTIONS
                and called.split(".")[0] in ("F", "nn", "torch")
            )
        )
        if single:
            return inner
        found = {inner}
        for argument in node.args[1:]:
            found |= self._everything(argument.value)
        found |= self._everything(node.func)
        self._escape(found)
        return ""

    def _everything(self, node: cst.CSTNode) -> set[str]:
        names = edit.names_read(node)
        found = {self.names.get(n, "") for n in names}
        return found | {
            _linear_name(n, self.linears)
            for n in edit.find(node, lambda n: isinstance(n, cst.Call))
        }

    def _escape(self, found: set[str]) -> None:
        self.escaped |= found - {""}


def _elementwise_attributes(work: Work, cls: cst.ClassDef) -> set[str]:
    """Attributes that are activations: by vLLM's or PyTorch's name, or a class of the file."""
    classes = {c.name.value: c for c in work.module.body if isinstance(c, cst.ClassDef)}
    found: set[str] = set()
    for node in edit.body_of(edit.method(cls, "__init__")):
        pair = edit.assigned_attribute(node)
        if pair is None:
            continue
        value = edit.code(pair[1])
        name = edit.code(pair[1].func) if isinstance(pair[1], cst.Call) else ""
        short = name.rsplit(".", 1)[-1]
        named = value.startswith(("ACT2FN[", "ACT_FNS[")) or name in (
            "get_act_fn",
            "get_activation",
        )
        plain = name.startswith("nn.") and short in _ACTIVATIONS
        if named or plain or (name in classes and _is_elementwise(classes[name])):
            found.add(pair[0])
    return found


def _is_elementwise(cls: cst.ClassDef) -> bool:
    """A module without parameters whose forward mixes no elements."""
    forward = edit.method(cls, "forward")
    written = edit.code(cls)
    if forward is None or "Parameter(" in written or "nn." in edit.code(forward):
        return False
    return not any(word in edit.code(forward.body) for word in _MIXING)


# ---- calls --------------------------------------------------------------------------------------


def unpacked(function: cst.FunctionDef, linears: set[str]) -> cst.FunctionDef:
    """x = self.act(self.up(x)) -> x, _ = self.up(x); x = self.act(x): linears return a pair."""

    def change(here: cst.CSTNode) -> cst.CSTNode | None:
        if not isinstance(here, cst.IndentedBlock):
            return None
        body: list[cst.BaseStatement] = []
        for node in here.body:
            body += _unpacked_statement(node, linears)
        return here.with_changes(body=body)

    return edit.replace(function, change)


def _unpacked_statement(node, linears: set[str]) -> list:
    if not isinstance(node, cst.SimpleStatementLine):
        return [node]
    calls = edit.find(node, lambda n: _linear_name(n, linears) != "")
    if not calls:
        return [node]
    pair = edit.assigned(node)
    small = edit.single(node)
    if pair is not None and isinstance(pair[0], cst.Name) and isinstance(small, cst.Assign):
        name = pair[0].value
        if any(call is pair[1] for call in calls):
            inner = [_first_of_pairs(argument, linears) for argument in pair[1].args]
            return [_paired(node, name, pair[1].with_changes(args=inner))]
        rest = edit.replace_text(pair[1], edit.code(calls[0]), name)
        others = edit.replace_text(pair[1], edit.code(calls[0]), "_")
        if len(calls) == 1 and name not in edit.names_read(others):
            after = node.with_changes(body=[small.with_changes(value=rest)], leading_lines=[])
            return [_paired(node, name, calls[0]), after]
    return [_first_of_pairs(node, linears)]


def _first_of_pairs(node, linears: set[str]):
    """up(x) inside an expression -> up(x)[0]."""
    return edit.replace(
        node,
        lambda n: (
            cst.Subscript(n, [cst.SubscriptElement(cst.Index(cst.Integer("0")))])
            if _linear_name(n, linears)
            else None
        ),
    )


def _paired(node, name: str, call: cst.CSTNode):
    made = edit.statement(f"{name}, _ = {edit.code(call)}")
    return made.with_changes(leading_lines=node.leading_lines)


def _sequences(cls: cst.ClassDef) -> cst.ClassDef:
    """nn.Sequential(linear, activation, linear): split over ranks, in place."""
    init = edit.method(cls, "__init__")
    body: list[edit.Statement] = []
    for node in edit.body_of(init):
        pair = edit.assigned_attribute(node)
        parts = (
            [a.value for a in pair[1].args]
            if pair is not None and edit.is_call(pair[1], "nn.Sequential")
            else []
        )
        acts = [p for p in parts[1:2] if edit.code(p).removeprefix("nn.")[:-2] in _ACTIVATIONS]
        if len(parts) == 3 and acts and all(edit.is_call(p, "nn.Linear") for p in parts[::2]):
            alone = "    return_bias=False,\n"
            first = linear(parts[0], "ColumnParallelLinear", f"{pair[0]}.0", alone)
            second = linear(parts[2], "RowParallelLinear", f"{pair[0]}.2", alone)
            made = edit.statement(
                f"self.{pair[0]} = nn.Sequential(\n{first},\n{edit.code(parts[1])},\n{second},\n)"
            )
            node = made.with_changes(leading_lines=node.leading_lines)
        body.append(node)
    return set_method(cls, edit.with_body(init, body))
