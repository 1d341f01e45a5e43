"""Step forward, the inner model: vLLM's signature, the layers of this stage, embeddings."""

from __future__ import annotations

import libcst as cst

from portkit.draft import edit, prune
from portkit.draft.blocker import Blocker
from portkit.draft.serving.inline import without_copies
from portkit.draft.transforms import layer_list
from portkit.draft.transforms.forward_layer import check_no_leftovers
from portkit.draft.transforms.masked_windows import cache_config
from portkit.draft.work import Work, plain_module, rewrite_init, set_members, set_method

FORWARD = """
def forward(
    self,
    input_ids: torch.Tensor | None,
    positions: torch.Tensor,
    intermediate_tensors: IntermediateTensors | None = None,
    inputs_embeds: torch.Tensor | None = None,
) -> torch.Tensor:
    pass
"""
_MASKS = ("create_causal_mask", "create_sliding_window_causal_mask")
_STATE_MASKS = ("create_recurrent_attention_mask",)
"""Only zero the padding before a mixer: flat tokens have none."""


def port_model(work: Work) -> None:
    """The list of decoder layers: flat tokens, make_layers, embed_input_ids."""
    facts = work.facts
    cls = work.cls(facts.model)
    forward, init = edit.method(cls, "forward"), edit.method(cls, "__init__")
    if "vllm_config" in edit.parameters(init) and "positions" in edit.parameters(forward):
        return
    if "vllm_config" in edit.parameters(init) or "positions" in edit.parameters(forward):
        raise Blocker(
            f"{facts.model} is half ported: __init__ and forward must both take vLLM's arguments.",
            work.line_of(f"class {facts.model}"),
            "Finish or undo that class, then draft again.",
        )
    _check_masks(work, forward)
    new = edit.with_body(edit.function(FORWARD), _model_body(work, forward))
    check_no_leftovers(new, forward, facts.model, work)
    cls = set_method(cls, new)
    after_super = edit.statements(f"""
config = vllm_config.model_config.hf_config
{cache_config(work)}
self.config = config
""")
    body: list[edit.Statement] = []
    for node in edit.body_of(init):
        line = _model_init_line(work, node)
        body += [*layer_list.chooser(work, node), *([] if line is None else [line])]
    cls = rewrite_init(cls, 'self, *, vllm_config: VllmConfig, prefix: str = ""', body, after_super)
    embedding = facts.embedding
    if embedding is None:
        raise Blocker(f"{facts.model} has no embedding.", work.line_of(f"class {facts.model}"))
    cls = _before_forward(cls, embed_method(f"self.{embedding.path}(input_ids)"))
    work.put(plain_module(cls))
    work.did.append(
        f"{facts.model}: input_ids and positions are [num_tokens]; make_layers names each layer."
    )


def embed_method(value: str) -> cst.FunctionDef:
    return edit.blank_before(
        edit.function(
            "def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:\n"
            f"    return {value}"
        )
    )


def _before_forward(cls: cst.ClassDef, new: cst.FunctionDef) -> cst.ClassDef:
    if edit.method(cls, new.name.value) is not None:
        return cls
    members: list[edit.Statement] = []
    for member in edit.members(cls):
        if isinstance(member, cst.FunctionDef) and member.name.value == "forward":
            members += [new, edit.blank_before(member)]
        else:
            members.append(member)
    return set_members(cls, members)


def _check_masks(work: Work, forward: cst.FunctionDef) -> None:
    """Masks must be causal, full or sliding, and agree with what attention is told."""
    names = {n for n in edit.names_read(forward) if n.startswith("create_") and n.endswith("mask")}
    strange = sorted(names - set(_MASKS) - (set(_STATE_MASKS) if work.facts.recurrent else set()))
    if strange:
        raise Blocker(
            f"{work.facts.model}.forward builds a mask by {strange[0]}: "
            "vLLM's Attention has no such mask.",
            work.line_of(strange[0] + "("),
        )
    attention = work.facts.attention
    if _MASKS[1] in names and "per_layer_sliding_window" not in edit.code(work.cls(attention.cls)):
        raise Blocker(
            f"{work.facts.model} masks a sliding window that {attention.cls} does not pass on.",
            work.line_of(_MASKS[1] + "("),
        )


