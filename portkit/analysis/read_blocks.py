"""Facts of attention classes, and of the linears of any class."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

from portkit.analysis.attention_parts import output_path
from portkit.analysis.classes import Assigned, ClassView, argument, call_name, text
from portkit.analysis.facts import AttentionFacts, Linear, NormUse
from portkit.analysis.fused_qkv import FusedQkv, fused_qkv_of
from portkit.analysis.latent import latent_attention, read_latent
from portkit.analysis.symbolic import CannotTell

if TYPE_CHECKING:
    from portkit.analysis.read import Reader

_LINEAR_ARGUMENTS = {
    "Linear": ("in_features", "out_features", 2, "True"),
    "ColumnParallelLinear": ("input_size", "output_size", 2, "True"),
    "RowParallelLinear": ("input_size", "output_size", 2, "True"),
    "ReplicatedLinear": ("input_size", "output_size", 2, "True"),
    "MergedColumnParallelLinear": ("input_size", "output_sizes", 2, "True"),
    "QKVParallelLinear": ("hidden_size", "head_size", 4, "True"),
}


def linear_of(view: ClassView, item: Assigned) -> Linear | None:
    name = call_name(item.value)
    known = _LINEAR_ARGUMENTS.get(name.rsplit(".", 1)[-1])
    if known is None or not isinstance(item.value, ast.Call):
        return None
    first, second, bias_position, default = known
    shown = [argument(item.value, 0, first), argument(item.value, 1, second)]
    sizes = [
        text(view.resolve(e)).replace("self.config.", "config.") if e is not None else ""
        for e in shown
    ]
    bias = argument(item.value, bias_position, "bias")
    return Linear(
        item.attr, name, sizes[0], sizes[1], text(bias) if bias is not None else default, item.line
    )


def linears_of(view: ClassView) -> dict[str, Linear]:
    """Linear layers of a class by attribute."""
    found = {item.attr: linear_of(view, item) for item in view.assigned}
    return {attr: linear for attr, linear in found.items() if linear is not None}


def is_attention(view: ClassView) -> bool:
    """Has an attention call (Transformers' interface, vLLM's Attention, or its own softmax)."""
    if view.forward is None or view.init is None or not linears_of(view):
        return False
    written = text(view.node)
    if "attention_interface" in written or "ALL_ATTENTION_FUNCTIONS" in written:
        return True
    if any(call_name(item.value) == "Attention" for item in view.assigned):
        return True
    return "softmax(" in written and "matmul" in written


def attention_call(view: ClassView) -> ast.Call | None:
    """The call that attends: attention_interface(self, q, k, v, ...) or self.attn(q, k, v)."""
    if view.forward is None:
        return None
    for node in ast.walk(view.forward):
        if (
            isinstance(node, ast.Call)
            and node.args
            and text(node.args[0]) == "self"
            and len(node.args) >= 4
        ):
            return node
    for item in view.assigned:
        if call_name(item.value) == "Attention":
            return next(
                (n for n in ast.walk(view.forward) if call_name(n) == f"self.{item.attr}"), None
            )
    return None


def read_attention(reader: Reader, view: ClassView) -> AttentionFacts:
    """Facts of the attention class in any state; what is missing is reported as unknown."""
    linears = linears_of(view)
    flows = _flows(view, set(linears))
    call = attention_call(view)
    if call is None:
        reader.cannot_tell(
            "attention",
            f"{view.name}.forward has no attention_interface(self, q, k, v, ...) call",
            view.forward.lineno if view.forward else view.line,
        )
    inputs = [a for a in call.args if text(a) != "self"][:3] if call else []
    role = {}
    for name, node in zip("qkv", inputs, strict=False):
        sources = {
            s for n in ast.walk(node) if isinstance(n, ast.Name) for s in flows.get(n.id, ())
        }
        role[name] = next(iter(sources), None) if len(sources) == 1 else None
    fused = role.get("q") is not None and role.get("q") == role.get("k") == role.get("v")
    every_norm = tuple(reader.norms_of(view))
    after = output_path(view, call, set(linears), {n.attr for n in every_norm})
    output = _output_linear(view, linears, set(role.values()), after.linears)
    attention = next((i.value for i in view.assigned if call_name(i.value) == "Attention"), None)
    heads = kv_heads = ""
    if attention is not None:
        heads = text(argument(attention, 0, "num_heads"))
        kv_heads = text(argument(attention, 3, "num_kv_heads")) or heads
        head_dim = text(argument(attention, 1, "head_size"))
        scaling = text(argument(attention, 2, "scale"))
        window = text(argument(attention, 9, "per_layer_sliding_window"))
        cap = text(argument(attention, 8, "logits_soft_cap"))
        sinks = text(argument(attention, 99, "sinks"))
    else:
        head_dim = "self.head_dim" if view.get("head_dim") else ""
        keywords = {k.arg: text(k.value) for k in call.keywords if k.arg} if call else {}
        scaling, window, cap, sinks = (
            keywords.get(n, "") for n in ("scaling", "sliding_window", "softcap", "s_aux")
        )
    q, k, v = (linears.get(role.get(n) or "") for n in "qkv")
    layout = _layout(reader, view, q, inputs) if fused else None
    if attention is None and layout is not None:
        heads, kv_heads = (_resolved(view, n) for n in (layout.num_heads, layout.num_kv_heads))
        head_dim = layout.head_dim
    resolved_dim = text(view.resolve(ast.parse(head_dim, mode="eval").body)) if head_dim else ""
    resolved_dim = resolved_dim.replace("self.config.", "config.")
    if attention is None and not fused:
        heads, kv_heads = (_heads(linear, resolved_dim) for linear in (q, k))
    latent = read_latent(view, linears)
    if latent is not None:
        return latent_attention(view, latent, every_norm, (scaling, window, cap, sinks))
    norms = tuple(n for n in every_norm if n.attr not in after.norms)
    per_head = None
    if norms:
        per_head = all(
            n.size.replace("self.config.", "config.") in (resolved_dim, head_dim)
            or _is_split(view, n)
            for n in norms
        )
    return AttentionFacts(
        cls=view.name,
        line=view.line,
        q=None if fused else q,
        k=None if fused else k,
        v=None if fused else v,
        o=linears.get(output),
        qkv=q if fused else None,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        scaling=scaling,
        sliding_window="" if window == "None" else window,
        soft_cap="" if cap == "None" else cap,
        norms=norms,
        per_head_norm=per_head,
        output_norms=tuple(n for n in every_norm if n.attr in after.norms),
        gates=tuple(v for a, v in linears.items() if a not in {*role.values(), output}),
        sinks="" if sinks == "None" else sinks,
        value_dim="" if fused else _value_dim(view, v, kv_heads, resolved_dim),
        query_parts=(head_factors(q, resolved_dim) or ("", 1))[1],
        fused=layout,
    )


def _layout(
    reader: Reader, view: ClassView, linear: Linear | None, inputs: list[ast.expr]
) -> FusedQkv | None:
    """How the fused projection is cut, if that can be followed."""
    names = tuple(text(node) for node in inputs)
    if linear is None or len(names) != 3 or linear.cls == "QKVParallelLinear":
        return None
    try:
        return fused_qkv_of(view, linear, names)
    except CannotTell as unknown:
        reader.cannot_tell("attention", unknown.what, unknown.line or view.line)
        return None


def _is_split(view: ClassView, norm: NormUse) -> bool:
    """Is the norm given heads of their own? Flat tokens are split into heads in its call."""
    calls = [n for n in ast.walk(view.forward) if call_name(n) == f"self.{norm.attr}"]
    split = bool(calls) and all("unflatten" in text(n) for n in calls if isinstance(n, ast.Call))
    names = [a.arg for a in view.forward.args.args]
    return split or (not norm.size and "positions" not in names)


def _resolved(view: ClassView, expression: str) -> str:
    resolved = text(view.resolve(ast.parse(expression, mode="eval").body))
    return resolved.replace("self.config.", "config.")


def _flows(view: ClassView, linears: set[str]) -> dict[str, frozenset[str]]:
    """Local name in forward -> attributes of the linears whose outputs reach it."""
    flows: dict[str, frozenset[str]] = {}

    def sources(node: ast.expr | ast.comprehension) -> frozenset[str]:
        if isinstance(node, ast.Call) and call_name(node).removeprefix("self.") in linears:
            return frozenset({call_name(node).removeprefix("self.")})
        if isinstance(node, ast.Name):
            return flows.get(node.id, frozenset())
        if isinstance(node, ast.Attribute) and node.attr in ("dtype", "device", "shape"):
            return frozenset()  # of a tensor, but none of its numbers
        return frozenset(
            s
            for child in ast.iter_child_nodes(node)
            if isinstance(child, ast.expr | ast.comprehension)
            for s in sources(child)
        )

    def rotates(value: ast.expr, targets: list[ast.expr]) -> bool:
        return isinstance(value, ast.Call) and len(targets) == 2 and len(value.args) >= 2

    for statement in _ordered(view.forward):
        if not isinstance(statement, ast.Assign | ast.AnnAssign) or statement.value is None:
            continue
        target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
        if any(
            isinstance(n, ast.Call) and n.args and text(n.args[0]) == "self"
            for n in ast.walk(statement.value)
        ):
            break
        if isinstance(target, ast.Name):
            flows[target.id] = sources(statement.value)
        elif isinstance(target, ast.Tuple):
            value = statement.value
            if isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts):
                parts = [sources(e) for e in value.elts]
            elif call_name(value).startswith("self.rotary") and len(value.args) == 2:
                parts = [frozenset()] * len(target.elts)  # angles: of the tensor only its dtype
            elif rotates(value, target.elts):
                tensors = [a for a in value.args if sources(a)]
                parts = [sources(a) for a in tensors] if len(tensors) == 2 else [sources(value)] * 2
            else:
                parts = [sources(value)] * len(target.elts)
            for element, part in zip(target.elts, parts, strict=False):
                if isinstance(element, ast.Name):
                    flows[element.id] = part
    return flows


def _ordered(function: ast.FunctionDef | None) -> list[ast.stmt]:
    if function is None:
        return []
    found = [n for n in ast.walk(function) if isinstance(n, ast.stmt) and n is not function]
    return sorted(found, key=lambda n: n.lineno)


def _output_linear(
    view: ClassView, linears: dict[str, Linear], inputs: set[str | None], after: tuple[str, ...]
) -> str:
    """The linear that attention's output goes through, or the only one that is none of q, k, v."""
    if len(after) == 1:
        return after[0]
    called = [
        call_name(n).removeprefix("self.")
        for n in ast.walk(view.forward)
        if isinstance(n, ast.Call)
    ]
    rest = [attr for attr in linears if attr in called and attr not in inputs]
    return rest[0] if len(rest) == 1 else ""


