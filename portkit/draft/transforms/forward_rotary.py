"""Step forward, rotary: vLLM's get_rope where it computes the same, else the author's own code.

get_rope wins where the facts say that it pairs the same dimensions with the same frequencies: its
kernels are fast, and its tables are shared by all layers. Where they do not, the author's class and
function stay, called with flat positions, and a comment says why.
"""

from __future__ import annotations

from dataclasses import dataclass

import libcst as cst

from portkit.analysis.classes import call_name, view_module
from portkit.analysis.rotary_class import read_rotary_class
from portkit.analysis.rotary_table import RotaryTable
from portkit.draft import edit, prune
from portkit.draft.blocker import Blocker
from portkit.draft.work import Work, set_method

_OWN = '''
def rotate(
    self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys by the author's own code."""
    # The author's class wants [batch, seq]: all tokens are one sequence.
    cos, sin = self.rotary_emb({arguments})
    query, key = (x.unflatten(-1, (-1, {head_dim})) for x in (query, key))
    query, key = {function}(query, key, cos[0], sin[0])
    return query.flatten(-2), key.flatten(-2)
'''


@dataclass(frozen=True)
class RotaryPlan:
    """How this attention will rotate."""

    call: str
    """What forward calls with (positions, query, key)."""
    init: tuple[edit.Statement, ...] = ()
    methods: tuple[cst.FunctionDef, ...] = ()
    gone: tuple[str, ...] = ()
    """Attributes of the attention that get_rope makes unnecessary."""
    did: str = ""
    warning: str = ""


def plan_rotary(work: Work) -> RotaryPlan:
    """get_rope, or the author's own class and function. Raises Blocker if it can be neither."""
    rotary = work.facts.rotary
    if rotary is None:
        return RotaryPlan("self.rotary_emb")
    if rotary.table is not None:
        return _instead_of_table(work, rotary.table)
    view = view_module(work.module.code).classes[rotary.cls]
    reads = read_rotary_class(view)
    if rotary.layout == "unknown" or reads.strange:
        why = reads.strange and f"{rotary.cls} {reads.strange}"
        return _own(work, why or rotary.why, reads.by_layer_type)
    parameters = "config.rope_parameters"
    if reads.by_layer_type:
        parameters += f"[{layer_type(work)}]"
    if reads.default_factor:
        parameters = f'{{"partial_rotary_factor": {reads.default_factor}, **{parameters}}}'
    halves = rotary.is_neox_style
    comment = [
        "Dimensions are rotated in halves (i, i + n/2)."
        if halves
        else "Neighbouring dimensions (2i, 2i + 1) are rotated together."
    ]
    warning = ""
    if reads.note:
        comment.append(f"PORT: {reads.note}.")
        warning = reads.note + "."
    made = edit.comment_before(
        edit.statement(f"""
self.rotary_emb = get_rope(
    {work.facts.attention.head_dim},
    max_position=config.max_position_embeddings,
    rope_parameters={parameters},
    is_neox_style={halves},
)
"""),
        *comment,
    )
    style = "halves, is_neox_style=True" if halves else "neighbours, is_neox_style=False"
    return RotaryPlan(
        "self.rotary_emb",
        (edit.blank_before(made),),
        gone=_held(work),
        did=f"{rotary.function} pairs {style}: get_rope rotates by `positions`.",
        warning=warning,
    )


def _held(work: Work) -> tuple[str, ...]:
    """Attributes of the attention that hold the rotary class: it makes its own angles."""
    view = view_module(work.module.code).classes[work.facts.attention.cls]
    return tuple({i.attr for i in view.assigned if call_name(i.value) == work.facts.rotary.cls})


def layer_type(work: Work) -> str:
    """Source for the type of the layer that is being made: config.layer_types[layer_idx].

    Read from the key by which the model picks a layer's position embeddings.
    """
    facts = work.facts
    forward = edit.method(work.cls(facts.model), "forward")
    for loop in edit.find(forward, lambda n: isinstance(n, cst.For)):
        for given in edit.find(loop.body, lambda n: isinstance(n, cst.Arg)):
            if not (given.keyword and given.keyword.value == "position_embeddings"):
                continue
            value = given.value
            if not isinstance(value, cst.Subscript) or not isinstance(loop.target, cst.Tuple):
                continue
            key = edit.code(value.slice[0].slice)
            index = edit.code(loop.target.elements[0].value)
            if key.startswith("self.config.") and key.endswith(f"[{index}]"):
                return key.removeprefix("self.").removesuffix(f"[{index}]") + "[layer_idx]"
    raise Blocker(
        f"{facts.model} gives each layer type its own rotary embedding, in a way that this draft "
        "does not know.",
        facts.rotary.line if facts.rotary else 0,
        "Compare with vLLM's Gemma3Attention.",
    )


