"""Gated delta nets: which vLLM layer has this layout of projections.

vLLM's layers read their sizes from the config by name; what differs between models is how query,
key, value, gate, beta and decay lie in the projections, and that is what is read here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from portkit.analysis.classes import ClassView, argument, call_name, text
from portkit.analysis.read_blocks import linears_of
from portkit.analysis.recurrent import RecurrentFacts, Sizes, convolution_of

if TYPE_CHECKING:
    from portkit.analysis.read import Reader

_QWEN, _SEPARATE = "QwenGatedDeltaNetAttention", "OlmoHybridGatedDeltaNetAttention"
_LAYOUTS: dict[frozenset[str], tuple[str, tuple[tuple[str, str, int | tuple[int, ...]], ...]]] = {
    frozenset({"in_proj_qkvz", "in_proj_ba", "out_proj"}): (_QWEN, ()),
    frozenset({"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"}): (
        _QWEN,
        (
            ("in_proj_qkv", "in_proj_qkvz", (0, 1, 2)),
            ("in_proj_z", "in_proj_qkvz", 3),
            ("in_proj_b", "in_proj_ba", 0),
            ("in_proj_a", "in_proj_ba", 1),
        ),
    ),
    frozenset({"q_proj", "k_proj", "v_proj", "g_proj", "a_proj", "b_proj", "o_proj"}): (
        _SEPARATE,
        (
            ("q_proj", "in_proj_qkvg", 0),
            ("k_proj", "in_proj_qkvg", 1),
            ("v_proj", "in_proj_qkvg", 2),
            ("g_proj", "in_proj_qkvg", 3),
            # One convolution in Transformers, too; three in the checkpoint.
            ("q_conv1d", "conv1d", 0),
            ("k_conv1d", "conv1d", 1),
            ("v_conv1d", "conv1d", 2),
        ),
    ),
}
"""Linears of the checkpoint -> (vLLM's layer, where it puts those that it fuses)."""
_SIZES = (
    ("num_k_heads", "config.linear_num_key_heads"),
    ("num_v_heads", "config.linear_num_value_heads"),
    ("head_k_dim", "config.linear_key_head_dim"),
    ("head_v_dim", "config.linear_value_head_dim"),
    ("conv_kernel_size", "config.linear_conv_kernel_dim"),
)

_GUARDS = (
    (
        "config.linear_num_key_heads % get_tensor_model_parallel_world_size()",
        "The heads of linear attention must be divisible by the tensor-parallel size",
    ),
)
"""vLLM's layer takes more ranks than it has key heads, and stops in its first forward."""


def read_delta_net(reader: Reader, view: ClassView) -> RecurrentFacts:
    """Facts of a gated delta net; the layout decides the layer."""
    sizes, linears = Sizes(view), linears_of(view)
    written = text(view.forward)
    found = _LAYOUTS.get(frozenset(linears))
    layer, stacked = found or ("", ())
    why = (
        _difference(sizes, written)
        if found
        else (f"vLLM has no layer with the projections {', '.join(sorted(linears))}")
    )
    arguments: list[tuple[str, str]] = [("config", "config")]
    arguments.append(("vllm_config", "get_current_vllm_config()"))
    if "in_proj_qkvz" in linears:
        if "self.num_k_heads, 2 * self.head_k_dim" not in text(view.node):
            why = why or "in_proj_qkvz is not laid out by key heads"
        arguments.append(("gqa_interleaved_layout", "True"))
    if layer == _SEPARATE and not why:
        norm = view.get("o_norm")
        if norm is None or "1e-05" not in text(norm.value):
            why = "its norm has another epsilon than vLLM's layer (1e-5)"
    elif layer == _QWEN and "allow_neg_eigval" in written:
        why = why or "it doubles beta, which vLLM's layer does not"
    if why:
        why = f"{view.name} is no gated delta net of vLLM's kind: {why}"
    return RecurrentFacts(
        view.name, view.line, "delta_net", "" if why else layer, tuple(arguments), why=why,
        sizes=_SIZES, stacked=stacked, guards=() if why else _GUARDS,
        given_shards=("conv1d",) if layer == _SEPARATE else (),
        start="QwenGatedDeltaNetAttention (layers/mamba/gdn/qwen_gdn_linear_attn.py)",
    )  # fmt: skip


def _difference(sizes: Sizes, written: str) -> str:
    """What is not as in the rule that vLLM's kernels compute; "" if nothing."""
    conv = convolution_of(sizes.view)
    if conv is None or sizes.resolved(argument(conv[1], 2, "kernel_size")) != _SIZES[-1][1]:
        return "its kernel size is not config.linear_conv_kernel_dim"
    if sizes.resolved(argument(conv[1], 7, "bias")) != "False":
        return "its convolution has a bias"
    for attr, wanted in _SIZES[:4]:
        item = sizes.view.get(attr)
        if item is None or sizes.resolved(item.value) != wanted:
            return f"its {attr} is not {wanted}"
    if "-self.A_log.float().exp() * F.softplus(" not in written or "self.dt_bias" not in written:
        return "its decay is not -exp(A_log) * softplus(a + dt_bias)"
    rules = [c for c in sizes.calls if call_name(c).endswith("gated_delta_rule")]
    if not rules or any("use_qk_l2norm_in_kernel=True" not in text(c) for c in rules):
        return "it does not norm queries and keys inside the delta rule"
    return ""
