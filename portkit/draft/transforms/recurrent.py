"""Step forward, mixers that keep a state: vLLM's layer in the decoder layer, and its call.

vLLM's Mamba and short-convolution layers take flat tokens and find their state by their prefix, so
the mixer's own class goes; what it computed is in the arguments (see analysis/recurrent.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import libcst as cst

from portkit.analysis.classes import view_module
from portkit.analysis.facts import LayerFacts
from portkit.analysis.making import made_by
from portkit.analysis.recurrent import VLLM_LAYERS, RecurrentFacts
from portkit.draft import edit
from portkit.draft.blocker import Blocker
from portkit.draft.work import Work, set_method

WITH_POSITIONS = ("MiniMaxText01LinearAttention",)
INTO_OUTPUT = ("MambaMixer", "ShortConv", "OlmoHybridGatedDeltaNetAttention", *WITH_POSITIONS)
"""Layers that write into a tensor they are given; the others return one."""
MENDED = {
    "MiniMaxText01LinearAttention": '''
class {name}(MiniMaxText01LinearAttention):
    def _decode_infer(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        kv_cache: torch.Tensor,
        state_indices_tensor: torch.Tensor,
        attn_metadata: LinearAttentionMetadata,
    ) -> torch.Tensor:
        """Decode, and start from nothing where the token is a prompt's only one.

        vLLM counts a prompt of one token as decoding, and clears states for prefills alone: it
        would go on from the request that had the block before. Padding has the unused block 0.
        """
        rows = slice(attn_metadata.num_decodes)
        slots = state_indices_tensor[rows].clamp(min=0)
        kept = (attn_metadata.seq_lens[rows] > 1).to(kv_cache.dtype)
        kv_cache[slots] = kv_cache[slots] * kept[:, None, None, None]
        return super()._decode_infer(
            q, k, v, kv_cache, state_indices_tensor, attn_metadata
        )
'''
}
"""What a port has to change about one of vLLM's layers, in a subclass of the author's name."""
FROM_VLLM_CONFIG = ("delta_net", "linear_attention")
WITH_QUANTISATION = ("MambaMixer2", "ShortConv")
_LINE = 70


def refuse_unknown(work: Work) -> None:
    """Stop if a mixer is not one that a layer of vLLM computes."""
    for mixer in work.facts.recurrent:
        if not mixer.layer:
            raise Blocker(
                f"{mixer.why}.", mixer.line, f"A person would start from vLLM's {mixer.start}."
            )
        work.warnings += [mixer.note] if mixer.note else []


def mixers_of(work: Work, layer: LayerFacts) -> dict[str, RecurrentFacts]:
    """Attribute -> mixer of one class of decoder layer."""
    view = view_module(work.module.code)
    found = {}
    for attr in layer.recurrent_attrs:
        item = view.classes[layer.cls].get(attr)
        for made in made_by(view, view.classes[layer.cls], item.value) if item else ():
            mixer = work.facts.recurrent_class(made.name)
            if mixer is not None:
                found[attr] = mixer
    return found


def drop_mixer_classes(work: Work) -> None:
    """The mixers' own classes go: one may bear the very name of vLLM's layer."""
    gone = {m.cls: m for m in work.facts.recurrent if m.cls not in VLLM_LAYERS or m.line}
    body: list[cst.CSTNode] = []
    for item in work.module.body:
        mixer = gone.get(item.name.value) if isinstance(item, cst.ClassDef) else None
        if mixer is None:
            body.append(item)
        elif mixer.layer in MENDED:
            made = edit.statement(MENDED[mixer.layer].format(name=mixer.cls))
            body.append(made.with_changes(leading_lines=item.leading_lines))
    work.module = work.module.with_changes(body=body)


def nested(
    body: Iterable[edit.Statement], change: Callable[[edit.Statement], list[edit.Statement]]
) -> list[edit.Statement]:
    """Replace statements one by one, inside `if` and `else`, too."""
    new: list[edit.Statement] = []
    for node in body:
        if isinstance(node, cst.If):
            orelse = node.orelse
            if isinstance(orelse, cst.If):
                orelse = nested([orelse], change)[0]
            elif isinstance(orelse, cst.Else):
                orelse = edit.with_body(orelse, nested(edit.body_of(orelse), change))
            inner = nested(edit.body_of(node), change)
            new.append(edit.with_body(node, inner).with_changes(orelse=orelse))
        else:
            new += change(node)
    return new


# ---- construction -------------------------------------------------------------------------------


def construct(
    work: Work, node: edit.Statement, mixers: dict[str, RecurrentFacts]
) -> list[edit.Statement]:
    """self.mamba = TheirMixer(config, layer_idx) -> guards and vLLM's layer."""
    pair = edit.assigned_attribute(node)
    if pair is None or pair[0] not in mixers or not isinstance(pair[1], cst.Call):
        return [node]
    attr, mixer = pair[0], mixers[pair[0]]
    arguments = [value if name == value else f"{name}={value}" for name, value in mixer.arguments]
    if mixer.kind not in FROM_VLLM_CONFIG:
        arguments += ["model_config=model_config", "cache_config=cache_config"]
    arguments.append(f'prefix=f"{{prefix}}.{attr}"')
    name = mixer.cls if mixer.layer in MENDED else mixer.layer
    made = edit.statement(f"self.{attr} = {name}(\n    " + ",\n    ".join(arguments) + ",\n)")
    made = edit.comment_before(
        made.with_changes(leading_lines=node.leading_lines),
        "vLLM keeps this layer's state by its prefix: it must be unique.",
    )
    body = [*_guards(mixer), made]
    if mixer.in_scale:
        body.append(edit.statement(f"self.{attr}_in_scale = {mixer.in_scale}"))
    if mixer.whole_norm:
        values = dict(mixer.arguments)
        body.append(
            edit.comment_before(
                edit.statement(
                    f"self.{attr}.norm = Mixer2RMSNormGated(\n"
                    f"    {values['intermediate_size']}, 1, eps={mixer.whole_norm}\n)"
                ),
                "All channels are normed together; MambaMixer2 would norm each group of them.",
            )
        )
    if mixer.channel_scale:
        body += _channel_scale(mixer)
    if mixer.norm_eps:
        made = edit.statement(f"self.{attr}.norm.variance_epsilon = {mixer.norm_eps}")
        body.append(edit.comment_before(made, "The original's; vLLM's layer has one of its own."))
    if mixer.decay:
        body += _decay(mixer, attr)
    for name in mixer.given_shards:
        body += _given_shards(f"self.{attr}.{name}.weight", name)
    return body


