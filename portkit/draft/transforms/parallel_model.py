"""Step parallel, layer, model and ForCausalLM: quant_config and prefix everywhere, pipeline stages."""

from __future__ import annotations

import libcst as cst

from portkit.draft import edit
from portkit.draft.blocker import Blocker
from portkit.draft.transforms.constructors import add_parameter, pass_argument
from portkit.draft.transforms.parallel_mlp import FUSED
from portkit.draft.work import Work, set_members, set_method

_QUANT = "quant_config: QuantizationConfig | None = None"


def port_layer(work: Work) -> None:
    facts = work.facts.layer
    cls = work.cls(facts.cls)
    init = edit.method(cls, "__init__")
    takes = {}
    for attr in (facts.attention_attr, *facts.mlp_attrs):
        call = next(
            (
                p[1]
                for s in edit.body_of(init)
                if (p := edit.assigned_attribute(s)) and p[0] == attr
            ),
            None,
        )
        if isinstance(call, cst.Call):
            made = edit.method(work.cls(edit.code(call.func)), "__init__")
            if "quant_config" in edit.parameters(made):
                takes[attr] = call
    body = []
    for node in edit.body_of(init):
        attr = (edit.assigned_attribute(node) or ("",))[0]
        body.append(
            pass_argument(node, takes[attr], "quant_config=quant_config") if attr in takes else node
        )
    new = add_parameter(edit.with_body(init, body), _QUANT)
    if edit.code(new) != edit.code(init):
        work.put(set_method(cls, new))
        work.did.append(f"{facts.cls}: passes quant_config and prefix on.")


# ---- the model ----------------------------------------------------------------------------------


def port_model(work: Work) -> None:
    facts = work.facts
    cls = work.cls(facts.model)
    init, forward = edit.method(cls, "__init__"), edit.method(cls, "forward")
    if "make_empty_intermediate_tensors" in edit.code(
        init
    ) and "VocabParallelEmbedding" in edit.code(init):
        return
    if "get_pp_group" in edit.code(cls):
        raise Blocker(
            f"{facts.model} is half ported: it has pipeline stages but not all of step parallel.",
            work.line_of(f"class {facts.model}"),
            "Finish or undo that class, then draft again.",
        )
    hidden, new_forward = _staged_forward(work, forward)
    body: list[edit.Statement] = []
    for node in edit.body_of(init):
        pair = edit.assigned_attribute(node)
        attr = pair[0] if pair else ""
        if attr == "config":
            body += [
                node,
                edit.statement("quant_config = vllm_config.quant_config"),
                edit.statement("self.quant_config = quant_config"),
            ]
        elif attr == facts.embedding.attr:
            body.append(_embedding(work, node, pair[1]))
        elif attr == facts.final_norm:
            body.append(_only_on("get_pp_group().is_last_rank", node, attr))
        elif edit.find(node, lambda n: edit.is_call(n, "make_layers")):
            call = edit.find(node, lambda n: edit.is_call(n, facts.layer.cls))
            body.append(pass_argument(node, call[0], "quant_config=quant_config") if call else node)
        else:
            body.append(node)
    body.append(
        edit.blank_before(
            edit.statement(f"""
self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
    ["{hidden}"], config.hidden_size
)
""")
        )
    )
    cls = set_method(set_method(cls, edit.with_body(init, body)), new_forward)
    if not any(edit.code(d.decorator) == "support_torch_compile" for d in cls.decorators):
        cls = cls.with_changes(
            decorators=[*cls.decorators, cst.Decorator(cst.Name("support_torch_compile"))]
        )
    work.put(cls)
    work.did.append(f"{facts.model}: VocabParallelEmbedding, pipeline stages, torch.compile.")


def _only_on(condition: str, node: edit.Statement, attr: str) -> edit.Statement:
    """Make a submodule only on the pipeline stages that need it."""
    made = edit.statement(f"if {condition}:\n    pass\nelse:\n    self.{attr} = PPMissingLayer()")
    inner = node.with_changes(leading_lines=[])
    return edit.with_body(made, [inner]).with_changes(leading_lines=node.leading_lines)


