"""Flips of positions and attention: rotary, scale, window, caps, q, k and v."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import libcst as cst

from portkit.diagnosis.flips import Edit, flip
from portkit.diagnosis.tree import Tree, argument, with_argument, without_argument

SCALE = 2
"""Position of `scale` in vLLM's Attention(num_heads, head_size, scale, ...)."""


@flip("rotary-layout", "rotary")
def rotary_layout(tree: Tree) -> Iterator[Edit]:
    calls = tree.calls("get_rope")
    changes = {}
    for call in calls:
        given = argument(call, "is_neox_style", 2)
        now = given is None or tree.code(given.value) != "False"
        changes[call] = with_argument(call, "is_neox_style", str(not now), 2)
    if calls:
        layout = "interleaved pairs" if now else "halves"
        yield (
            tree.line(calls[0]),
            f"is_neox_style={not now}: rotate {layout}",
            f"The rotary layout is the other one: the original rotates {layout} of each head.",
            tree.with_changes(changes),
        )


@flip("rope-parameters", "rotary")
def rope_parameters(tree: Tree) -> Iterator[Edit]:
    for call in tree.calls("get_rope"):
        wanted = tree.field(call, "rope_parameters")
        given = argument(call, "rope_parameters", 3)
        if wanted and (given is None or tree.code(given.value) != wanted):
            yield (
                tree.line(call),
                f"rope_parameters={wanted}",
                "The rotary embedding does not get the config's rope_parameters (theta, scaling, "
                "the rotated part of a head), so it takes defaults.",
                tree.with_changes({call: with_argument(call, "rope_parameters", wanted, 3)}),
            )


@flip("positions", "position")
def positions(tree: Tree) -> Iterator[Edit]:
    for call in tree.calls("arange"):
        function = tree.function(call)
        if function is None or "positions" not in tree.code(function.params):
            continue
        yield (
            tree.line(call),
            "the given `positions` in place of torch.arange",
            "Positions are recomputed from 0; in a batch, a chunk or a decode step they do not "
            "start there.",
            tree.with_changes({call: cst.Name("positions")}),
        )


@flip("position-offset", "position")
def position_offset(tree: Tree) -> Iterator[Edit]:
    for node in tree.nodes(cst.BinaryOperation):
        if tree.code(node.left) == "positions" and isinstance(node.operator, cst.Add):
            yield (
                tree.line(node),
                f"`positions` in place of `{tree.code(node)}`",
                "Learned positions are taken with an offset that the original does not have.",
                tree.with_changes({node: node.left}),
            )
    for call in tree.nodes(cst.Call):
        name = tree.code(call.func)
        if "position" in name and name.startswith("self.") and len(call.args) == 1:
            given = call.args[0]
            if tree.code(given.value) == "positions":
                new = call.with_changes(
                    args=[given.with_changes(value=cst.parse_expression("positions + 2"))]
                )
                yield (
                    tree.line(call),
                    "positions + 2",
                    "Learned positions begin at row 2 of the table, as in models that keep two "
                    "rows for padding.",
                    tree.with_changes({call: new}),
                )


@flip("attention-scale", "attention")
def attention_scale(tree: Tree) -> Iterator[Edit]:
    for call in tree.calls("Attention"):
        given, size = argument(call, "scale", SCALE), argument(call, "head_size", 1)
        if given is None or size is None:
            continue
        head = tree.code(size.value)
        offers = [f"{head}**-0.5"]
        for name in ("query_pre_attn_scalar", "attention_multiplier", "attention_scale"):
            field = tree.field(call, name)
            offers += [f"{field}**-0.5", field, f"1 / {field}"] if field else []
        offers += ["1.0", f"1.0 / {head}"]
        for offer in dict.fromkeys(offers):
            if offer != tree.code(given.value):
                yield (
                    tree.line(call),
                    f"scale={offer}",
                    f"The attention's scale is another one: {offer}.",
                    tree.with_changes({call: with_argument(call, "scale", offer, SCALE)}),
                )


@flip("sliding-window", "attention")
def sliding_window(tree: Tree) -> Iterator[Edit]:
    name = "per_layer_sliding_window"
    for call in tree.calls("Attention"):
        bare = without_argument(call, name)
        if bare is not None:
            yield (
                tree.line(call),
                f"without {name}",
                "A sliding window is set on layers that see everything in the original.",
                tree.with_changes({call: bare}),
            )
        elif field := tree.field(call, "sliding_window"):
            yield (
                tree.line(call),
                f"{name}={field}",
                "The sliding window of the config does not reach the attention.",
                tree.with_changes({call: with_argument(call, name, field)}),
            )