def _decay(mixer: RecurrentFacts, attr: str) -> list[edit.Statement]:
    """The slopes by the author's formula, and this rank's part of them."""
    *made, slopes = mixer.decay
    first, *rest = edit.statements(
        "\n".join(
            [
                *made,
                f"self.{attr}.slope_rate = {slopes}",
                f"self.{attr}.tp_slope = self.{attr}.slope_rate.chunk(",
                "    get_tensor_model_parallel_world_size()",
                ")[get_tensor_model_parallel_rank()].contiguous()",
            ]
        )
    )
    return [edit.comment_before(first, "The author's decay of each head, not vLLM's."), *rest]


def _given_shards(parameter: str, name: str) -> list[edit.Statement]:
    """The mapper's place for a tensor, handed to a loader that does not look for it there."""
    first, *rest = edit.statements(
        f"{name} = {parameter}\n"
        f"load_{name} = {name}.weight_loader\n"
        f"{name}.weight_loader = lambda param, loaded_weight, shard_id=None: load_{name}(\n"
        "    param, loaded_weight, getattr(loaded_weight, 'shard_id', shard_id)\n)"
    )
    note = "WeightsMapper leaves the part's place on the tensor; this loader wants it as argument."
    return [edit.comment_before(first, note), *rest]


def _channel_scale(mixer: RecurrentFacts) -> list[edit.Statement]:
    """This rank's part of a factor on each channel of the projection."""
    name, value = mixer.channel_scale
    sizes = dict(mixer.arguments)
    inner, groups = sizes["intermediate_size"], sizes["n_groups"]
    states = f"{groups} * {sizes['ssm_state_size']}"
    return edit.statements(f"""
# A factor on each channel of the projection: gate, x, B, C and time steps, in this order.
tp_size = get_tensor_model_parallel_world_size()
tp_rank = get_tensor_model_parallel_rank()
inner = {inner}
states = {states}
z, x, b, c, dt = {value}.flatten().split(
    [inner, inner, states, states, {sizes["num_heads"]}]
)
z, x, dt = (part.chunk(tp_size)[tp_rank] for part in (z, x, dt))
# One group alone is whole on every rank.
if {groups} % tp_size == 0:
    b, c = (part.chunk(tp_size)[tp_rank] for part in (b, c))
self.register_buffer("{name}", torch.cat([z, x, b, c, dt]), persistent=False)
""")


