"""Multi-head latent attention: which linears shrink a token to a latent, which expand it to heads.

Found by following what each linear reads, not by names: keys and values are latent if one linear
makes the values and a part of the keys, and reads the output of one other linear. The rest of the
key is a part of that other linear's output too, shared by all heads.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field

from portkit.analysis.classes import ClassView, argument, call_name, text
from portkit.analysis.facts import AttentionFacts, LatentFacts, Linear, NormUse

_ATTENDED = "<attention>"
"""Stands for the attention's output among the sources of a value."""


@dataclass
class _Sources:
    """Runs over statements; for each name, the nearest linears that its value comes from."""

    view: ClassView
    linears: dict[str, Linear]
    inputs: dict[str, set[str]] = field(default_factory=dict)
    """Linear -> the nearest linears (or the attention) that it reads."""
    attended: list[frozenset[str]] = field(default_factory=list)
    """Sources of query, key and value."""
    splits: dict[str, list[str]] = field(default_factory=dict)
    """Linear -> sizes into which its output is split."""
    expand: str = ""
    """The method, beside forward, that calls linears."""

    def run(self, function: ast.FunctionDef, env: dict[str, frozenset[str]]) -> frozenset[str]:
        return self._block(function.body, env)

    def _block(self, body: list[ast.stmt], env: dict[str, frozenset[str]]) -> frozenset[str]:
        result: frozenset[str] = frozenset()
        for statement in body:
            if isinstance(statement, ast.If):
                other = dict(env)
                result |= self._block(statement.body, env)
                result |= self._block(statement.orelse, other)
                for name, found in other.items():
                    env[name] = env.get(name, frozenset()) | found
            elif isinstance(statement, ast.Return) and statement.value is not None:
                result |= self.of(statement.value, env)
            elif isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
                targets = (
                    statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                )
                found = self.parts(statement.value, env)
                for target in targets:
                    self._bind(target, found, env)
            elif isinstance(statement, ast.Expr):
                self._fill(statement.value, env)
        return result

    def parts(self, node: ast.expr, env) -> tuple[frozenset[str], ...]:
        """Sources of each element where the value has elements, else of the value alone."""
        if isinstance(node, ast.Tuple):
            return tuple(self.of(e, env) for e in node.elts)
        method = self.view.methods.get(call_name(node).removeprefix("self."))
        if isinstance(node, ast.Call) and method is not None and "self." in call_name(node):
            inner = self._bound(method, node, env)
            before = set(self.inputs)
            self.run(method, inner)
            if set(self.inputs) - before:
                self.expand = method.name
            returned = [s for s in ast.walk(method) if isinstance(s, ast.Return)]
            if len(returned) == 1 and isinstance(returned[0].value, ast.Tuple):
                return tuple(self.of(e, inner) for e in returned[0].value.elts)
        rotates = isinstance(node, ast.Call) and "rotary" in call_name(node)
        if rotates:  # (q, k, cos, sin) or (positions, q, k)
            turned = [found for a in node.args if (found := self.of(a, env))]
            return tuple(turned) if len(turned) == 2 else (self.of(node, env),)
        return (self.of(node, env),)

    def of(self, node: ast.expr, env: dict[str, frozenset[str]]) -> frozenset[str]:
        if isinstance(node, ast.Name):
            return env.get(node.id, frozenset())
        if isinstance(node, ast.Attribute) and node.attr in ("shape", "device", "dtype"):
            return frozenset()
        if isinstance(node, ast.Call):
            attr = call_name(node).removeprefix("self.")
            if attr in self.linears and node.args:
                read = self.inputs.setdefault(attr, set())
                read |= self.of(node.args[0], env)
                return frozenset({attr})
            tensors = self._attention_inputs(node)
            if tensors:
                self.attended = [self.of(a, env) for a in tensors]
                return frozenset({_ATTENDED})
            self._split(node, env)
        found: frozenset[str] = frozenset()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                found |= self.of(child, env)
        return found

    def _attention_inputs(self, node: ast.Call) -> list[ast.expr]:
        """Query, key and value of attention_interface(self, q, k, v, ...) or self.attn(q, k, v)."""
        if len(node.args) >= 4 and text(node.args[0]) == "self":
            return node.args[1:4]
        made = self.view.get(call_name(node).removeprefix("self."))
        is_attention = made is not None and call_name(made.value) == "Attention"
        return node.args[:3] if is_attention and len(node.args) == 3 else []

    def _split(self, node: ast.Call, env) -> None:
        name = call_name(node)
        if not name.endswith("split"):
            return
        owned = isinstance(node.func, ast.Attribute) and text(node.func.value) != "torch"
        subject = node.func.value if owned else (node.args[0] if node.args else None)
        sizes = argument(node, 0 if owned else 1, "split_size_or_sections")
        if subject is None or not isinstance(sizes, ast.List | ast.Tuple):
            return
        for source in self.of(subject, env):
            self.splits.setdefault(source, [text(e) for e in sizes.elts])

    def _bound(self, method: ast.FunctionDef, call: ast.Call, env) -> dict[str, frozenset[str]]:
        names = [a.arg for a in method.args.args[1:]]
        bound = {n: self.of(a, env) for n, a in zip(names, call.args, strict=False)}
        return bound | {k.arg: self.of(k.value, env) for k in call.keywords if k.arg}

    def _bind(self, target: ast.expr, found: tuple[frozenset[str], ...], env) -> None:
        if isinstance(target, ast.Name):
            env[target.id] = frozenset().union(*found)
        elif isinstance(target, ast.Tuple):
            parts = found * len(target.elts) if len(found) == 1 else found
            for element, part in zip(target.elts, parts, strict=False):
                self._bind(element, (part,), env)
        elif isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name):
            name = target.value.id
            env[name] = frozenset().union(env.get(name, frozenset()), *found)

    def _fill(self, node: ast.expr, env) -> None:
        """buffer[..., a:b].copy_(x): the buffer comes from x too."""
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            target = node.func.value
            if node.func.attr == "copy_" and isinstance(target, ast.Subscript):
                self._bind(target, (self.of(node.args[0], env),), env)


