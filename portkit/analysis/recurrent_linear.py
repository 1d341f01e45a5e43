"""Linear attention with decay ("lightning attention"): state = exp(-slope) * state + k^T v.

vLLM's layer reads its sizes from the config; its slopes and its norm's epsilon are its own, so the
original's are read here and put in their place.
"""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

from portkit.analysis.classes import ClassView, argument, call_name, text
from portkit.analysis.read_blocks import linears_of
from portkit.analysis.recurrent import RecurrentFacts, Sizes

if TYPE_CHECKING:
    from portkit.analysis.read import Reader

_EPS = "1e-05"
"""What vLLM's layer norms with."""


def read_linear_attention(reader: Reader, view: ClassView) -> RecurrentFacts:
    """Facts of a linear attention whose heads decay at rates of their own."""
    sizes = Sizes(view)
    norm, eps = _norm(reader, view)
    decay = _decay(view)
    activation = _activation(sizes)
    why = _difference(view, norm, activation, decay)
    if why:
        why = f"{view.name} is no linear attention of vLLM's kind: {why}"
    head_dim = view.get("head_dim")
    heads = view.get("num_attention_heads") or view.get("num_heads")
    guards = ()
    if activation.startswith("config."):
        guards = ((f'{activation} != "silu"', "vLLM's linear attention has silu"),)
    return RecurrentFacts(
        view.name,
        view.line,
        "linear_attention",
        "" if why else "MiniMaxText01LinearAttention",
        (("config", "config"), ("vllm_config", "get_current_vllm_config()")),
        guards=guards,
        norm_eps="" if eps == _EPS else eps,
        decay=decay,
        dropped=_buffers(view),
        sizes=(
            ("num_heads", sizes.resolved(heads.value) if heads else ""),
            ("head_dim", sizes.resolved(head_dim.value) if head_dim else ""),
        ),
        why=why,
        start="MiniMaxText01LinearAttention (layers/mamba/linear/minimax_linear_attn.py)",
    )


def _difference(view: ClassView, norm: str, activation: str, decay: tuple[str, ...]) -> str:
    """What is not as in vLLM's layer; "" if nothing."""
    linears, written = linears_of(view), text(view.forward)
    if set(linears) != {"qkv_proj", "output_gate", "out_proj"}:
        return f"its linears are {', '.join(sorted(linears))}"
    if any(linear.bias != "False" for linear in linears.values()):
        return "its linears have biases"
    if "3 * self.head_dim" not in written:
        return "query, key and value do not lie together in each head"
    if activation != "'silu'" and not activation.startswith("config."):
        return "it has no activation on query, key and value"
    if norm != "rms":
        return "there is no RMSNorm over all heads before the gate"
    if "sigmoid(self.output_gate(" not in written:
        return "its gate is no sigmoid"
    if "torch.exp(-self.slope_rate" not in written or not decay:
        return "its state does not decay by exp(-slope_rate)"
    return ""


def _activation(sizes: Sizes) -> str:
    """Name of the activation on what qkv_proj returns, as source over the config."""
    for call in sizes.calls:
        if call.args and call_name(call.args[0]) == "self.qkv_proj":
            item = sizes.view.get(call_name(call).removeprefix("self."))
            if item is not None and isinstance(item.value, ast.Subscript):
                return sizes.resolved(item.value.slice)
    return ""


def _norm(reader: Reader, view: ClassView) -> tuple[str, str]:
    """(formula, epsilon) of the norm between state and gate."""
    item = view.get("norm")
    if item is None or "self.norm(" not in text(view.forward):
        return "", ""
    made = next((n for n in reader.norms if n.name == call_name(item.value)), None)
    if made is None:
        return "", ""
    given = next((k.value for k in item.value.keywords if k.arg and "eps" in k.arg), None)
    eps = given or argument(item.value, 1, "eps")
    return made.formula, text(view.resolve(eps)) if eps is not None else made.default_eps


def _decay(view: ClassView) -> tuple[str, ...]:
    """Statements that make the slope of each head from config and layer_idx; the last is a value.

    In float32 whatever the default is: a slope in half precision decays at another rate.
    """
    item = view.get("slope_rate")
    value = item.value.args[0] if item is not None and isinstance(item.value, ast.Call) else None
    made = view.local.get(text(value), value)
    method = view.methods.get(call_name(made).removeprefix("self."))
    if method is None:
        return ()
    own = {a.arg for a in method.args.args}
    lines = []
    for node in method.body:
        if not isinstance(node, ast.Assign | ast.Return) or node.value is None:
            return ()
        resolved = view.resolve(node.value)
        for call in (n for n in ast.walk(resolved) if isinstance(n, ast.Call)):
            for keyword in call.keywords:
                if keyword.arg == "device" and text(keyword.value) in own:
                    keyword.arg = "dtype"
                    keyword.value = ast.parse("torch.float32", mode="eval").body
        shown = text(resolved).replace("self.config.", "config.")
        target = f"{text(node.targets[0])} = " if isinstance(node, ast.Assign) else ""
        lines.append(target + shown)
    return tuple(lines)


def _buffers(view: ClassView) -> tuple[str, ...]:
    """Buffers that the checkpoint holds although they follow from the config."""
    return tuple(
        i.attr
        for i in view.assigned
        if call_name(i.value).endswith("Buffer")
        and text(argument(i.value, 1, "persistent")) != "False"
    )