def _instead_of_table(work: Work, table: RotaryTable) -> RotaryPlan:
    halves = table.layout == "half"
    made = edit.statement(f"""
self.rotary_emb = get_rope(
    {work.facts.attention.head_dim},
    max_position=config.max_position_embeddings,
    rope_parameters={{
        "rope_type": "default",
        "rope_theta": {table.base},
        "rope_dim": {table.dim},
    }},
    is_neox_style={halves},
)
""")
    pairs = "halves (i, i + n/2)" if halves else "neighbours (2i, 2i + 1)"
    made = edit.comment_before(made, f"The author's table of sines and cosines, for {pairs}.")
    return RotaryPlan(
        "self.rotary_emb",
        (edit.blank_before(made),),
        gone=(table.attr,),
        did=f"{table.function} and its table: get_rope rotates {pairs} by `positions`.",
    )


# ---- the author's own ---------------------------------------------------------------------------


def _own(work: Work, why: str, by_layer_type: bool) -> RotaryPlan:
    facts, rotary = work.facts, work.facts.rotary
    function = next(
        f
        for f in work.module.body
        if isinstance(f, cst.FunctionDef) and f.name.value == rotary.function
    )
    if "unsqueeze_dim" not in edit.parameters(function) or edit.parameters(function)[2:4] != [
        "cos",
        "sin",
    ]:
        raise Blocker(f"cannot tell how positions rotate queries and keys: {why}.", rotary.line)
    made = _construction(work)
    arguments = "query, positions[None]"
    init = [edit.statement(f"self.rotary_emb = {made}")]
    if by_layer_type:
        arguments += ", self.layer_type"
        init.insert(0, edit.statement(f"self.layer_type = {layer_type(work)}"))
    init[0] = edit.comment_before(
        edit.blank_before(init[0]), "The author's own, not get_rope:", f"{why}."
    )
    work.put(_flat_class(work.cls(rotary.cls)))
    method = edit.function(
        _OWN.format(
            arguments=arguments,
            head_dim=facts.attention.head_dim,
            function=rotary.function,
        )
    )
    return RotaryPlan(
        "self.rotate",
        tuple(init),
        (method,),
        did=f"{rotary.cls} and {rotary.function} stay: {why}.",
    )


def _construction(work: Work) -> str:
    """How the model or the attention makes its rotary class."""
    facts = work.facts
    for owner in (facts.model, facts.attention.cls):
        init = edit.method(work.cls(owner), "__init__")
        for node in edit.body_of(init) if init is not None else ():
            pair = edit.assigned_attribute(node)
            if (
                pair
                and edit.is_call(pair[1], facts.rotary.cls)
                and edit.names_read(pair[1]) <= {facts.rotary.cls, "config"}
            ):
                return edit.flat(pair[1])
    raise Blocker(
        f"cannot tell how {facts.rotary.cls} is made: it needs more than the config.",
        facts.rotary.line,
    )


def _flat_class(cls: cst.ClassDef) -> cst.ClassDef:
    """Without what changes frequencies while serving, and without autocast, which is never on."""
    forward = edit.method(cls, "forward")
    body: list[edit.Statement] = []
    for node in edit.body_of(forward):
        body += edit.body_of(node) if isinstance(node, cst.With) else [node]
    forward = edit.with_body(forward, prune.live_body(body)).with_changes(decorators=[])
    cls = set_method(cls, forward)
    init = edit.method(cls, "__init__")
    read = edit.self_attributes_read(cls)
    kept = []
    for node in edit.body_of(init):
        pair = edit.assigned_attribute(node)
        if pair and pair[0] not in read and edit.is_call(pair[1], "nn.Buffer"):
            continue
        kept.append(node)
    return set_method(cls, edit.with_body(init, kept))
