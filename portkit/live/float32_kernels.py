"""The gated delta rule in float32, where vLLM's way to its kernels takes half precision alone.

Checks compare in float32, so that a difference means a bug. On a GPU vLLM's Triton kernels for
prompts compute in what they are given; an assertion in front of them refuses float32
(third_party/flash_linear_attention/ops/chunk.py), and portkit calls them behind it. vLLM's CPU
kernels are written for bfloat16 alone: other dtypes are computed there token by token, by the rule
itself (Yang, Kautz, Hatamizadeh: Gated Delta Networks, 2024, equation 10), and everything around it
is vLLM's. In the dtype that users run nothing is changed: step prove runs it (`half_precision`).
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from vllm import _custom_ops
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.gdn.base import GatedDeltaNetAttention
from vllm.utils.torch_utils import LayerNameType, _resolve_layer_name

CHUNK = "vllm.third_party.flash_linear_attention.ops.chunk"
CPU_LAYER = "vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn"
CPU_CORE = "vllm.model_executor.layers.mamba.ops.cpu.gdn_attention"
EPS = 1e-6
"""Of the norm of queries and keys: the l2norm of vLLM's Triton kernels, and Transformers'."""
OPENED = {
    "cpu": "gated delta rule by its definition, since vLLM's CPU kernels take bfloat16 only",
    "cuda": "gated delta rule by vLLM's Triton kernels, past an assertion that refuses float32",
}


def allow_float32(device: str, dtype: str) -> dict[str, Any]:
    """Open vLLM's gated delta nets to float32 in this process; return options for vllm.LLM.

    Call it before the first engine of the process, which registers vLLM's operators, and after the
    port's module was imported.
    """
    if device == "cpu":
        if CPU_LAYER in sys.modules:
            _open_cpu_core()
        return {}
    if CHUNK not in sys.modules:
        return {}
    _open_chunks()
    # FlashInfer's kernel, vLLM's choice on Hopper, takes half precision only; "auto": as users run.
    return {} if dtype == "auto" else {"additional_config": {"gdn_prefill_backend": "triton"}}


def what_is_opened(model: nn.Module, device: str) -> str:
    """Say how the model's gated delta nets are computed in float32; "" if it has none."""
    has = any(isinstance(module, GatedDeltaNetAttention) for module in model.modules())
    return OPENED[device] if has else ""


def _open_chunks() -> None:
    chunk = importlib.import_module(CHUNK)
    refusing = chunk.chunk_gated_delta_rule
    if refusing.__module__ == __name__:
        return
    _one_config_each()

    def chunk_gated_delta_rule(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        scale: float | None = None,
        initial_state: torch.Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: torch.Tensor | None = None,
        chunk_indices: torch.Tensor | None = None,
        chunk_offsets: torch.Tensor | None = None,
        use_qk_l2norm_in_kernel: bool = False,
        core_attn_out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        call = chunk.ChunkGatedDeltaRuleFunction.apply
        if q.dtype != torch.float32:
            call = refusing
        elif scale is None:
            scale = k.shape[-1] ** -0.5
        return call(
            *(q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens),
            *(chunk_indices, chunk_offsets, use_qk_l2norm_in_kernel, core_attn_out),
        )

    # Layers hold the function under names of their own, the port's file may too.
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType):
            for name in [n for n, value in vars(module).items() if value is refusing]:
                setattr(module, name, chunk_gated_delta_rule)


