"""Facts of recurrent parts: mixers that carry a state from token to token instead of a KV cache.

A mixer is recognised by what it holds and computes (a depthwise convolution, decay parameters, how
its projection is split), never by its name. Each becomes either the arguments of the vLLM layer
that computes the same, or a reason why none does, with the class a port would start from.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from portkit.analysis.classes import ClassView, argument, call_name, text

if TYPE_CHECKING:
    from portkit.analysis.read import Reader

Kind = Literal[
    "mamba", "mamba2", "short_conv", "delta_net", "linear_attention", "rg_lru", "rwkv", "mlstm",
    "convolution",
]  # fmt: skip
VLLM_LAYERS: dict[str, Kind] = {
    "MambaMixer": "mamba",
    "MambaMixer2": "mamba2",
    "ShortConv": "short_conv",
    "QwenGatedDeltaNetAttention": "delta_net",
    "OlmoHybridGatedDeltaNetAttention": "delta_net",
    "MiniMaxText01LinearAttention": "linear_attention",
}
"""Layers of vLLM that keep such a state: what a port's decoder layer holds after the draft."""


@dataclass(frozen=True)
class RecurrentFacts:
    """One mixer class."""

    cls: str
    line: int
    kind: Kind
    layer: str
    """vLLM's class that computes it; "" if it has none (then `why` says why)."""
    arguments: tuple[tuple[str, str], ...] = ()
    """(name, source text over `config`) for vLLM's class."""
    renames: tuple[tuple[str, str], ...] = ()
    """(name of a parameter or submodule in the checkpoint, name in vLLM's class)."""
    guards: tuple[tuple[str, str], ...] = ()
    """(condition over `config` that must not hold, what the layer would get wrong if it did)."""
    whole_norm: str = ""
    """Epsilon of a gated norm over all channels, where vLLM's layer would norm each group."""
    in_scale: str = ""
    """Factor on the mixer's input, resolved; "" if none."""
    channel_scale: tuple[str, str] | None = None
    """(buffer, source text of its value) of a factor on each channel of the input projection."""
    sizes: tuple[tuple[str, str], ...] = ()
    """(name, source text) of sizes that vLLM's class reads from the config by itself."""
    stacked: tuple[tuple[str, str, int | tuple[int, ...]], ...] = ()
    """(linear in the checkpoint, linear of vLLM's class that holds it, its place there)."""
    norm_eps: str = ""
    """Epsilon of the layer's norm where it is not vLLM's."""
    decay: tuple[str, ...] = ()
    """Statements over config and layer_idx; the last is the slope of each head's decay."""
    dropped: tuple[str, ...] = ()
    """Tensors of the checkpoint that follow from the config."""
    given_shards: tuple[str, ...] = ()
    """Submodules whose loader in vLLM wants the place as an argument, not on the tensor."""
    note: str = ""
    """What vLLM's layer computes otherwise that the reader should know."""
    why: str = ""
    start: str = ""
    """The vLLM class a person would start from when the draft cannot."""


PLAIN: dict[Kind, tuple[str, str]] = {
    "mamba": (
        "Mamba (selective scan)",
        "vLLM's MambaMixer; its scan needs a GPU. The state is cached instead of keys and values.",
    ),
    "mamba2": (
        "Mamba 2 (state space, heads in groups)",
        "vLLM's MambaMixer2. It norms each group of channels: see what the original does.",
    ),
    "short_conv": ("short convolution", "vLLM's ShortConv keeps the last tokens as its state."),
    "delta_net": (
        "gated delta net (linear attention)",
        "vLLM has one layer per layout of its projections: the wrong layout loads without error.",
    ),
    "linear_attention": (
        "linear attention with decay",
        "vLLM's layer has to decay each head as the original does.",
    ),
    "rg_lru": ("gated linear recurrence (RG-LRU)", "vLLM has no such layer."),
    "rwkv": ("RWKV time mixing", "vLLM has no such layer."),
    "mlstm": ("matrix-memory LSTM (mLSTM)", "vLLM has no such layer."),
    "convolution": (
        "convolution over earlier tokens",
        "Its last inputs are a state that vLLM's Attention does not keep.",
    ),
}
"""What each kind is called, and what a port has to know about it."""


def parameters_of(view: ClassView) -> dict[str, ast.Call]:
    """Attributes that are parameters (or buffers) of their own."""
    found = {}
    for item in view.assigned:
        if call_name(item.value).rsplit(".", 1)[-1] in ("Parameter", "Buffer"):
            found[item.attr] = item.value
    return found


def convolution_of(view: ClassView) -> tuple[str, ast.Call] | None:
    """The depthwise convolution over time: nn.Conv1d with as many groups as channels."""
    for item in view.assigned:
        if call_name(item.value) in ("nn.Conv1d", "torch.nn.Conv1d"):
            assert isinstance(item.value, ast.Call)
            return item.attr, item.value
    return None


