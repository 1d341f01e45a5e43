"""A norm of vLLM's adds the residual itself."""

from __future__ import annotations

import libcst as cst

from portkit.draft import edit
from portkit.draft.transforms.parallel_add_norm import fused
from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule

_INITS = """
class ToyLayer(nn.Module):
    def __init__(self, config, prefix=""):
        super().__init__()
        self.attn = ToyAttention(config, prefix=f"{prefix}.attn")
        self.mlp = ToyMLP(config, prefix=f"{prefix}.mlp")
        self.norm1 = RMSNorm(config.hidden_size)
        self.norm2 = RMSNorm(config.hidden_size)
%s

class ToyModel(nn.Module):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.start_layer, self.end_layer, self.layers = make_layers(
            4, lambda prefix: ToyLayer(config, prefix=prefix), prefix=f"{prefix}.layers"
        )
        self.norm = RMSNorm(config.hidden_size)
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            [%s], config.hidden_size
        )
%s"""
_PLAIN = _INITS % (
    """
    def forward(self, positions, hidden_states):
        residual = hidden_states
        hidden_states = self.norm1(hidden_states)
        hidden_states = self.attn(positions, hidden_states)
        hidden_states = residual + hidden_states

        residual = hidden_states
        hidden_states = self.norm2(hidden_states)
        hidden_states = self.mlp(hidden_states)
        hidden_states = residual + hidden_states
        return hidden_states
""",
    '"hidden_states"',
    """
    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
        if get_pp_group().is_first_rank:
            hidden_states = self.embed_tokens(input_ids)
        else:
            hidden_states = intermediate_tensors["hidden_states"]
        for layer in self.layers:
            hidden_states = layer(positions, hidden_states)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden_states})
        hidden_states = self.norm(hidden_states)
        return hidden_states
""",
)
_FUSED = _INITS % (
    """
    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            residual = hidden_states
            hidden_states = self.norm1(hidden_states)
        else:
            # One kernel: residual = hidden_states + residual, then the norm of it.
            hidden_states, residual = self.norm1(hidden_states, residual)
        hidden_states = self.attn(positions, hidden_states)

        hidden_states, residual = self.norm2(hidden_states, residual)
        hidden_states = self.mlp(hidden_states)
        # The next norm adds them.
        return hidden_states, residual
""",
    '"hidden_states", "residual"',
    """
    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
        if get_pp_group().is_first_rank:
            hidden_states = self.embed_tokens(input_ids)
            residual = None
        else:
            hidden_states = intermediate_tensors["hidden_states"]
            residual = intermediate_tensors["residual"]
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden_states, "residual": residual})
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states
""",
)


class LetNormsAdd(Rule):
    """Let vLLM's `RMSNorm` add the residual: `hidden_states, residual = norm(hidden, residual)`.

    ## What it does
    Reports a decoder layer that norms first (`RMSNorm` or `GemmaRMSNorm`, before the attention and
    before the MLP) and adds the residual in a statement of its own, in a model that hands nothing
    but hidden states from layer to layer and has its pipeline stages already.

    ## Why vLLM wants it
    Norm and addition read and write the same tensors; one kernel does both. What a layer would add
    last, the next layer's first norm adds, or the model's last norm. So layers and pipeline stages
    hand on two tensors, as in vLLM's own classes.

    ## Example
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)

    ## Use instead
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)

    ## Fix safety
    Safe: the same additions. In 16 bits the norm sees the sum before it is rounded.

    ## References
    - vllm/model_executor/layers/layernorm.py (RMSNorm.forward_native)
    - vllm/model_executor/models/llama.py (LlamaDecoderLayer)
    """

    fix_safety = "safe"
    severity = "info"

    VALID = [
        Valid(_FUSED),
        # A norm of the file's own takes one tensor.
        Valid(_PLAIN.replace("RMSNorm(", "ToyNorm(")),
        # The layer does something else between its norms.
        Valid(_PLAIN.replace("residual + hidden_states\n\n", "residual + 2 * hidden_states\n\n")),
    ]
    INVALID = [
        Invalid(_PLAIN, line=9, names="ToyLayer", fixed=_FUSED),
        Invalid(
            _PLAIN.replace("residual + hidden_states", "hidden_states + residual"),
            line=9,
            names="norm2",
            fixed=_FUSED,
        ),
    ]

    def visit_Module(self, node: cst.Module) -> None:
        found = fused(self.source.module)
        if found is None:
            return
        layer = next(
            cls
            for cls in self.source.module.body
            if isinstance(cls, cst.ClassDef) and cls.name.value == found.layer
        )
        self.report(
            edit.method(layer, "forward"),
            f"`{found.layer}` adds the residual beside its norms: {' and '.join(found.norms)} can "
            "add it in the same kernel, `hidden_states, residual = norm(hidden_states, residual)`.",
            transform=_fused,
        )


def _fused(module: cst.Module) -> cst.Module:
    found = fused(module)
    return found.module if found is not None else module
