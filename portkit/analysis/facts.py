"""Facts about a modeling file: which class plays which role, and what it computes.

`facts_of` reads source only: it imports and runs nothing. It understands a file in any state
between `copy` and `weights` (and halfway between), so drafts, rules and hints share it. What it
cannot tell, it says in `unknown`, with the line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from portkit.analysis.fused_qkv import FusedQkv
from portkit.analysis.moe_facts import MoeFacts
from portkit.analysis.norms import Formula
from portkit.analysis.recurrent import RecurrentFacts
from portkit.analysis.rotary import Layout
from portkit.analysis.rotary_table import RotaryTable


@dataclass(frozen=True)
class Unknown:
    """Something the facts cannot tell."""

    about: str
    """What it is about: "rotary", "attention", "mlp", "norm", "roles", ..."""
    what: str
    line: int


@dataclass(frozen=True)
class Linear:
    """One linear layer; the expressions are source text with self.x and local names resolved."""

    attr: str
    cls: str
    """The class as written: "nn.Linear", "QKVParallelLinear", ..."""
    in_features: str
    out_features: str
    bias: str
    """The bias argument as written; "True" where nn.Linear's default applies."""
    line: int


@dataclass(frozen=True)
class NormClass:
    """A normalisation class defined in the file."""

    name: str
    formula: Formula
    default_eps: str
    """Default of its eps parameter; "" if it has none."""
    parameters: tuple[str, ...]
    """Names of the parameters of `__init__` after self, in order."""
    why: str
    """Why the formula is unknown."""
    line: int


@dataclass(frozen=True)
class NormUse:
    """A normalisation submodule of some class."""

    attr: str
    cls: str
    size: str
    line: int


@dataclass(frozen=True)
class RotaryFacts:
    """How positions enter queries and keys."""

    cls: str
    """The class that makes cos and sin; "" if there is none in the file."""
    function: str
    """The function that rotates q and k."""
    layout: Layout
    partial: bool
    """Does the function leave a rest of the head alone (or is it called on a part of it)?"""
    why: str
    line: int
    layouts: tuple[tuple[str, Layout], ...] = ()
    """(function, how it pairs dimensions) of every such function that the attention calls."""
    table: RotaryTable | None = None
    """A table on the attention class that takes the place of a rotary class."""

    @property
    def is_neox_style(self) -> bool:
        return self.layout == "half"


@dataclass(frozen=True)
class LatentFacts:
    """Multi-head latent attention: one small latent per token, expanded to keys and values."""

    queries: tuple[Linear, ...]
    """What makes the query heads; two where the config decides whether queries have a latent."""
    query_latents: tuple[Linear, ...]
    """What makes the queries' latent; empty if they are projected directly."""
    kv_latent: Linear
    """Makes the latent of keys and values, and the part of the key that all heads share."""
    kv_heads: Linear
    """Expands the latent to each head's own part of the key and its value."""
    output: Linear
    num_heads: str
    head_dim: str
    """Of queries and keys; sizes are as written in the class."""
    rank: str
    shared_dim: str
    own_dim: str
    value_dim: str
    expand: str
    """The method that expands; "" if forward does."""


@dataclass(frozen=True)
class AttentionFacts:
    """The attention class."""

    cls: str
    line: int
    q: Linear | None
    k: Linear | None
    v: Linear | None
    o: Linear | None
    qkv: Linear | None
    """One linear for all three, already fused in the checkpoint."""
    num_heads: str
    """Total number of query heads, resolved, e.g. "config.num_attention_heads"."""
    num_kv_heads: str
    head_dim: str
    """As written in the class, e.g. "self.head_dim"."""
    scaling: str
    """As passed to attention, e.g. "self.scaling"; "" if nothing is passed."""
    sliding_window: str
    soft_cap: str
    norms: tuple[NormUse, ...]
    """Norms on queries and keys, in order."""
    per_head_norm: bool | None
    """True: over the head dimension; False: over all heads together; None: no such norm."""
    output_norms: tuple[NormUse, ...] = ()
    """Norms on what attention returns, before the output projection."""
    gates: tuple[Linear, ...] = ()
    """Linears that make none of query, key, value and output: gates, as a rule."""
    value_dim: str = ""
    """Resolved width of a value head where it is not `head_dim`, e.g. "config.v_head_dim"."""
    query_parts: int = 1
    """2 if the query projection makes a gate beside the query, in each head."""
    sinks: str = ""
    """As passed to attention, e.g. "self.sinks": one more logit per head; "" if none."""
    fused: FusedQkv | None = None
    """How `qkv` is laid out; None where the code that cuts it could not be followed."""
    latent: LatentFacts | None = None
    """Set if keys and values are expanded from a latent; q, k, v and qkv are then None."""


