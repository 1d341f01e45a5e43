"""Flips of norms, MLPs, experts, embeddings, heads, biases and reductions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import libcst as cst

from portkit.diagnosis.flips import Edit, flip
from portkit.diagnosis.tree import Tree, argument, renamed, with_argument, without_argument

NORM_MODULE = "vllm.model_executor.layers.layernorm"
ACTIVATION_MODULE = "vllm.model_executor.layers.activation"
LINEARS = (
    "QKVParallelLinear",
    "MergedColumnParallelLinear",
    "ColumnParallelLinear",
    "RowParallelLinear",
    "ReplicatedLinear",
)
EPS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
GATED = ("SiluAndMul", "GeluAndMul")
GELU = ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "silu", "relu", "relu2")


@flip("norm-plus-one", "norm")
def norm_plus_one(tree: Tree) -> Iterator[Edit]:
    for old, new, words in (
        ("RMSNorm", "GemmaRMSNorm", "(1 + weight)"),
        ("GemmaRMSNorm", "RMSNorm", "the weight itself"),
    ):
        calls = tree.calls(old)
        groups = [calls, *([c] for c in calls)] if len(calls) > 1 else [calls]
        for group in filter(None, groups):
            which = "every norm" if group is calls else f"the norm of line {tree.line(group[0])}"
            yield (
                tree.line(group[0]),
                f"{new} for {which}",
                f"The original's norm multiplies by {words}.",
                tree.with_changes(
                    {c: renamed(c, new) for c in group}, f"from {NORM_MODULE} import {new}\n"
                ),
            )


@flip("norm-eps", "norm")
def norm_eps(tree: Tree) -> Iterator[Edit]:
    changes = {}
    field = ""
    for call in tree.calls("RMSNorm", "GemmaRMSNorm", "LayerNorm"):
        field = tree.field(call, *EPS)
        given = argument(call, "eps", 1)
        if field and (given is None or tree.code(given.value) != field):
            changes[call] = with_argument(call, "eps", field, 1)
    if changes:
        yield (
            tree.line(next(iter(changes))),
            f"eps={field}",
            "A norm's eps is not the config's.",
            tree.with_changes(changes),
        )


@flip("norm-order", "norm-order")
def norm_order(tree: Tree) -> Iterator[Edit]:
    """Swap two norms where a forward calls them."""
    for function in tree.nodes(cst.FunctionDef):
        if function.name.value != "forward":
            continue
        norms = [
            call
            for call in tree.nodes(cst.Call)
            if tree.function(call) is function
            and isinstance(call.func, cst.Attribute)
            and "norm" in call.func.attr.value
        ]
        names = list(dict.fromkeys(tree.code(c.func) for c in norms))
        for a, b in itertools.combinations(names, 2):
            swap = {a: b, b: a}
            changes = {
                c: c.with_changes(func=cst.parse_expression(swap[tree.code(c.func)]))
                for c in norms
                if tree.code(c.func) in swap
            }
            yield (
                tree.line(norms[0]),
                f"{a} and {b} swapped",
                f"The norms {a} and {b} stand in each other's place.",
                tree.with_changes(changes),
            )


@flip("activation", "activation")
def activation(tree: Tree) -> Iterator[Edit]:
    wanted = tree.config.get("hidden_act") or tree.config.get("activation_function")
    for node in tree.nodes(cst.SimpleString):
        name = node.value.strip("\"'")
        call = tree.parent(tree.parent(node) or node)
        if name in GELU and isinstance(call, cst.Call) and call.args:
            for other in sorted(GELU, key=lambda n: n != wanted):
                if other != name:
                    yield (
                        tree.line(node),
                        f"the activation {other}",
                        f"The activation is {other} in the original, not {name}.",
                        tree.with_changes({node: node.with_changes(value=f'"{other}"')}),
                    )
    for call in tree.calls("get_act_fn"):
        if call.args and not isinstance(call.args[0].value, cst.SimpleString):
            for name in GELU:
                yield (
                    tree.line(call),
                    f"the activation {name}",
                    f"The activation is {name} in the original.",
                    tree.with_changes({call: cst.parse_expression(f'get_act_fn("{name}")')}),
                )
    for call in tree.calls("GELU"):
        for name in ("gelu_new", "quick_gelu"):
            yield (
                tree.line(call),
                f"the activation {name}",
                f"The activation is {name} in the original, not the exact GELU.",
                tree.with_changes(
                    {call: cst.parse_expression(f'get_act_fn("{name}")')},
                    f"from {ACTIVATION_MODULE} import get_act_fn\n",
                ),
            )
    for call in tree.calls(*GATED):
        for code in ("SiluAndMul()", 'GeluAndMul(approximate="tanh")', "GeluAndMul()"):
            if code != tree.code(call):
                yield (
                    tree.line(call),
                    code,
                    f"The gated activation is {code} in the original.",
                    tree.with_changes(
                        {call: cst.parse_expression(code)},
                        f"from {ACTIVATION_MODULE} import {code.split('(')[0]}\n",
                    ),
                )


@flip("gate-up", "gate-up")
def gate_up(tree: Tree) -> Iterator[Edit]:
    """Swap shard ids 0 and 1 in the table of load_weights, for each fused layer that has both."""
    rows: dict[str, dict[str, cst.Integer]] = {}
    for node in tree.nodes(cst.Integer):
        element = tree.parent(node)
        row = tree.parent(element) if isinstance(element, cst.Element) else None
        if isinstance(row, cst.Tuple) and node.value in ("0", "1"):
            fused = tree.code(row.elements[0].value)
            if len(row.elements) == 2:  # {"q_proj": ("qkv_proj", 0)} or ("gate_up_proj", 0)
                fused = tree.code(row.elements[0].value)
            rows.setdefault(fused, {})[node.value] = node
    for fused, pair in rows.items():
        if len(pair) == 2:
            changes = {pair["0"]: cst.Integer("1"), pair["1"]: cst.Integer("0")}
            yield (
                tree.line(pair["0"]),
                f"shard ids 0 and 1 of {fused} swapped",
                f"The two halves of {fused} are in the wrong order: gate and up are swapped.",
                tree.with_changes(changes),
            )


@flip("halves", "gate-up")
def halves(tree: Tree) -> Iterator[Edit]:
    """Swap the names of the two halves of a chunk."""
    for node in tree.nodes(cst.Assign):
        target = node.targets[0].target
        if (
            not isinstance(target, cst.Tuple)
            or len(target.elements) != 2
            or not any(w in tree.code(node.value) for w in (".chunk(", ".split("))
        ):
            continue
        first, second = target.elements
        swapped = target.with_changes(
            elements=[
                first.with_changes(value=second.value),
                second.with_changes(value=first.value),
            ]
        )
        yield (
            tree.line(node),
            "the two halves swapped",
            "The halves of the split are in the wrong order.",
            tree.with_changes(
                {node: node.with_changes(targets=[node.targets[0].with_changes(target=swapped)])}
            ),
        )


@flip("renormalize", "routing")
def renormalize(tree: Tree) -> Iterator[Edit]:
    for call in tree.nodes(cst.Call):
        given = argument(call, "renormalize")
        if given is None:
            continue
        field = tree.field(call, "norm_topk_prob")
        for code in filter(None, (field, "True", "False")):
            if code != tree.code(given.value):
                yield (
                    tree.line(call),
                    f"renormalize={code}",
                    "Whether the chosen experts' weights are made to sum to one is the other way "
                    "round in the original.",
                    tree.with_changes({call: with_argument(call, "renormalize", code)}),
                )


@flip("expert-scale", "routing")
def expert_scale(tree: Tree) -> Iterator[Edit]:
    for call in tree.calls("FusedMoE"):
        field = tree.field(call, "routed_scaling_factor")
        if field and argument(call, "routed_scaling_factor") is None:
            yield (
                tree.line(call),
                f"routed_scaling_factor={field}",
                "The experts' sum is not multiplied by the config's routed_scaling_factor.",
                tree.with_changes({call: with_argument(call, "routed_scaling_factor", field)}),
            )


@flip("bias", "bias")
def bias(tree: Tree) -> Iterator[Edit]:
    for call in tree.calls(*LINEARS):
        given = argument(call, "bias")
        now = "True" if given is None else tree.code(given.value)
        new = "True" if now == "False" else "False"
        yield (
            tree.line(call),
            f"bias={new}",
            f"The layer is built with bias={now}, the original's has "
            f"{'one' if new == 'True' else 'none'}.",
            tree.with_changes({call: with_argument(call, "bias", new)}),
        )


@flip("embedding-scale", "embedding")
def embedding_scale(tree: Tree) -> Iterator[Edit]:
    """Multiply what the embedding returns by what configs have for it, or do not."""
    for call in tree.nodes(cst.Call):
        name = tree.code(call.func)
        function = tree.function(call)
        if not name.startswith("self.") or function is None:
            continue
        if "embed" not in name.rpartition(".")[2] or len(call.args) != 1:
            continue
        if "position" in tree.code(call) or function.name.value == "__init__":
            continue
        parent = tree.parent(call)
        if isinstance(parent, cst.BinaryOperation) and isinstance(parent.operator, cst.Multiply):
            yield (
                tree.line(call),
                "the embedding not scaled",
                "The original does not scale its embeddings here.",
                tree.with_changes({parent: call}),
            )
            continue
        offers = []
        for field in ("embedding_multiplier", "scale_emb", "embedding_scale"):
            offers += [f"self.config.{field}"] if tree.config.get(field) is not None else []
        if isinstance(tree.config.get("hidden_size"), int):
            offers.append("self.config.hidden_size**0.5")
        for offer in offers:
            yield (
                tree.line(call),
                f"the embedding times {offer}",
                f"The original multiplies its embeddings by {offer.removeprefix('self.')}.",
                tree.with_changes({call: cst.parse_expression(f"{tree.code(call)} * {offer}")}),
            )


@flip("logit-scale", "head")
def logit_scale(tree: Tree) -> Iterator[Edit]:
    for call in tree.calls("LogitsProcessor"):
        given = argument(call, "scale", 2)
        offers = []
        for name in ("logit_scale", "logits_scaling", "lm_head_multiplier"):
            field = tree.field(call, name)
            offers += [field, f"1 / {field}"] if field else []
        offers += ["1.0"] if given is not None else []
        for offer in offers:
            if given is None or tree.code(given.value) != offer:
                yield (
                    tree.line(call),
                    f"LogitsProcessor(scale={offer})",
                    f"The logits' scale is {offer} in the original.",
                    tree.with_changes({call: with_argument(call, "scale", offer, 2)}),
                )


@flip("logit-cap", "head")
def logit_cap(tree: Tree) -> Iterator[Edit]:
    for call in tree.calls("LogitsProcessor"):
        field = tree.field(call, "final_logit_softcapping")
        if field and argument(call, "soft_cap") is None:
            yield (
                tree.line(call),
                f"LogitsProcessor(soft_cap={field})",
                "The final logits are capped in the original (final_logit_softcapping).",
                tree.with_changes({call: with_argument(call, "soft_cap", field)}),
            )
        elif (bare := without_argument(call, "soft_cap")) is not None:
            yield (
                tree.line(call),
                "LogitsProcessor without soft_cap",
                "The original does not cap its logits.",
                tree.with_changes({call: bare}),
            )


@flip("multiplier", "residual")
def multiplier(tree: Tree) -> Iterator[Edit]:
    """Leave out each multiplication by an attribute in a forward."""
    for node in tree.nodes(cst.BinaryOperation):
        function = tree.function(node)
        if not isinstance(node.operator, cst.Multiply) or function is None:
            continue
        if function.name.value != "forward" or not tree.code(node.right).startswith("self."):
            continue
        yield (
            tree.line(node),
            f"`{tree.code(node.left)}` in place of `{tree.code(node)}`",
            f"The original does not multiply by {tree.code(node.right)} there.",
            tree.with_changes({node: node.left}),
        )


@flip("reduce-results", "ranks")
def reduce_results(tree: Tree) -> Iterator[Edit]:
    for call in tree.calls("RowParallelLinear"):
        bare = without_argument(call, "reduce_results")
        if bare is not None:
            yield (
                tree.line(call),
                "without reduce_results=False",
                "Each rank keeps its part of the sum: nothing adds them up.",
                tree.with_changes({call: bare}),
            )
