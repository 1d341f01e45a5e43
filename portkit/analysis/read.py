"""Finds the roles of a file's classes and fills in `ModelFacts`. See facts.py for the values."""

from __future__ import annotations

import ast
from dataclasses import replace
from itertools import pairwise

from portkit.analysis.classes import ClassView, ModuleView, argument, call_name, text, view_module
from portkit.analysis.computes import logit_operations, residual_shape
from portkit.analysis.facts import (
    EmbeddingFacts,
    HeadFacts,
    LayerFacts,
    ModelFacts,
    NormClass,
    NormUse,
    RotaryFacts,
    Unknown,
)
from portkit.analysis.making import made_by
from portkit.analysis.moe import is_moe, read_moe
from portkit.analysis.nesting import path_to_attention, path_to_layers
from portkit.analysis.norms import formula_of, is_norm
from portkit.analysis.read_blocks import linears_of, read_attention
from portkit.analysis.read_mlp import read_mlp
from portkit.analysis.recurrent import (
    VLLM_LAYERS,
    RecurrentFacts,
    is_recurrent,
    kind_of,
    read_recurrent,
)
from portkit.analysis.roles import missing_attention, missing_layers
from portkit.analysis.rotary import layout_of
from portkit.analysis.rotary_table import rotary_table_of

VLLM_NORMS = ("RMSNorm", "GemmaRMSNorm", "LayerNorm")