def _embedding(work: Work, node: edit.Statement, call: cst.BaseExpression) -> edit.Statement:
    facts = work.facts
    attr, name = facts.embedding.attr, facts.embedding.cls
    rows, columns = (
        edit.flat(edit.call_argument(call, i, n))
        for i, n in enumerate(("num_embeddings", "embedding_dim"))
    )
    arguments = [rows, columns]
    if name not in ("nn.Embedding", "VocabParallelEmbedding"):
        arguments += _own_embedding(work, call)
        name = facts.embedding.cls
    else:
        name = "VocabParallelEmbedding"
    arguments += ["quant_config=quant_config", f'prefix=f"{{prefix}}.{attr}"']
    made = edit.statement(f"self.{attr} = {name}(\n    " + ",\n    ".join(arguments) + ",\n)")
    made = made.with_changes(leading_lines=node.leading_lines)
    condition = "get_pp_group().is_first_rank"
    if facts.head is not None and facts.head.can_tie:
        condition += " or (config.tie_word_embeddings and get_pp_group().is_last_rank)"
    return _only_on(condition, made, attr)


def _own_embedding(work: Work, call: cst.Call) -> list[str]:
    """An nn.Embedding subclass that scales: the same subclass of VocabParallelEmbedding."""
    name = work.facts.embedding.cls
    cls = work.cls(name)
    init = edit.method(cls, "__init__")
    body = []
    for node in edit.body_of(init):
        small = edit.single(node)
        if isinstance(small, cst.Expr) and edit.code(small.value).startswith("super().__init__("):
            names = edit.parameters(init)
            node = edit.statement(
                f"super().__init__({names[0]}, {names[1]}, quant_config=quant_config, prefix=prefix)"
            )
        body.append(node)
    kept = [
        edit.code(p.with_changes(comma=cst.MaybeSentinel.DEFAULT)).strip()
        for p in init.params.params
        if p.name.value != "padding_idx"
    ]
    kept += [_QUANT, 'prefix: str = ""']
    new = edit.with_body(edit.function(f"def __init__({', '.join(kept)}):\n    pass"), body)
    forward = edit.method(cls, "forward")
    if forward is None or "super().forward(" not in edit.code(forward):
        raise Blocker(
            f"{name}.forward does more than look up and scale.", work.line_of(f"class {name}")
        )
    cls = set_method(cls, new).with_changes(bases=[cst.Arg(cst.Name("VocabParallelEmbedding"))])
    work.put(cls)
    work.did.append(f"{name}: a VocabParallelEmbedding that scales as before.")
    return [
        edit.flat(a.with_changes(comma=cst.MaybeSentinel.DEFAULT))
        for a in call.args
        if a.keyword is not None
        and a.keyword.value not in ("num_embeddings", "embedding_dim", "padding_idx")
    ]


def _staged_forward(work: Work, forward: cst.FunctionDef) -> tuple[str, cst.FunctionDef]:
    """(name of the tensor between stages, forward that starts and ends where its stage does)."""
    facts = work.facts
    body = edit.body_of(forward)
    index = next(
        (
            i
            for i, n in enumerate(body)
            if isinstance(n, cst.For) and f"self.{facts.layers_attr}" in edit.code(n.iter)
        ),
        None,
    )
    if index is None:
        raise Blocker(
            f"{facts.model}.forward has no loop over self.{facts.layers_attr}.",
            work.line_of(f"class {facts.model}"),
        )
    before, loop, after = body[:index], body[index], body[index + 1 :]
    assigned = {edit.code(p[0]) for n in edit.body_of(loop) if (p := edit.assigned(n)) is not None}
    fed = {n for s in before for n in _bound(s)} & edit.names_read(loop)
    hidden = sorted(assigned & fed)
    if len(hidden) != 1 or fed - set(hidden):
        extra = sorted(fed - set(hidden)) or hidden
        raise Blocker(
            f"{facts.model}.forward hands {', '.join(extra) or 'nothing'} to its layers beside the hidden states: "
            "every pipeline stage would need it.",
            work.line_of(f"class {facts.model}"),
        )
    name = hidden[0]
    first = edit.statement(f"""
if get_pp_group().is_first_rank:
    pass
else:
    assert intermediate_tensors is not None
    {name} = intermediate_tensors["{name}"]
""")
    last = edit.statements(f"""
if not get_pp_group().is_last_rank:
    return IntermediateTensors({{"{name}": {name}}})
""")
    new_loop = (
        loop
        if edit.is_call(loop.iter, "islice", "enumerate")
        else loop.with_changes(
            iter=edit.expression(
                f"islice(self.{facts.layers_attr}, self.start_layer, self.end_layer)"
            )
        )
    )
    staged = edit.with_body(
        forward,
        [
            edit.with_body(first, before),
            edit.blank_before(new_loop),
            edit.blank_before(last[0]),
            *after,
        ],
    )
    returns = cst.Annotation(edit.expression("torch.Tensor | IntermediateTensors"))
    return name, staged.with_changes(returns=returns)