def drop_buffers_from_outside(work: Work) -> None:
    """The model's loop that registers a buffer on each mixer: the layers make their own."""
    names = {m.channel_scale[0] for m in work.facts.recurrent if m.channel_scale}
    cls = work.cls(work.facts.model)
    init = edit.method(cls, "__init__")
    body = [
        node
        for node in edit.body_of(init)
        if not (
            isinstance(node, cst.For)
            and any(f'register_buffer("{n}"' in edit.code(node.body) for n in names)
        )
    ]
    if len(body) != len(edit.body_of(init)):
        work.put(set_method(cls, edit.with_body(init, body)))


def _guards(mixer: RecurrentFacts) -> list[edit.Statement]:
    """Refuse a config with which vLLM's layer would compute something else."""
    return [
        edit.statement(f"if {condition}:\n    raise ValueError({_quoted(message + '.')})")
        for condition, message in mixer.guards
    ]


def _quoted(message: str) -> str:
    return '"' + message.replace('"', "'") + '"'


# ---- the call -----------------------------------------------------------------------------------


def call(
    node: edit.Statement, mixers: dict[str, RecurrentFacts], work: Work, name: str
) -> list[edit.Statement]:
    """x = self.mamba(hidden_states=y, cache_params=..., ...) -> what vLLM's layer takes."""
    calls = [
        c
        for c in edit.find(node, lambda n: isinstance(n, cst.Call))
        if edit.code(c.func).removeprefix("self.") in mixers
        and edit.code(c.func).startswith("self.")
    ]
    if not calls:
        return [node]
    (made,) = calls
    attr = edit.code(made.func).removeprefix("self.")
    mixer = mixers[attr]
    pair = edit.assigned(node)
    target = pair[0] if pair else None
    if isinstance(target, cst.Tuple):
        target = target.elements[0].value
    given = edit.call_argument(made, 0, "hidden_states")
    if given is None:
        given = made.args[0].value if made.args else None
    if pair is None or pair[1] is not made or not isinstance(target, cst.Name) or given is None:
        raise Blocker(
            f"{name}.forward does not assign what self.{attr}(...) returns: "
            f"cannot follow `{edit.flat(node)}`.",
            work.line_of(f"self.{attr}("),
        )
    value = edit.flat(given)
    if mixer.in_scale:
        value = f"{value} * self.{attr}_in_scale"
    if mixer.channel_scale:
        value += f", mup_vector=self.{mixer.channel_scale[0]}"
    if mixer.layer not in INTO_OUTPUT:
        new = edit.statement(f"{target.value} = self.{attr}({value})")
        return [new.with_changes(leading_lines=node.leading_lines)]
    body: list[edit.Statement] = []
    if not isinstance(given, cst.Name):
        body.append(edit.statement(f"mixer_input = {value}"))
        value = "mixer_input"
    output = target.value if target.value != value else "mixer_output"
    given = f"{value}, {output}" + (", positions" if mixer.layer in WITH_POSITIONS else "")
    body += edit.statements(f"{output} = torch.empty_like({value})\nself.{attr}({given})")
    if output != target.value:
        body.append(edit.statement(f"{target.value} = {output}"))
    body[0] = body[0].with_changes(leading_lines=node.leading_lines)
    return body


def with_model_config(signature: str) -> str:
    """Add the parameter that vLLM's state layers need, before cache_config."""
    extra = "model_config: ModelConfig | None = None, "
    return signature.replace("cache_config:", extra + "cache_config:", 1)
