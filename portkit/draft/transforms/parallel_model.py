"""Step parallel, layer, model, ForCausalLM: quant_config and prefix everywhere, stages."""

from __future__ import annotations

import libcst as cst

from portkit.analysis.facts import LayerFacts
from portkit.draft import edit
from portkit.draft.blocker import Blocker
from portkit.draft.transforms import recurrent
from portkit.draft.transforms.constructors import add_parameter, pass_argument
from portkit.draft.transforms.parallel_chain import shard_chains
from portkit.draft.work import Work, plain_module, set_method

_QUANT = "quant_config: QuantizationConfig | None = None"


def port_layer(work: Work) -> None:
    wrapper = work.facts.attention_wrapper
    for facts in ((wrapper,) if wrapper is not None else ()) + work.facts.layers:
        _port_layer(work, facts)


def _takes_quantisation(work: Work, call: cst.Call) -> bool:
    """Is it a class of the file whose constructor has quant_config?"""
    name = edit.code(call.func)
    return work.has(name) and "quant_config" in edit.parameters(
        edit.method(work.cls(name), "__init__")
    )


def _port_layer(work: Work, facts: LayerFacts) -> None:
    cls = work.cls(facts.cls)
    init = edit.method(cls, "__init__")
    attrs = (facts.attention_attr, *facts.mlp_attrs, *facts.recurrent_attrs)

    def line(here: cst.CSTNode) -> cst.CSTNode | None:
        pair = edit.assigned_attribute(here) if isinstance(here, cst.SimpleStatementLine) else None
        if pair is None or pair[0] not in attrs:
            return None
        for call in edit.find(pair[1], lambda n: isinstance(n, cst.Call)):
            if edit.is_call(call, *recurrent.WITH_QUANTISATION) or _takes_quantisation(work, call):
                here = pass_argument(here, call, "quant_config=quant_config")
        return here

    body = [edit.replace(node, line) for node in edit.body_of(init)]
    new = add_parameter(edit.with_body(init, body), _QUANT)
    if edit.code(new) != edit.code(init):
        cls, whole = shard_chains(work, set_method(cls, new))
        work.put(cls)
        work.did.append(f"{facts.cls}: passes quant_config and prefix on.")
        if whole:
            work.warnings.append(f"{facts.cls}: {', '.join(whole)} whole on every rank.")


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
    if facts.embedding is None:
        raise Blocker(
            f"{facts.model} makes no embedding of the tokens.",
            work.line_of(f"class {facts.model}"),
            "Make it in __init__: self.embed_tokens = nn.Embedding(...).",
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
        elif attr and facts.embedding.holder and attr == facts.embedding.holder[0]:
            body.append(_held_embedding(work, node))
        elif attr and attr == facts.embedding.attr:
            body.append(_first_stage(work, _embedding(work, node, pair[1]), attr))
        elif attr and attr == facts.final_norm and _calls(work, attr) == 1:
            body.append(only_on("get_pp_group().is_last_rank", node, attr))
        elif edit.find(node, lambda n: edit.is_call(n, "make_layers")):
            call = edit.find(node, lambda n: edit.is_call(n, facts.layer.cls))
            body.append(pass_argument(node, call[0], "quant_config=quant_config") if call else node)
        elif isinstance(node, cst.FunctionDef):
            calls = edit.find(node, lambda n: edit.is_call(n) and "cache_config=" in edit.code(n))
            for call in calls:
                node = pass_argument(node, call, "quant_config=quant_config")
            body.append(node)
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
    cls, _ = shard_chains(work, cls)
    if not any(edit.code(d.decorator) == "support_torch_compile" for d in cls.decorators):
        cls = cls.with_changes(
            decorators=[*cls.decorators, cst.Decorator(cst.Name("support_torch_compile"))]
        )
    work.put(cls)
    work.did.append(f"{facts.model}: VocabParallelEmbedding, pipeline stages, torch.compile.")


def only_on(condition: str, node: edit.Statement, attr: str) -> edit.Statement:
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
    return made.with_changes(leading_lines=node.leading_lines)


def _held_embedding(work: Work, node: edit.Statement) -> edit.Statement:
    """A module that looks tokens up and norms them: it makes the embedding, all on one stage."""
    attr, name = work.facts.embedding.holder
    cls = work.cls(name)
    init = edit.method(cls, "__init__")
    body = []
    for inner in edit.body_of(init):
        pair = edit.assigned_attribute(inner)
        made = pair is not None and pair[0] == work.facts.embedding.attr
        body.append(_embedding(work, inner, pair[1]) if made else inner)
    for parameter in (_QUANT, 'prefix: str = ""'):
        init = add_parameter(init, parameter)
    cls, whole = shard_chains(work, set_method(cls, edit.with_body(init, body)))
    if whole:
        work.warnings.append(f"{name}: {', '.join(whole)} whole on every rank.")
    work.put(plain_module(cls))
    for argument in ("quant_config=quant_config", f'prefix=f"{{prefix}}.{attr}"'):
        call = edit.assigned_attribute(node)[1]
        node = pass_argument(node, call, argument)
    return _first_stage(work, node, attr)


def _calls(work: Work, attr: str) -> int:
    """How often the model's forward calls a module: a norm before the layers, too, is needed on
    the first stage."""
    forward = edit.method(work.cls(work.facts.model), "forward")
    return len(edit.find(forward, lambda n: edit.is_call(n, f"self.{attr}")))


def _first_stage(work: Work, made: edit.Statement, attr: str) -> edit.Statement:
    """Made on the stage that looks tokens up, and where the head is its weights."""
    facts = work.facts
    condition = "get_pp_group().is_first_rank"
    if facts.head is not None and facts.head.can_tie:
        condition += " or (config.tie_word_embeddings and get_pp_group().is_last_rank)"
    return only_on(condition, made, attr)


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
                f"super().__init__({names[0]}, {names[1]}, "
                "quant_config=quant_config, prefix=prefix)"
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
            f"{facts.model}.forward hands {', '.join(extra) or 'nothing'} to its layers "
            "beside the hidden states: "
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
