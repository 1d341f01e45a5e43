"""Everything that differs between devices, each with its reason: tolerances and engine options."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Tolerance:
    """How far two numbers may lie apart, and why that far."""

    value: float
    reason: str


TIMES_NOISE = 20
MOST = 0.1
"""A model that rounding moves further than this cannot be compared."""
SMALLEST = 2e-4
"""Ten times what correct ports of the smallest models differ by."""


@dataclass(frozen=True)
class Profile:
    """The settings of the live checks on one kind of device."""

    device: str
    """"cpu" or "cuda"."""
    logprobs: Tolerance
    """vLLM against Transformers, natural logarithms of probabilities, float32, whole vocabulary."""
    itself: Tolerance
    """vLLM against vLLM with another batch."""
    module: Tolerance
    """One module's output against its counterpart's, relative to the largest value there."""
    far: int
    """The longest prompt that checks use, in tokens."""
    seen: int = 5
    """By up to how many times a model's noise correct ports were seen to differ."""
    scanned: int = 5
    """The same for models with gated delta nets, or whose Mamba 2 layers call the chunked scan."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of vllm.LLM."""

    def measured(self, noise: float) -> Tolerance:
        """Return the tolerance of log-probabilities for a model whose own rounding is `noise`.

        Small models whose rounding is small deserve a small tolerance: a wrong form of gelu changes
        less than the usual one allows.
        """
        value = max(SMALLEST, TIMES_NOISE * noise)
        if value >= self.logprobs.value:
            return self.allowed(noise)
        return Tolerance(
            value,
            f"float32 itself is {noise:.0e} from float64 here; {TIMES_NOISE} times that, and at "
            f"least {SMALLEST:g}, for sums in another order",
        )

    def allowed(self, noise: float) -> Tolerance:
        """Return the usual tolerance, or a larger one where a model's own rounding asks for it."""
        value = self.seen * noise
        if value <= self.logprobs.value or not math.isfinite(value):
            return self.logprobs
        return Tolerance(
            min(value, MOST),
            f"these weights make much of rounding: float32 itself is {noise:.0e} from float64; "
            f"{self.seen} times that was seen on correct ports",
        )

    def with_scan(self) -> Profile:
        """Return the profile for a model that calls vLLM's chunked scan."""
        return replace(self, seen=self.scanned)

    @classmethod
    def for_device(cls, device: str) -> Profile:
        """Return the profile of "cpu" or "cuda"."""
        return CUDA if device == "cuda" else CPU


_OPTIONS: dict[str, Any] = {
    # Float32, so that a difference means a bug and not rounding.
    "dtype": "float32",
    # Compilation is proven in step 7; here an error should point into the port's own lines.
    "enforce_eager": True,
    # Checks speak token ids: a tokenizer can neither hide nor cause a difference.
    "skip_tokenizer_init": True,
    "max_num_seqs": 8,
    # Log-probabilities of the whole vocabulary may be asked for.
    "max_logprobs": -1,
    # A cached prefix would leave tokens uncomputed; step 7 turns it on.
    "enable_prefix_caching": False,
    "enable_chunked_prefill": True,
    # Smaller than the long prompts, and no multiple of the block size: chunks end inside blocks.
    "max_num_batched_tokens": 56,
    # Several blocks even for short prompts (the CPU's default of 128 would put each into one).
    "block_size": 32,
    # The inputs_embeds path can be switched on without a second engine.
    "enable_prompt_embeds": True,
    "disable_log_stats": True,
}

CPU = Profile(
    device="cpu",
    logprobs=Tolerance(
        1e-3,
        "float32 sums in another order differ by 1e-5 to 1e-4 in log-probabilities on correct "
        "ports; the smallest seeded bugs differ by more than 1e-2",
    ),
    itself=Tolerance(
        1e-3, "another batch means other block sizes in the matrix products: about 1e-5 in float32"
    ),
    module=Tolerance(1e-4, "one layer's rounding in float32 is about 1e-6 of its largest value"),
    far=1024,
    options=_OPTIONS,
)

CUDA = Profile(
    device="cuda",
    logprobs=Tolerance(
        2e-3, "as on the CPU; cuBLAS and the attention kernel sum in more different orders"
    ),
    itself=Tolerance(2e-3, "cuBLAS chooses another kernel for another batch size"),
    module=Tolerance(2e-4, "as on the CPU, and cuBLAS' split sums"),
    far=2048,
    # Triton's scan takes each decay in a chunk as the difference of two running sums, which cancel:
    # vLLM's own Mamba2 was 41 times off on an H200. Transformers sums each segment by itself.
    scanned=40,
    options={
        **_OPTIONS,
        # Float32, and everything that attention can have: FlexAttention takes neither soft-caps nor
        # ALiBi, FlashAttention no float32. environment.py keeps Triton from multiplying as TF32.
        "attention_config": {"backend": "TRITON_ATTN"},
        # The GPU may be shared by a room: a small part must be free, and the cache's size is given,
        # since vLLM's measuring of it stops when a neighbour frees memory meanwhile.
        "gpu_memory_utilization": 0.05,
        "kv_cache_memory_bytes": 1 << 30,
    },
)