def read_latent(view: ClassView, linears: dict[str, Linear]) -> LatentFacts | None:
    """Facts of a latent attention; None if keys and values are not expanded from a latent."""
    if view.forward is None:
        return None
    sources = _Sources(view, linears)
    sources.run(view.forward, {})
    if len(sources.attended) != 3:
        return None
    query, key, value = sources.attended
    if len(value) != 1 or not value < key:
        return None
    (up,) = value
    (down,) = key - value if len(key) == 2 else ("",)
    if sources.inputs.get(up) != {down} or down not in linears:
        return None
    out = [a for a, read in sources.inputs.items() if _ATTENDED in read]
    latent, cut = sources.splits.get(down, []), sources.splits.get(up, [])
    queries = [linears[a] for a in sorted(query, key=lambda a: linears[a].line) if a in linears]
    if len(out) != 1 or len(latent) != 2 or len(cut) != 2 or len(queries) != len(query):
        return None
    downs = {a for q in queries for a in sources.inputs.get(q.attr, ())}
    heads, sizes = _common_factor(view, [*queries, linears[up]])
    return LatentFacts(
        queries=tuple(queries),
        query_latents=tuple(linears[a] for a in sorted(downs)),
        kv_latent=linears[down],
        kv_heads=linears[up],
        output=linears[out[0]],
        num_heads=heads,
        head_dim=sizes[0] if sizes and len(set(sizes[:-1])) == 1 else "",
        rank=latent[0],
        shared_dim=latent[1],
        own_dim=cut[0],
        value_dim=cut[1],
        expand=sources.expand,
    )


def latent_attention(
    view: ClassView,
    latent: LatentFacts,
    norms: tuple[NormUse, ...],
    keywords: tuple[str, str, str, str],
) -> AttentionFacts:
    """Facts of an attention class with a latent; `keywords` are scale, window, cap and sinks."""
    scaling, window, cap, sinks = ("" if k == "None" else k for k in keywords)
    return AttentionFacts(
        cls=view.name,
        line=view.line,
        q=None,
        k=None,
        v=None,
        o=latent.output,
        qkv=None,
        num_heads=latent.num_heads,
        num_kv_heads=latent.num_heads,
        head_dim=latent.head_dim,
        scaling=scaling,
        sliding_window=window,
        soft_cap=cap,
        norms=norms,
        per_head_norm=None,
        sinks=sinks,
        latent=latent,
    )


def _common_factor(view: ClassView, linears: list[Linear]) -> tuple[str, list[str]]:
    """(n, the rest of each) where every linear is n * rest wide, as written; "" if none is."""
    factors = []
    for linear in linears:
        item = next(a for a in view.assigned if a.line == linear.line and a.attr == linear.attr)
        size = argument(item.value, 1, "out_features")
        if not isinstance(size, ast.BinOp) or not isinstance(size.op, ast.Mult):
            return "", []
        factors.append((text(size.left), text(size.right)))
    for heads in factors[0]:
        if all(heads in pair for pair in factors):
            return heads, [b if a == heads else a for a, b in factors]
    return "", []