def _model_body(work: Work, forward: cst.FunctionDef) -> list[edit.Statement]:
    facts = work.facts
    cls = work.cls(facts.model)
    forward = prune.drop_dropout_calls(prune.inference_only(forward), prune.dropout_attributes(cls))
    layer_input = edit.parameters(edit.method(work.cls(facts.layer.cls), "forward"))[1]
    body: list[edit.Statement] = []
    for node in edit.body_of(forward):
        if isinstance(node, cst.If) and _asks_positions(node.test):
            continue
        if isinstance(node, cst.For) and _is_layer_loop(node, facts.layers_attr):
            node = _layer_loop(work, node, layer_input)
        body.append(returned(node, "last_hidden_state"))
    if not any(isinstance(n, cst.For) for n in body):
        raise Blocker(
            f"{facts.model}.forward has no loop over self.{facts.layers_attr}.",
            work.line_of(f"class {facts.model}"),
        )
    body = [_plain_assign(edit.rename_reads(n, {"position_ids": "positions"})) for n in body]
    if facts.embedding is None:
        raise Blocker(f"{facts.model} has no embedding.", work.line_of(f"class {facts.model}"))
    embedding = facts.embedding.attr
    body = [
        edit.replace_text(n, f"self.{embedding}(input_ids)", "self.embed_input_ids(input_ids)")
        for n in body
    ]
    return [_plain_loop(n) for n in prune.live_body(body)]


def _asks_positions(test: cst.BaseExpression) -> bool:
    """Whether positions are given, or have an axis for images: vLLM's are always [num_tokens]."""
    shown = edit.code(test)
    return shown.startswith("position_ids is None") or (
        edit.names_read(test) == {"position_ids"} and "position_ids.ndim ==" in shown
    )


def _is_layer_loop(node: cst.For, attr: str) -> bool:
    return f"self.{attr}" in edit.code(node.iter)


def _layer_loop(work: Work, node: cst.For, layer_input: str) -> cst.For:
    """for decoder_layer in self.layers[...]: one call with positions."""
    target = node.target
    variable = (
        edit.code(target.elements[-1].value) if isinstance(target, cst.Tuple) else edit.code(target)
    )

    def change(here: cst.CSTNode) -> cst.CSTNode | None:
        if not edit.is_call(here, variable):
            return None
        given = edit.call_argument(here, 0, layer_input)
        if given is None:
            raise Blocker(
                f"{work.facts.model}.forward passes no {layer_input} to its layers.",
                work.line_of(variable),
            )
        return edit.expression(f"{variable}(positions, {edit.code(given)})")

    def first(here: cst.CSTNode) -> cst.CSTNode | None:
        if (
            isinstance(here, cst.Subscript)
            and edit.code(here).endswith("[0]")
            and (
                (isinstance(here.value, cst.Name) and here.value.value.endswith("outputs"))
                or edit.is_call(here.value, variable)
            )
        ):
            return here.value
        if isinstance(here, cst.Assign) and edit.is_call(here.value, variable):
            target = here.targets[0].target
            if isinstance(target, cst.Tuple):
                return here.with_changes(targets=[cst.AssignTarget(target.elements[0].value)])
        return None

    node = edit.replace(edit.replace(node, change), first)
    body = [s for s in edit.body_of(node) if not _hidden_state_recording(s)]
    body = without_copies(body)
    layers = f"islice(self.{work.facts.layers_attr}, self.start_layer, self.end_layer)"
    numbered = isinstance(target, cst.Tuple)
    return edit.with_body(node, body).with_changes(
        iter=edit.expression(f"enumerate({layers})" if numbered else layers)
    )


def _hidden_state_recording(node: edit.Statement) -> bool:
    return isinstance(node, cst.If) and "output_" in edit.code(node.test)