@dataclass(frozen=True)
class MlpFacts:
    """The feed-forward class."""

    cls: str
    line: int
    kind: Literal["gated", "gated_fused", "plain", "unknown"]
    gate: Linear | None
    up: Linear | None
    """The plain kind has only up and down; gated_fused has its one linear here."""
    down: Linear | None
    act: str
    """Attribute of the activation."""
    activation: str
    """Its expression as written, e.g. "ACT2FN[config.hidden_act]"."""
    why: str = ""


@dataclass(frozen=True)
class LayerFacts:
    """The decoder layer."""

    cls: str
    line: int
    attention_attr: str
    mlp_attrs: tuple[str, ...]
    norms: tuple[NormUse, ...]
    residual: Literal["pre", "sandwich", "post", "parallel", "other"]
    recurrent_attrs: tuple[str, ...] = ()
    """Mixers that carry a state instead of a KV cache."""


@dataclass(frozen=True)
class EmbeddingFacts:
    attr: str
    cls: str
    scale: str
    """Expression that multiplies the embeddings inside the class; "" if none."""
    line: int
    holder: tuple[str, str] | None = None
    """(attribute on the model, class) of a module that holds the embedding and norms it."""

    @property
    def path(self) -> str:
        """Attributes from the model to the embedding, e.g. "embeddings.tok_embeddings"."""
        return f"{self.holder[0]}.{self.attr}" if self.holder else self.attr


@dataclass(frozen=True)
class HeadFacts:
    """The language-model head on the ForCausalLM class."""

    attr: str
    bias: str
    line: int
    can_tie: bool
    """Does the class declare `_tied_weights_keys` (or already tie in `__init__`)?"""
    scale: str
    """Factor on the logits as source, e.g. "1 / config.logits_scaling"; "" if none."""
    soft_cap: str
    """Soft cap on the logits as source, resolved; "" if none."""


@dataclass(frozen=True)
class ModelFacts:
    """Everything known about one architecture's file."""

    architecture: str
    state: Literal["copy", "forward", "parallel", "weights"]
    """How far the file is, from its ForCausalLM, model and attention classes."""
    causal_lm: str
    model: str
    model_attr: str
    """Attribute of the model on the ForCausalLM class, usually "model"."""
    layers_attr: str
    final_norm: str
    """Attribute of the last norm on the model; "" if none."""
    layer: LayerFacts | None
    attention: AttentionFacts | None
    mlp: tuple[MlpFacts, ...]
    norm_classes: tuple[NormClass, ...]
    rotary: RotaryFacts | None
    embedding: EmbeddingFacts | None
    head: HeadFacts | None
    config_class: str
    config_fields: tuple[tuple[str, int], ...]
    """(field, first line) of each config field that the file reads."""
    unknown: tuple[Unknown, ...]
    layers: tuple[LayerFacts, ...] = ()
    """Every class of decoder layer in the list; `layer` is the first with attention."""
    recurrent: tuple[RecurrentFacts, ...] = ()
    wrappers: tuple[tuple[str, str], ...] = ()
    """(class, attribute of the next) of each class between the ForCausalLM class and the model."""
    attention_wrapper: LayerFacts | None = None
    """A module between layer and attention that only calls the attention."""

    @property
    def model_path(self) -> str:
        """Attributes from the ForCausalLM class to the model, e.g. "model.decoder"."""
        return ".".join([self.model_attr, *(attr for _, attr in self.wrappers)])

    def recurrent_class(self, name: str) -> RecurrentFacts | None:
        return next((r for r in self.recurrent if r.cls == name), None)

    moe: tuple[MoeFacts, ...] = ()
    """Mixture-of-experts blocks of the layer; their shared experts are in `mlp`."""

    def norm_class(self, name: str) -> NormClass | None:
        return next((n for n in self.norm_classes if n.name == name), None)


def facts_of(source: str, architecture: str) -> ModelFacts:
    """Facts of the file's `architecture`, e.g. "HeliumForCausalLM".

    Raises SyntaxError if the source does not parse. A missing class is an `Unknown`, not an error.
    """
    from portkit.analysis.read import read_facts

    return read_facts(source, architecture)