def _heads(linear: Linear | None, head_dim: str) -> str:
    """The factor of out_features beside the head dimension (and beside parts of each head)."""
    parts = head_factors(linear, head_dim)
    return parts[0] if parts else ""


def _value_dim(view: ClassView, linear: Linear | None, kv_heads: str, head_dim: str) -> str:
    """What the value projection has beside the key/value heads, if that is not the head's size."""
    if linear is None or not kv_heads or head_factors(linear, head_dim) is not None:
        return ""
    found = head_factors(linear, _resolved(view, kv_heads))
    return found[0] if found is not None and found[1] == 1 else ""


def head_factors(linear: Linear | None, head_dim: str) -> tuple[str, int] | None:
    """(heads, parts) of a linear that is heads * head_dim * parts wide: 2 for a gate in each head.

    None if its width is no such product.
    """
    if linear is None:
        return None
    width, count = quotient(head_dim)
    if count and linear.out_features == width:
        return count, 1
    factors = _factors(ast.parse(linear.out_features or "None", mode="eval").body, head_dim)
    if head_dim not in factors:
        return None
    factors.remove(head_dim)
    parts = [f for f in factors if f == "2"]
    heads = [f for f in factors if f != "2"]
    if len(heads) != 1 or len(parts) > 1:
        return None
    return heads[0], 2 if parts else 1


def quotient(head_dim: str) -> tuple[str, str]:
    """(width, heads) of a head dimension that is `width // heads` or `int(width / heads)`."""
    node = ast.parse(head_dim or "None", mode="eval").body
    if isinstance(node, ast.Call) and call_name(node) == "int" and len(node.args) == 1:
        node = node.args[0]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.FloorDiv | ast.Div):
        return text(node.left), text(node.right)
    return "", ""


def _factors(node: ast.expr, whole: str) -> list[str]:
    """Factors of a product, as source; `whole` is not taken apart."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) and text(node) != whole:
        return [*_factors(node.left, whole), *_factors(node.right, whole)]
    return [text(node)]