def _bound(node: edit.Statement) -> set[str]:
    names: set[str] = set()
    for target in edit.find(node, lambda n: isinstance(n, cst.AssignTarget)):
        names |= {n.value for n in edit.find(target.target, lambda n: isinstance(n, cst.Name))}
    return names


# ---- ForCausalLM --------------------------------------------------------------------------------


def port_causal_lm(work: Work) -> None:
    facts = work.facts
    cls = work.cls(facts.causal_lm)
    init = edit.method(cls, "__init__")
    head = facts.head
    if head is None:
        raise Blocker(
            f"{facts.causal_lm} has no language-model head.",
            work.line_of(f"class {facts.causal_lm}"),
        )
    if "ParallelLMHead" in edit.code(init) and "LogitsProcessor" in edit.code(init):
        cls = _mixins(work, cls)
        work.put(cls)
        return
    logits, processor, biased = _logits(work, cls)
    body: list[edit.Statement] = []
    for node in edit.body_of(init):
        pair = edit.assigned_attribute(node)
        attr = pair[0] if pair else ""
        if attr == "config":
            body += [
                node,
                edit.statement("quant_config = vllm_config.quant_config"),
                edit.statement("self.quant_config = quant_config"),
            ]
        elif attr == head.attr:
            body.append(_head(work, node, pair[1], processor))
        elif isinstance(node, cst.If) and f"self.{head.attr}.weight" in edit.code(node):
            continue
        else:
            body.append(node)
    body.append(
        edit.blank_before(
            edit.statement(
                f"self.make_empty_intermediate_tensors = (\n    self.{facts.model_attr}.make_empty_intermediate_tensors\n)"
            )
        )
    )
    cls = set_method(cls, edit.with_body(init, body))
    forward = edit.method(cls, "forward")
    cls = set_method(
        cls,
        forward.with_changes(
            returns=cst.Annotation(edit.expression("torch.Tensor | IntermediateTensors"))
        ),
    )
    compute = edit.method(cls, "compute_logits")
    cls = set_method(
        cls,
        edit.with_body(compute, logits).with_changes(
            returns=cst.Annotation(edit.expression("torch.Tensor | None"))
        ),
    )
    del biased
    work.put(_mixins(work, cls))
    work.did.append(
        f"{facts.causal_lm}: ParallelLMHead and LogitsProcessor, packed_modules_mapping, LoRA, pipelines."
    )


def _head(work: Work, node: edit.Statement, call: cst.Call, processor: str) -> edit.Statement:
    head = work.facts.head
    rows, columns = (
        edit.call_argument(call, 1, "out_features"),
        edit.call_argument(call, 0, "in_features"),
    )
    bias = f"    bias={head.bias},\n    " if head.bias != "False" else "    "
    tie = (
        f"""
    if config.tie_word_embeddings:
        # The checkpoint has no {head.attr}.weight of its own.
        self.{head.attr} = self.{head.attr}.tie_weights(self.{work.facts.model_attr}.{work.facts.embedding.attr})
"""
        if head.can_tie
        else "\n"
    )
    return edit.statement(f"""
if get_pp_group().is_last_rank:
    self.{head.attr} = ParallelLMHead(
        {edit.flat(rows)},
        {edit.flat(columns)},
    {bias}    quant_config=quant_config,
        prefix=maybe_prefix(prefix, "{head.attr}"),
    ){tie}    self.logits_processor = LogitsProcessor({processor})
else:
    self.{head.attr} = PPMissingLayer()
""").with_changes(leading_lines=node.leading_lines)