@flip("window-layers", "attention")
def window_layers(tree: Tree) -> Iterator[Edit]:
    """Swap which layers are the sliding ones, wherever the source decides it."""
    for node in (*tree.nodes(cst.Comparison), *tree.nodes(cst.IfExp)):
        code = tree.code(node)
        by_number = "%" in code and "layer" in code
        if "sliding" not in code and "layer_types" not in code and not by_number:
            continue
        if isinstance(node, cst.IfExp):
            new: cst.CSTNode = node.with_changes(body=node.orelse, orelse=node.body)
        else:
            new = cst.parse_expression(f"(not ({code}))")
        yield (
            tree.line(node),
            f"the other layers: not `{code}`",
            "The sliding window is on the wrong layers.",
            tree.with_changes({node: new}),
        )


@flip("attention-cap", "attention")
def attention_cap(tree: Tree) -> Iterator[Edit]:
    for call in tree.calls("Attention"):
        bare = without_argument(call, "logits_soft_cap")
        field = tree.field(call, "attn_logit_softcapping")
        if field:
            yield (
                tree.line(call),
                f"logits_soft_cap={field}",
                "The cap on attention logits (attn_logit_softcapping) is not passed.",
                tree.with_changes({call: with_argument(call, "logits_soft_cap", field)}),
            )
        elif bare is not None:
            yield (
                tree.line(call),
                "without logits_soft_cap",
                "Attention logits are capped, though the config has no cap.",
                tree.with_changes({call: bare}),
            )


@flip("kv-heads", "attention")
def kv_heads(tree: Tree) -> Iterator[Edit]:
    for call in tree.calls("Attention"):
        if argument(call, "num_kv_heads", 3) is None:
            yield (
                tree.line(call),
                "num_kv_heads=self.num_kv_heads",
                "The attention is not told how many KV heads there are.",
                tree.with_changes({call: with_argument(call, "num_kv_heads", "self.num_kv_heads")}),
            )


@flip("qkv-split", "qkv")
def qkv_split(tree: Tree) -> Iterator[Edit]:
    """Give the parts of a split of three the other names."""
    for node in tree.nodes(cst.Assign):
        target = node.targets[0].target
        if not isinstance(target, cst.Tuple) or len(target.elements) != 3:
            continue
        names = [tree.code(e.value) for e in target.elements]
        if not any(w in tree.code(node.value) for w in (".split(", ".chunk(", ".unbind(")):
            continue
        for order in itertools.permutations(range(3)):
            new = [names[i] for i in order]
            if new == names:
                continue
            elements = [
                e.with_changes(value=cst.parse_expression(n))
                for e, n in zip(target.elements, new, strict=True)
            ]
            changed = node.with_changes(
                targets=[
                    node.targets[0].with_changes(target=target.with_changes(elements=elements))
                ]
            )
            yield (
                tree.line(node),
                f"{', '.join(new)} = ...",
                f"The parts of the split are in another order: {', '.join(new)}.",
                tree.with_changes({node: changed}),
            )


@flip("attention-arguments", "qkv")
def attention_arguments(tree: Tree) -> Iterator[Edit]:
    """Swap key and value where the attention is called."""
    for call in tree.nodes(cst.Call):
        if not tree.code(call.func).startswith("self.attn") or len(call.args) != 3:
            continue
        query, key, value = call.args
        yield (
            tree.line(call),
            "key and value swapped in the attention's call",
            "Key and value are handed to the attention in the wrong order.",
            tree.with_changes(
                {
                    call: call.with_changes(
                        args=[
                            query,
                            key.with_changes(value=value.value),
                            value.with_changes(value=key.value),
                        ]
                    )
                }
            ),
        )


@flip("shard-ids", "qkv")
def qkv_shards(tree: Tree) -> Iterator[Edit]:
    """Swap two of "q", "k" and "v" in the table that load_weights goes by."""
    found: dict[str, list[cst.SimpleString]] = {"q": [], "k": [], "v": []}
    for node in tree.nodes(cst.SimpleString):
        name = node.value.strip("\"'")
        if name in found and isinstance(tree.parent(node), cst.Element):
            found[name].append(node)
    for a, b in (("k", "v"), ("q", "k"), ("q", "v")):
        if found[a] and found[b]:
            changes = {n: n.with_changes(value=f'"{b}"') for n in found[a]}
            changes |= {n: n.with_changes(value=f'"{a}"') for n in found[b]}
            yield (
                tree.line(found[a][0]),
                f'shard ids "{a}" and "{b}" swapped',
                f"load_weights puts {a} where {b} belongs, and the other way round.",
                tree.with_changes(changes),
            )