def _plain_loop(node: edit.Statement) -> edit.Statement:
    """Drop an index that only picked the mask."""
    if not isinstance(node, cst.For) or not isinstance(node.target, cst.Tuple):
        return node
    index, variable = (e.value for e in node.target.elements)
    if edit.is_call(node.iter, "enumerate") and edit.code(index) not in edit.names_read(node.body):
        return node.with_changes(target=variable, iter=node.iter.args[0].value)
    return node


def _plain_assign(node: edit.Statement) -> edit.Statement:
    """inputs_embeds: torch.Tensor = ... -> inputs_embeds = ..."""

    def change(here: cst.CSTNode) -> cst.CSTNode | None:
        if (
            isinstance(here, cst.AnnAssign)
            and here.value is not None
            and isinstance(here.target, cst.Name)
        ):
            return cst.Assign([cst.AssignTarget(here.target)], here.value)
        return None

    return edit.replace(node, change)


def returned(node: edit.Statement, keyword: str) -> edit.Statement:
    """return SomeOutput(last_hidden_state=x, ...) -> return x."""
    small = edit.single(node)
    if isinstance(small, cst.Return) and isinstance(small.value, cst.Call):
        value = edit.call_argument(small.value, 99, keyword)
        if value is not None:
            return node.with_changes(body=[small.with_changes(value=value)])
    return node


def _model_init_line(work: Work, node: edit.Statement) -> edit.Statement | None:
    facts = work.facts
    pair = edit.assigned_attribute(node)
    if pair is None:
        rotary = facts.rotary.cls if facts.rotary else ""
        makes = isinstance(node, cst.For) and edit.find(node, lambda n: edit.is_call(n, rotary))
        return None if makes and rotary else node
    attr, value = pair
    if edit.code(value) == "nn.ModuleList()" and "rotary" in attr:
        return None
    if attr in ("config", "gradient_checkpointing", "padding_idx") and attr != "padding_idx":
        return None
    made = value.body if isinstance(value, cst.IfExp) else value
    if facts.rotary and edit.is_call(made, facts.rotary.cls):
        return None
    if attr == facts.layers_attr:
        return _layers(work, node, value)
    return node


def _layers(work: Work, node: edit.Statement, value: cst.BaseExpression) -> edit.Statement:
    """nn.ModuleList([Layer(config, i) for i in range(n)]) -> make_layers(n, lambda prefix: ...)."""
    comprehension = next(
        iter(edit.find(value, lambda n: isinstance(n, cst.ListComp | cst.GeneratorExp))), None
    )
    name = work.facts.layer.cls
    chosen = bool(layer_list.chooser(work, node))
    if comprehension is None or not (chosen or edit.is_call(comprehension.elt, name)):
        raise Blocker(
            f"{work.facts.model}: the layers are not made by one comprehension over {name}(...).",
            work.line_of(f"self.{work.facts.layers_attr} ="),
        )
    count = comprehension.for_in.iter
    if not edit.is_call(count, "range") or len(count.args) != 1:
        raise Blocker(
            f"{work.facts.model}: cannot tell how many layers there are.",
            work.line_of(f"self.{work.facts.layers_attr} ="),
        )
    made = "get_layer"
    if not chosen:
        index = edit.code(comprehension.for_in.target)
        kept = [a for a in comprehension.elt.args if edit.code(a.value) != index]
        arguments = [edit.flat(a.with_changes(comma=cst.MaybeSentinel.DEFAULT)) for a in kept]
        arguments += layer_list.more_arguments(work)
        made = f"lambda prefix: {name}({', '.join(arguments)})"
    attr = work.facts.layers_attr
    return edit.statement(f"""
self.start_layer, self.end_layer, self.{attr} = make_layers(
    {edit.code(count.args[0].value)},
    {made},
    prefix=f"{{prefix}}.{attr}",
)
""").with_changes(leading_lines=node.leading_lines)


def construct_model(name: str, attr: str) -> str:
    return f'self.{attr} = {name}(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "{attr}"))'