def _logits(work: Work, cls: cst.ClassDef) -> tuple[list[edit.Statement], str, bool]:
    """(body of compute_logits, arguments of LogitsProcessor, has bias)."""
    head = work.facts.head
    compute = edit.method(cls, "compute_logits")
    if compute is None:
        raise Blocker(
            f"{work.facts.causal_lm} has no compute_logits: do step forward first.",
            work.line_of(f"class {work.facts.causal_lm}"),
        )
    biased = head.bias != "False"
    call_extra = f", self.{head.attr}.bias" if biased else ""
    vocabulary = "config.vocab_size"
    found = edit.find(compute, lambda n: edit.is_call(n, f"self.{head.attr}"))
    if len(found) != 1:
        raise Blocker(
            f"{work.facts.causal_lm}.compute_logits calls self.{head.attr} {len(found)} times.",
            work.line_of("def compute_logits"),
        )
    given = edit.flat(found[0].args[0].value)
    new_call = f"self.logits_processor(self.{head.attr}, {given}{call_extra})"

    def replaced(node: edit.Statement) -> edit.Statement:
        return edit.replace(
            node,
            lambda n: edit.expression(new_call) if edit.is_call(n, f"self.{head.attr}") else None,
        )

    body = edit.body_of(compute)
    index = next(
        i
        for i, n in enumerate(body)
        if edit.find(n, lambda n: edit.is_call(n, f"self.{head.attr}"))
    )
    after = [n for n in body[index + 1 :] if not isinstance(edit.single(n), cst.Return)]
    if not after:
        return [replaced(n) for n in body], vocabulary, biased
    only_scale = head.scale and not head.soft_cap and len(after) == 1
    only_cap = head.soft_cap and not head.scale and len(after) in (1, 3)
    if only_scale or only_cap:
        argument = f"scale={head.scale}" if only_scale else f"soft_cap={head.soft_cap}"
        kept = [replaced(n) for n in body[:index]]
        return [*kept, edit.statement(f"return {new_call}")], f"{vocabulary}, {argument}", biased
    guard = edit.statement(
        "if logits is None:\n    # Only one rank of the group gets the gathered logits.\n    return None"
    )
    return (
        [*(replaced(n) for n in body[: index + 1]), guard, *body[index + 1 :]],
        vocabulary,
        biased,
    )


def _mixins(work: Work, cls: cst.ClassDef) -> cst.ClassDef:
    """Base classes and class attributes that LoRA, quantisation and pipelines read."""
    bases = [edit.code(b.value) for b in cls.bases]
    for mixin in ("SupportsLoRA", "SupportsPP"):
        if mixin not in bases:
            bases.append(mixin)
    cls = cls.with_changes(bases=[cst.Arg(edit.expression(b)) for b in bases])
    attributes = []
    written = edit.code(cls)
    if "packed_modules_mapping" not in written and (packed := packed_modules(work)):
        lines = "".join(
            f'    "{fused}": [{", ".join(f"{chr(34)}{p}{chr(34)}" for p in parts)}],\n'
            for fused, parts in packed.items()
        )
        made = edit.statement("packed_modules_mapping = {\n" + lines + "}")
        notes = ["Which linears of the checkpoint each fused linear holds."]
        if any("packed_modules_mapping assumes" in warning for warning in work.warnings):
            notes.append("PORT: the usual names; compare with the checkpoint's.")
        attributes.append(edit.comment_before(made, *notes))
    if "embedding_modules" not in written:
        attributes.append(
            edit.statement(f"""
embedding_modules = {{
    "{work.facts.embedding.attr}": "input_embeddings",
    "{work.facts.head.attr}": "output_embeddings",
}}
""")
        )
    if not attributes:
        return cls
    members = edit.members(cls)
    head = members[:1] if members and edit.is_docstring(members[0]) else []
    rest = members[len(head) :]
    rest[0] = edit.blank_before(rest[0])
    return set_members(cls, [*head, *attributes, *rest])


def packed_modules(work: Work) -> dict[str, list[str]]:
    """Fused linear -> the checkpoint's linears, in order. Facts are those of the file before the draft."""
    facts = work.facts
    packed: dict[str, list[str]] = {}
    attention = facts.attention
    if attention.qkv is not None and attention.qkv.cls == "QKVParallelLinear":
        packed[attention.qkv.attr] = _usual_names(work, attention.qkv.attr, ["q_proj", "k_proj", "v_proj"])
    elif attention.qkv is not None:
        packed["qkv_proj"] = [attention.qkv.attr]
    elif attention.q and attention.k and attention.v:
        packed["qkv_proj"] = [attention.q.attr, attention.k.attr, attention.v.attr]
    for mlp in facts.mlp:
        if mlp.kind == "gated":
            packed[FUSED] = [mlp.gate.attr, mlp.up.attr]
        elif mlp.kind == "gated_fused":
            packed[mlp.up.attr] = [mlp.up.attr]
        for node in edit.body_of(edit.method(work.cls(mlp.cls), "__init__")):
            pair = edit.assigned_attribute(node)
            if pair and edit.is_call(pair[1], "MergedColumnParallelLinear") and pair[0] not in packed:
                packed[pair[0]] = _usual_names(work, pair[0], ["gate_proj", "up_proj"])
    return packed


def _usual_names(work: Work, fused: str, names: list[str]) -> list[str]:
    """For a linear that was fused by hand, the file no longer says what the checkpoint calls its parts."""
    shown = ", ".join(names)
    work.warnings.append(
        f"{fused} was fused by hand: packed_modules_mapping assumes that the checkpoint's parts are "
        f"{shown}. Compare with the checkpoint."
    )
    return names