def _one_config_each() -> None:
    """Leave the autotuner one way to compile each kernel.

    Exact float32 products use no tensor cores and are unrolled: compiling some forty variants of
    each kernel to see which is fastest takes minutes, and checks do not measure speed. Small blocks
    and many warps compile soonest.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith(CHUNK.rpartition(".")[0]):
            for kernel in list(vars(module).values()):
                while hasattr(kernel, "fn"):  # heuristics around the autotuner, or the other way
                    if isinstance(configs := getattr(kernel, "configs", None), list):
                        kernel.configs = [min(configs, key=_soonest)]
                    kernel = kernel.fn


def _soonest(config: Any) -> tuple[int, int, int]:
    return sum(config.kwargs.values()), -config.num_warps, config.num_stages


def _open_cpu_core() -> None:
    core = importlib.import_module(CPU_CORE)
    refusing = core.cpu_gdn_attention_core
    if refusing.__module__ == __name__:
        return

    def cpu_gdn_attention_core(
        mixed_qkv: torch.Tensor,
        b: torch.Tensor,
        a: torch.Tensor,
        core_attn_out: torch.Tensor,
        layer_name: LayerNameType,
    ) -> None:
        if mixed_qkv.dtype == torch.bfloat16:
            refusing(mixed_qkv, b, a, core_attn_out, layer_name)
            return
        context = get_forward_context()
        layer = context.no_compile_layers[_resolve_layer_name(layer_name)]
        metadata = context.attn_metadata
        if metadata is None or metadata[layer.prefix].num_actual_tokens == 0:
            return
        with (
            # The convolution in C++ takes bfloat16 only; vLLM has it in torch for other processors.
            mock.patch.object(torch.cpu, "_is_avx512_bf16_supported", return_value=False),
            mock.patch.object(core, "is_arm_bf16", return_value=False),
            mock.patch.multiple(
                _custom_ops,
                fused_gdn_gating_cpu=_gating,
                chunk_gated_delta_rule_cpu=_prompts,
                fused_sigmoid_gating_delta_rule_update_cpu=_one_token,
            ),
        ):
            core._cpu_gdn_attention_nonspec(
                layer, metadata[layer.prefix], mixed_qkv, b, a, core_attn_out
            )

    # vLLM registers it as an operator when it makes the first layer.
    core.cpu_gdn_attention_core = cpu_gdn_attention_core


def _gating(
    A_log: torch.Tensor, a: torch.Tensor, b: torch.Tensor, dt_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return g, the decay's logarithm, and beta: float32 [1, tokens, value heads]."""
    g = -A_log.float().exp() * F.softplus(a.float() + dt_bias.float())
    return g[None], b.float().sigmoid()[None]


def _prompts(
    *,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor,
    cu_seqlens: torch.Tensor,
    initial_state_indices: torch.Tensor,
    use_qk_l2norm_in_kernel: bool,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As vLLM's chunk_gated_delta_rule_cpu: [1, tokens, heads, head size]."""
    out = torch.empty_like(value)
    marks = cu_seqlens.tolist()
    for slot, start, end in zip(initial_state_indices.tolist(), marks, marks[1:], strict=False):
        rows = slice(start, end)
        out[0, rows] = _rule(
            *(query[0, rows], key[0, rows], value[0, rows], g[0, rows], beta[0, rows]),
            initial_state[slot],
            use_qk_l2norm_in_kernel,
        )
    return out, initial_state


def _one_token(
    *,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    initial_state_source: torch.Tensor,
    initial_state_indices: torch.Tensor,
    cu_seqlens: torch.Tensor,
    use_qk_l2norm_in_kernel: bool,
) -> torch.Tensor:
    """As vLLM's fused_sigmoid_gating_delta_rule_update_cpu: [requests, 1, heads, head size]."""
    g, beta = _gating(A_log, a, b, dt_bias)
    out, _ = _prompts(
        query=q,
        key=k,
        value=v,
        g=g,
        beta=beta,
        initial_state=initial_state_source,
        cu_seqlens=cu_seqlens,
        initial_state_indices=initial_state_indices,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
    )
    return out.transpose(0, 1)


def _rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    normed: bool,
) -> torch.Tensor:
    """Return [tokens, value heads, value size]; `state`, [value heads, key size, value size], moves
    on in place. `g` and `beta`: [tokens, value heads]."""
    q, k, v, now = q.float(), k.float(), v.float(), state.float()
    if normed:
        q, k = (t * torch.rsqrt(t.square().sum(-1, keepdim=True) + EPS) for t in (q, k))
    times = v.shape[1] // q.shape[1]
    q, k = (t.repeat_interleave(times, dim=1) for t in (q * q.shape[-1] ** -0.5, k))
    out = torch.empty_like(v)
    for token in range(len(v)):
        now = now * g[token].exp()[:, None, None]
        known = torch.einsum("hkv,hk->hv", now, k[token])
        change = (v[token] - known) * beta[token][:, None]
        now = now + k[token][:, :, None] * change[:, None, :]
        out[token] = torch.einsum("hkv,hk->hv", now, q[token])
    state.copy_(now)
    return out
