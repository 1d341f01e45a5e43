"""Step forward, ForCausalLM of a model with state: what vLLM asks about it before it is built.

The engine sizes its cache from the class alone (`get_mamba_state_shape_from_config`), and treats
models with both kinds of layers (IsHybrid) otherwise than those without attention.
"""

from __future__ import annotations

import libcst as cst

from portkit.analysis.recurrent import RecurrentFacts
from portkit.draft import edit
from portkit.draft.blocker import Blocker
from portkit.draft.work import Work, set_members

_SHAPES: dict[str, tuple[tuple[str, str], ...]] = {
    "mamba": (
        ("intermediate_size", "intermediate_size"),
        ("state_size", "ssm_state_size"),
        ("conv_kernel", "conv_kernel_size"),
    ),
    "mamba2": (
        ("intermediate_size", "intermediate_size"),
        ("n_groups", "n_groups"),
        ("num_heads", "num_heads"),
        ("head_dim", "head_dim"),
        ("state_size", "ssm_state_size"),
        ("conv_kernel", "conv_kernel_size"),
    ),
    "short_conv": (("intermediate_size", "dim"),),
    "linear_attention": (("num_heads", "num_heads"), ("head_dim", "head_dim")),
    "delta_net": tuple(
        (n, n)
        for n in (
            "num_k_heads",
            "num_v_heads",
            "head_k_dim",
            "head_v_dim",
            "conv_kernel_size",
        )
    ),
}
"""Kind -> (argument of MambaStateShapeCalculator, argument of the layer)."""
_CALCULATOR = {
    "mamba": "mamba1",
    "mamba2": "mamba2",
    "short_conv": "short_conv",
    "delta_net": "gated_delta_net",
    "linear_attention": "linear_attention",
}
_DTYPES = {
    "short_conv": "vllm_config.cache_config.mamba_cache_dtype",
    "linear_attention": "vllm_config.cache_config.mamba_cache_dtype",
}
_BOTH = (
    "vllm_config.cache_config.mamba_cache_dtype,\n"
    "        vllm_config.cache_config.mamba_ssm_cache_dtype"
)


def declare_state(work: Work) -> None:
    """Add the interfaces, the three class methods and the renamed weights."""
    mixers = [m for m in work.facts.recurrent if m.arguments]
    if not mixers:
        return
    if len({(m.kind, m.arguments) for m in mixers}) != 1:
        raise Blocker(
            f"{work.facts.causal_lm} has mixers of several kinds ("
            f"{', '.join(m.cls for m in mixers)}): vLLM's cache takes one.",
            mixers[1].line,
        )
    mixer = mixers[0]
    cls = work.cls(work.facts.causal_lm)
    second = "IsHybrid" if work.facts.attention is not None else "IsAttentionFree"
    bases = [edit.code(b.value) for b in cls.bases]
    bases += [b for b in ("HasInnerState", second) if b not in bases]
    cls = cls.with_changes(bases=[cst.Arg(edit.expression(b)) for b in bases])
    members = edit.members(cls)
    at = 1 if members and edit.is_docstring(members[0]) else 0
    new = [*_renames(work, mixers), *(edit.blank_before(m) for m in _methods(mixer))]
    rest = [edit.blank_before(m) if i == 0 else m for i, m in enumerate(members[at:])]
    work.put(set_members(cls, [*members[:at], *new, *rest]))
    work.did.append(
        f"{work.facts.causal_lm}: {second}; vLLM sizes the state from get_mamba_state_shape_..."
    )


def _renames(work: Work, mixers: list[RecurrentFacts]) -> list[edit.Statement]:
    """Names that vLLM's layer gives its parameters: A is -exp(A_log), taken when loading."""
    attrs = {a for layer in work.facts.layers for a in layer.recurrent_attrs}
    pairs = dict.fromkeys(pair for m in mixers for pair in m.renames)
    dropped = sorted(f".{attr}.{name}" for m in mixers for attr in attrs for name in m.dropped)
    stacked = dict.fromkeys(s for m in mixers for s in m.stacked)
    parts = []
    if pairs or dropped:
        lines = "".join(f'        ".{old}": ".{new}",\n' for old, new in pairs)
        if dropped:
            lines += "        # computed from the config\n"
            lines += "".join(f'        "{name}": None,\n' for name in dropped)
        parts.append("    orig_to_new_substr={\n" + lines + "    },\n")
    if stacked:
        lines = "".join(
            f'        ".{attr}.{part}.": (".{attr}.{fused}.", {shard}),\n'
            for attr in sorted(attrs)
            for part, fused, shard in stacked
        )
        parts.append("    orig_to_new_stacked={\n" + lines + "    },\n")
    if not parts:
        return []
    made = edit.statement("hf_to_vllm_mapper = WeightsMapper(\n" + "".join(parts) + ")")
    return [edit.comment_before(made, "The mixer's parameters have other names in vLLM's layer.")]


def _methods(mixer: RecurrentFacts) -> list[cst.FunctionDef]:
    name = _CALCULATOR[mixer.kind]
    values = dict(mixer.arguments) | dict(mixer.sizes)
    sizes = [f"{theirs}={values[ours]}" for theirs, ours in _SHAPES[mixer.kind]]
    if mixer.kind == "short_conv":
        sizes.append("conv_kernel=config.conv_L_cache")
    ranks = "tp_size" if mixer.kind == "linear_attention" else "tp_world_size"
    sizes.insert(0, f"{ranks}=vllm_config.parallel_config.tensor_parallel_size")
    if mixer.kind not in ("mamba", "linear_attention"):
        sizes.append("num_spec=vllm_config.num_speculative_tokens")
    joined = ",\n        ".join(sizes)
    dtypes = _DTYPES.get(mixer.kind, _BOTH)
    return [
        edit.function(f"""
@classmethod
def get_mamba_state_dtype_from_config(
    cls, vllm_config: VllmConfig
) -> tuple[torch.dtype, ...]:
    return MambaStateDtypeCalculator.{name}_state_dtype(
        vllm_config.model_config.dtype,
        {dtypes},
    )
"""),
        edit.function(f"""
@classmethod
def get_mamba_state_shape_from_config(
    cls, vllm_config: VllmConfig
) -> tuple[tuple[int, ...], ...]:
    # The engine asks before the model is built: the sizes are those of the mixers.
    config = vllm_config.model_config.hf_config
    return MambaStateShapeCalculator.{name}_state_shape(
        {joined},
    )
"""),
        edit.function(f"""
@classmethod
def get_mamba_state_copy_func(cls) -> tuple[MambaStateCopyFunc, ...]:
    return MambaStateCopyFuncCalculator.{name}_state_copy_func()
"""),
    ]