class Reader:
    """Collects facts of one file; `unknown` grows as it goes."""

    def __init__(self, source: str, architecture: str) -> None:
        self.module: ModuleView = view_module(source)
        self.architecture = architecture
        self.unknown: list[Unknown] = []
        self.norms = tuple(self._norm_class(c) for c in self.module.classes.values() if is_norm(c))

    def cannot_tell(self, about: str, what: str, line: int) -> None:
        self.unknown.append(Unknown(about, what, line))

    # ---- roles ------------------------------------------------------------------------------

    def submodule(self, view: ClassView, wanted) -> tuple[str, ClassView] | None:
        """First submodule (attr, class) whose class satisfies `wanted`."""
        for item in view.assigned:
            for call in (n for n in ast.walk(item.value) if isinstance(n, ast.Call)):
                found = self.module.classes.get(call_name(call))
                if found is not None and wanted(found):
                    return item.attr, found
        return None

    def layers_of(self, view: ClassView) -> tuple[str, ClassView] | None:
        """(attr, first layer class) of nn.ModuleList([...]) or make_layers(...)."""
        found = self.layer_classes(view)
        return (found[0], found[1][0]) if found else None

    def layer_classes(self, view: ClassView) -> tuple[str, list[ClassView]] | None:
        """(attr, every class) of the list of decoder layers."""
        for item in view.assigned:
            name = call_name(item.value)
            if name.rsplit(".", 1)[-1] not in ("ModuleList", "make_layers"):
                continue
            if name == "make_layers" and item.attr in ("start_layer", "end_layer"):
                continue
            found = made_by(self.module, view, item.value)
            if found:
                return item.attr, found
        return None

    def norms_of(self, view: ClassView) -> tuple[NormUse, ...]:
        """Norm submodules of a class, in the order of `__init__`."""
        own = {n.name for n in self.norms}
        for other in self.module.classes.values():
            if any(base.rsplit(".", 1)[-1] in VLLM_NORMS for base in other.bases):
                own.add(other.name)
        uses = []
        for item in view.assigned:
            name = call_name(item.value)
            short = name.rsplit(".", 1)[-1]
            if isinstance(item.value, ast.Call) and (name in own or short in VLLM_NORMS):
                call = item.value
                named = [k.value for k in call.keywords if k.arg and "eps" not in k.arg]
                size = call.args[0] if call.args else (named[0] if named else None)
                uses.append(
                    NormUse(
                        item.attr,
                        name,
                        text(view.resolve(size)) if size is not None else "",
                        item.line,
                    )
                )
        return tuple(uses)

    def norm_formula(self, name: str) -> str:
        return next((n.formula for n in self.norms if n.name == name), "unknown")

    def recurrent_of(self, view: ClassView) -> dict[str, list[ClassView | str]]:
        """Attribute -> mixers that keep a state: classes of the file, or vLLM's by name."""
        found: dict[str, list[ClassView | str]] = {}
        for item in view.assigned:
            mixers: list[ClassView | str] = [
                c for c in made_by(self.module, view, item.value) if is_recurrent(c)
            ]
            if call_name(item.value) in VLLM_LAYERS and not mixers:
                mixers.append(call_name(item.value))
            if mixers:
                found.setdefault(item.attr, []).extend(mixers)
        return found

    def _norm_class(self, view: ClassView) -> NormClass:
        formula, why, line = formula_of(view)
        init = view.init
        names = tuple(a.arg for a in init.args.args[1:]) if init else ()
        defaults = (
            dict(zip(reversed(names), reversed(init.args.defaults), strict=False)) if init else {}
        )
        eps = next((text(defaults[n]) for n in names if "eps" in n and n in defaults), "")
        return NormClass(view.name, formula, eps, names, why, line)

    # ---- the parts --------------------------------------------------------------------------

    def rotary(self, model: ClassView | None, attention: ClassView | None) -> RotaryFacts | None:
        module = self.module
        functions = [
            f for name, f in module.functions.items() if "rotary" in name and len(f.args.args) >= 3
        ]
        holder = None
        for view in (model, attention):
            if view is not None and holder is None:
                holder = self.submodule(view, lambda c: "inv_freq" in text(c.node))
        if not functions or holder is None:
            table = rotary_table_of(module, attention) if attention is not None else None
            if table is None:
                return None
            return RotaryFacts("", table.function, table.layout, True, "", table.line, table=table)
        called = (
            {call_name(n) for n in ast.walk(attention.forward)}
            if attention and attention.forward
            else set()
        )
        function = next((f for f in functions if f.name in called), functions[0])
        layout, partial, why, line = layout_of(module, holder[1], function)
        if layout == "unknown":
            self.cannot_tell("rotary", why, line)
        layouts = tuple(
            (f.name, layout_of(module, holder[1], f)[0]) for f in functions if f.name in called
        )
        return RotaryFacts(holder[1].name, function.name, layout, partial, why, line, layouts)

    def layer(self, view: ClassView) -> LayerFacts:
        attention = next(iter(path_to_attention(self, view)), None)
        norms = self.norms_of(view)
        mlps = []
        recurrent = self.recurrent_of(view)
        for item in view.assigned:
            found = [
                c
                for c in made_by(self.module, view, item.value)
                if (attention is None or c is not attention[1])
                and (linears_of(c) or is_moe(self.module, c))
            ]
            if found and item.attr not in mlps and item.attr not in recurrent:
                mlps.append(item.attr)
        forward = text(view.forward) if view.forward else ""
        attr = attention[0] if attention else ""
        first = attr or next(iter(recurrent), "")
        residual = residual_shape(forward, norms, first, mlps)
        return LayerFacts(
            view.name, view.line, attr, tuple(mlps), norms, residual, tuple(recurrent)
        )

    def embedding(self, view: ClassView) -> EmbeddingFacts | None:
        """The embedding of the tokens: the model's own, or in a module that norms it."""
        own = self._own_embedding(view)
        if own is not None:
            return own
        for item in view.assigned:
            holder = self.module.classes.get(call_name(item.value))
            found = self._own_embedding(holder) if holder is not None else None
            looks_up = holder is not None and "(input_ids)" in text(holder.forward or holder.node)
            if found is not None and looks_up:
                return replace(found, holder=(item.attr, holder.name))
        return None

    def _own_embedding(self, view: ClassView) -> EmbeddingFacts | None:
        for item in view.assigned:
            for call in (n for n in ast.walk(item.value) if isinstance(n, ast.Call)):
                name = call_name(call)
                own = self.module.classes.get(name)
                bases = own.bases if own else ()
                if name.rsplit(".", 1)[-1] in ("Embedding", "VocabParallelEmbedding"):
                    return EmbeddingFacts(item.attr, name, "", item.line)
                if own is not None and any(
                    b.rsplit(".", 1)[-1] in ("Embedding", "VocabParallelEmbedding") for b in bases
                ):
                    scale = next(
                        (k.value for k in call.keywords if k.arg and "scale" in k.arg), None
                    )
                    return EmbeddingFacts(item.attr, name, text(scale), item.line)
        return None

    def head(self, view: ClassView) -> HeadFacts | None:
        for item in view.assigned:
            name = call_name(item.value).rsplit(".", 1)[-1]
            if name not in ("Linear", "ParallelLMHead"):
                continue
            if "head" not in item.attr and "vocab_size" not in text(item.value):
                continue
            assert isinstance(item.value, ast.Call)
            bias = argument(item.value, 2, "bias")
            ties = (
                "_tied_weights_keys" in text(view.node)
                or "tie_weights" in text(view.node)
                or any(
                    text(s.value).endswith(".weight") and text(s.targets[0]).endswith(".weight")
                    for s in ast.walk(view.node)
                    if isinstance(s, ast.Assign)
                )
            )
            scale, cap = logit_operations(view)
            default = "True" if name == "Linear" else "False"
            return HeadFacts(item.attr, text(bias) or default, item.line, ties, scale, cap)
        return None

    def config_fields(self) -> tuple[tuple[str, int], ...]:
        found: dict[str, int] = {}
        for node in ast.walk(self.module.tree):
            if isinstance(node, ast.Attribute) and text(node.value) in ("config", "self.config"):
                found.setdefault(node.attr, node.lineno)
            elif (
                (
                    isinstance(node, ast.Call)
                    and call_name(node) == "getattr"
                    and len(node.args) >= 2
                )
                and text(node.args[0]) in ("config", "self.config")
                and isinstance(node.args[1], ast.Constant)
            ):
                found.setdefault(str(node.args[1].value), node.lineno)
        return tuple(sorted(found.items(), key=lambda pair: pair[1]))