def kind_of(view: ClassView) -> Kind | None:
    """Which recurrence a class computes, from the parameters it holds; None if it keeps none."""
    if view.forward is None or view.init is None:
        return None
    held = set(parameters_of(view)) | set(_registered(view))
    attrs = {item.attr for item in view.assigned}
    conv = convolution_of(view)
    if "A_log" in held and conv is not None:
        if {"in_proj", "x_proj", "dt_proj"} <= attrs or "x_proj_weight" in held:
            return "mamba"
        return "mamba2" if "D" in held else "delta_net"
    if "A_log" in held:
        return "delta_net"
    if held & {"time_decay", "time_first"}:
        return "rwkv"
    if "recurrent_param" in held or any("lru" in a for a in attrs):
        return "rg_lru"
    if {"igate_preact", "fgate_preact"} <= attrs or {"igate", "fgate"} <= attrs:
        return "mlstm"
    if "slope_rate" in held | attrs:
        return "linear_attention"
    if conv is not None:
        from portkit.analysis.recurrent_short_conv import gates_of

        return "short_conv" if gates_of(view) is not None else "convolution"
    return None


def _registered(view: ClassView) -> list[str]:
    """Names given to register_buffer and register_parameter."""
    return [
        str(node.args[0].value)
        for node in ast.walk(view.node)
        if isinstance(node, ast.Call)
        and call_name(node) in ("self.register_buffer", "self.register_parameter")
        and node.args
        and isinstance(node.args[0], ast.Constant)
    ]


def is_recurrent(view: ClassView) -> bool:
    return kind_of(view) is not None


def read_recurrent(reader: Reader, view: ClassView) -> RecurrentFacts:
    """Facts of a mixer class; what is missing for a draft is reported as unknown, with its line."""
    from portkit.analysis.recurrent_delta import read_delta_net
    from portkit.analysis.recurrent_linear import read_linear_attention
    from portkit.analysis.recurrent_mamba import read_mamba, read_mamba2
    from portkit.analysis.recurrent_short_conv import read_short_conv

    kind = kind_of(view)
    assert kind is not None
    reading = {
        "mamba": read_mamba,
        "mamba2": read_mamba2,
        "short_conv": read_short_conv,
        "delta_net": read_delta_net,
        "linear_attention": read_linear_attention,
    }.get(kind)
    facts = reading(reader, view) if reading else without_draft(view, kind)
    if facts.why:
        reader.cannot_tell("recurrent", facts.why, facts.line)
    return facts


_START: dict[Kind, str] = {
    "rg_lru": "MambaMixer: a subclass of MambaBase with a scan of its own",
    "rwkv": "MambaBase (layers/mamba/abstract.py)",
    "mlstm": "MambaBase (layers/mamba/abstract.py)",
    "convolution": "ShortConv (layers/mamba/short_conv.py)",
}


def without_draft(view: ClassView, kind: Kind) -> RecurrentFacts:
    """A mixer of a kind that no draft knows: what it is, and where a person would start."""
    name = PLAIN[kind][0]
    have = (
        "vLLM has no such layer" if kind in ("rwkv", "rg_lru", "mlstm") else "no draft for it yet"
    )
    return RecurrentFacts(
        view.name, view.line, kind, "", why=f"{view.name} is {name}: {have}", start=_START[kind]
    )


class Sizes:
    """Resolved source text of a mixer's sizes, and the places in forward that use them."""

    def __init__(self, view: ClassView) -> None:
        self.view = view
        assert view.forward is not None
        self.calls = [n for n in ast.walk(view.forward) if isinstance(n, ast.Call)]

    def resolved(self, node: ast.expr | None) -> str:
        if node is None:
            return ""
        return text(self.view.resolve(node)).replace("self.config.", "config.")

    def splits(self) -> list[tuple[list[str], list[ast.expr]]]:
        """(names, sizes) of each `a, b = x.split([..])` or `torch.split(x, [..])`, in order."""
        found = []
        for node in ast.walk(self.view.forward):
            if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple)):
                continue
            call = node.value
            if not isinstance(call, ast.Call):
                continue
            if call_name(call) == "torch.split":
                sizes = argument(call, 1, "split_size_or_sections")
            elif isinstance(call.func, ast.Attribute) and call.func.attr == "split":
                sizes = argument(call, 0, "split_size")
            else:
                continue
            if isinstance(sizes, ast.List):
                names = [text(e) for e in node.targets[0].elts]
                found.append((node.lineno, names, sizes.elts))
        return [(names, sizes) for _, names, sizes in sorted(found, key=lambda f: f[0])]

    def called(self, attr: str) -> list[ast.Call]:
        return [c for c in self.calls if call_name(c) == f"self.{attr}"]
