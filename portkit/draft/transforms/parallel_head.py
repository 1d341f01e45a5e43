"""Step parallel, ForCausalLM: head, logits, and what LoRA, quantisation and pipelines read."""

from __future__ import annotations

import re

import libcst as cst

from portkit.draft import edit
from portkit.draft.blocker import Blocker
from portkit.draft.transforms.constructors import add_parameter, pass_argument
from portkit.draft.transforms.fused_qkv import reorders
from portkit.draft.transforms.parallel_chain import shard_chains
from portkit.draft.transforms.parallel_mlp import FUSED
from portkit.draft.transforms.parallel_model import only_on
from portkit.draft.work import Work, plain_module, set_members, set_method

STACKED = re.compile(r'"\.\w+\.(\w+)\.": \("\.\w+\.(\w+)\.", ')
"""An entry of orig_to_new_stacked: part, fused."""


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
    if edit.method(cls, "forward") is None:
        raise Blocker(
            f"{facts.causal_lm} has no forward.", work.line_of(f"class {facts.causal_lm}")
        )
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
        elif pair and _before_logits(work, cls, attr, pair[1]):
            body.append(_last_stage(work, node, attr))
        else:
            body.append(node)
    body.append(
        edit.blank_before(
            edit.statement(
                "self.make_empty_intermediate_tensors = (\n"
                f"    self.{facts.model_path}.make_empty_intermediate_tensors\n)"
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
    lora = "no LoRA" if _no_adapters(work) else "LoRA"
    work.did.append(
        f"{facts.causal_lm}: ParallelLMHead, LogitsProcessor, packed_modules_mapping, {lora}, "
        "pipeline stages."
    )


def _before_logits(work: Work, cls: cst.ClassDef, attr: str, value: cst.BaseExpression) -> bool:
    """Is it a module of the file, with linears, that compute_logits calls before the head?"""
    compute = edit.method(cls, "compute_logits")
    called = compute is not None and edit.find(compute, lambda n: edit.is_call(n, f"self.{attr}"))
    name = edit.code(value.func) if isinstance(value, cst.Call) else ""
    return bool(called) and work.has(name) and "nn.Linear(" in edit.code(work.cls(name))


def _last_stage(work: Work, node: edit.Statement, attr: str) -> edit.Statement:
    """A prediction head before the projection to the vocabulary: vLLM's linears, last stage."""
    name = edit.code(edit.assigned_attribute(node)[1].func)
    cls = work.cls(name)
    init = edit.method(cls, "__init__")
    for parameter in ("quant_config: QuantizationConfig | None = None", 'prefix: str = ""'):
        init = add_parameter(init, parameter)
    cls, whole = shard_chains(work, set_method(cls, init))
    work.put(plain_module(cls))
    if whole:
        work.warnings.append(f"{name}: {', '.join(whole)} whole on every rank.")
    for argument in ("quant_config=quant_config", f'prefix=maybe_prefix(prefix, "{attr}")'):
        node = pass_argument(node, edit.assigned_attribute(node)[1], argument)
    return only_on("get_pp_group().is_last_rank", node, attr)


def _head(work: Work, node: edit.Statement, call: cst.Call, processor: str) -> edit.Statement:
    head = work.facts.head
    rows, columns = (
        edit.call_argument(call, 1, "out_features"),
        edit.call_argument(call, 0, "in_features"),
    )
    bias = f"    bias={head.bias},\n    " if head.bias != "False" else "    "
    embedding = f"self.{work.facts.model_path}.{work.facts.embedding.path}"
    tie = (
        f"""
    if config.tie_word_embeddings:
        # The checkpoint has no {head.attr}.weight of its own.
        self.{head.attr} = self.{head.attr}.tie_weights({embedding})
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
        "if logits is None:\n"
        "    # Only one rank of the group gets the gathered logits.\n"
        "    return None"
    )
    return (
        [*(replaced(n) for n in body[: index + 1]), guard, *body[index + 1 :]],
        vocabulary,
        biased,
    )


def _no_adapters(work: Work) -> list[str]:
    """Why vLLM could not take the model's adapters, as lines of a comment; [] if it can."""
    facts = work.facts
    if reorders(facts.attention):
        return [
            f"No SupportsLoRA: {facts.attention.qkv.attr}'s rows are put in order while",
            "they are loaded, and vLLM gives it an adapter's rows as they come.",
        ]
    if facts.head.attr != "lm_head" and "self.lm_head" in edit.code(work.cls(facts.causal_lm)):
        return [
            "No SupportsLoRA: vLLM takes what stands below an `lm_head` for the projection to the",
            "vocabulary, which is another module here.",
        ]
    return []


def _mixins(work: Work, cls: cst.ClassDef) -> cst.ClassDef:
    """Base classes and class attributes that LoRA, quantisation and pipelines read."""
    bases = [edit.code(b.value) for b in cls.bases]
    why = _no_adapters(work)
    for mixin in ("SupportsPP",) if why else ("SupportsLoRA", "SupportsPP"):
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
        notes += why
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
    """Fused linear -> the checkpoint's linears, in order; by the facts before the draft."""
    facts = work.facts
    packed: dict[str, list[str]] = {}
    attention = facts.attention
    if attention is None:
        pass
    elif attention.qkv is not None and attention.qkv.cls == "QKVParallelLinear":
        packed[attention.qkv.attr] = _usual_names(
            work, attention.qkv.attr, ["q_proj", "k_proj", "v_proj"]
        )
    elif attention.qkv is not None:
        packed[attention.qkv.attr] = [attention.qkv.attr]
    elif attention.q and attention.k and attention.v and _fuses(work):
        packed["qkv_proj"] = [attention.q.attr, attention.k.attr, attention.v.attr]
    for mlp in facts.mlp:
        if mlp.kind == "gated":
            packed[FUSED] = [mlp.gate.attr, mlp.up.attr]
        elif mlp.kind == "gated_fused":
            packed[mlp.up.attr] = [mlp.up.attr]
        for node in edit.body_of(edit.method(work.cls(mlp.cls), "__init__")):
            pair = edit.assigned_attribute(node)
            if (
                pair
                and edit.is_call(pair[1], "MergedColumnParallelLinear")
                and pair[0] not in packed
            ):
                packed[pair[0]] = _usual_names(work, pair[0], ["gate_proj", "up_proj"])
    for mixer in facts.recurrent:
        if mixer.layer == "MambaMixer":
            # Fused in the checkpoint too; without an entry vLLM gives it no LoRA adapter.
            packed["in_proj"] = ["in_proj"]
        if mixer.layer.endswith("GatedDeltaNetAttention"):
            packed |= _delta_net(edit.code(work.cls(facts.causal_lm))) or {
                name: [name] for name in ("in_proj_qkvz", "in_proj_ba")
            }
    return packed


def _delta_net(written: str) -> dict[str, list[str]]:
    """What the weights mapper of the step before puts into linears that vLLM's layer fuses."""
    packed: dict[str, list[str]] = {}
    for part, fused in STACKED.findall(written):
        if not part.endswith("conv1d"):  # no linear
            packed.setdefault(fused, []).append(part)
    return packed


def _fuses(work: Work) -> bool:
    """Did the draft fuse the attention's projections?"""
    return "QKVParallelLinear" in edit.code(work.cls(work.facts.attention.cls))


def _usual_names(work: Work, fused: str, names: list[str]) -> list[str]:
    """For a linear fused by hand: the file no longer says what the checkpoint calls its parts."""
    shown = ", ".join(names)
    work.warnings.append(
        f"{fused} was fused by hand: packed_modules_mapping assumes that the checkpoint's parts "
        f"are {shown}. Compare with the checkpoint."
    )
    return names