def read_facts(source: str, architecture: str) -> ModelFacts:
    reader = Reader(source, architecture)
    classes = reader.module.classes
    lm = classes.get(architecture)
    if lm is None:
        reader.cannot_tell("roles", f"there is no class {architecture} in the file", 1)
    path = path_to_layers(reader, lm) if lm else []
    held = path[-1] if path else None
    if lm is not None and held is None:
        reader.cannot_tell("roles", *missing_layers(reader.module, lm))
    model = held[1] if held else None
    layers = reader.layer_classes(model) if model else None
    views = layers[1] if layers else []
    every = tuple(reader.layer(v) for v in views)
    layer = next((f for f in every if f.attention_attr), every[0] if every else None)
    recurrent = _recurrent(reader, views)
    to_attention = next((p for v in views if (p := path_to_attention(reader, v))), [])
    attention = to_attention[-1] if to_attention else None
    if views and attention is None and not recurrent:
        reader.cannot_tell("roles", *missing_attention(reader.module, views[0]))
    rotary = reader.rotary(model, attention[1] if attention else None)
    attention_facts = read_attention(reader, attention[1]) if attention else None
    made = _mlp_classes(reader, views, every)
    moe = tuple(f for name in made if (f := read_moe(reader.module, classes[name])) is not None)
    names = [name for name in made if name not in {f.cls for f in moe}]
    names += [name for f in moe for name in f.shared]
    mlps = [read_mlp(reader, classes[name]) for name in dict.fromkeys(names)]
    for norm in reader.norms:
        if norm.formula == "unknown":
            reader.cannot_tell("norm", norm.why, norm.line)
    final = [n.attr for n in reader.norms_of(model)] if model else []
    return ModelFacts(
        architecture=architecture,
        state=_state(reader, lm, model, attention[1] if attention else None),
        causal_lm=lm.name if lm else "",
        model=model.name if model else "",
        model_attr=path[0][0] if path else "",
        layers_attr=layers[0] if layers else "",
        final_norm=final[-1] if final else "",
        layer=layer,
        attention=attention_facts,
        mlp=tuple(mlps),
        norm_classes=reader.norms,
        rotary=rotary,
        embedding=reader.embedding(model) if model else None,
        head=reader.head(lm) if lm else None,
        config_class=_config_class(reader.module, lm, model),
        config_fields=reader.config_fields(),
        unknown=tuple(reader.unknown),
        layers=every,
        recurrent=recurrent,
        moe=moe,
        wrappers=tuple((a[1].name, b[0]) for a, b in pairwise(path)),
        attention_wrapper=reader.layer(to_attention[0][1]) if len(to_attention) > 1 else None,
    )


def _mlp_classes(
    reader: Reader, views: list[ClassView], layers: tuple[LayerFacts, ...]
) -> list[str]:
    """Feed-forward classes of every class of layer, each once."""
    return list(
        dict.fromkeys(
            made.name
            for view, layer in zip(views, layers, strict=True)
            for item in view.assigned
            if item.attr in layer.mlp_attrs
            for made in made_by(reader.module, view, item.value)
        )
    )


def _recurrent(reader: Reader, views: list[ClassView]) -> tuple[RecurrentFacts, ...]:
    mixers = [m for v in views for made in reader.recurrent_of(v).values() for m in made]
    if views and not mixers:
        # Layers may be given their mixers as arguments: then no class of layer makes one.
        kinds = ((v, kind_of(v)) for v in reader.module.classes.values())
        mixers = [v for v, kind in kinds if kind not in (None, "convolution", "short_conv")]
    found: dict[str, RecurrentFacts] = {}
    for mixer in mixers:
        if isinstance(mixer, str):
            found[mixer] = RecurrentFacts(mixer, 0, VLLM_LAYERS[mixer], mixer)
        elif mixer.name not in found:
            found[mixer.name] = read_recurrent(reader, mixer)
    return tuple(found.values())


PARALLEL = {
    *("QKVParallelLinear", "RowParallelLinear", "ColumnParallelLinear", "ReplicatedLinear"),
}
"""Linears of an attention after step parallel."""


def _state(
    reader: Reader, lm: ClassView | None, model: ClassView | None, attention: ClassView | None
):
    if lm is None or (attention is not None and attention.init is None):
        return "copy"
    if "load_weights" in lm.methods:
        return "weights"
    takes = [
        a.arg for f in (lm.forward, model.forward if model else None) if f for a in f.args.args
    ]
    ported = "positions" in takes and "compute_logits" in lm.methods
    if attention is None:
        if ported and "ParallelLMHead" in text(lm.node):
            return "parallel"
        return "forward" if ported else "copy"
    called = {call_name(n) for n in ast.walk(attention.init)}
    ours = PARALLEL & called
    if ours and "ParallelLMHead" in text(lm.node):
        return "parallel"
    return "forward" if "Attention" in called and ported else "copy"


def _config_class(module: ModuleView, *views: ClassView | None) -> str:
    for view in views:
        for node in ast.walk(view.node) if view else ():
            if isinstance(node, ast.arg) and node.arg == "config" and node.annotation is not None:
                return text(node.annotation)
    return next(
        (
            n
            for n in module.imported
            if n.endswith("Config")
            and n[0].isupper()
            and n not in ("CacheConfig", "VllmConfig", "QuantizationConfig")
        ),
        "",
    )
