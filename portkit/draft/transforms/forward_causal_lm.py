"""Step forward, the ForCausalLM class: forward returns hidden states, compute_logits the rest."""

from __future__ import annotations

import libcst as cst

from portkit.draft import edit, prune
from portkit.draft.blocker import Blocker
from portkit.draft.transforms.forward_layer import check_no_leftovers
from portkit.draft.transforms.forward_model import FORWARD, construct_model, embed_method, returned
from portkit.draft.work import Work, plain_module, rewrite_init, set_members, set_method


def port_causal_lm(work: Work) -> None:
    """forward returns hidden states; compute_logits is what HF's forward did after the model."""
    facts = work.facts
    cls = work.cls(facts.causal_lm)
    forward, init = edit.method(cls, "forward"), edit.method(cls, "__init__")
    head = facts.head
    if edit.method(cls, "compute_logits") is not None and "vllm_config" in edit.parameters(init):
        return
    if head is None:
        raise Blocker(
            f"{facts.causal_lm} has no language-model head.",
            work.line_of(f"class {facts.causal_lm}"),
        )
    if forward is None:
        raise Blocker(
            f"{facts.causal_lm} has no forward.", work.line_of(f"class {facts.causal_lm}")
        )
    logits = _logits_body(work, forward)
    held = facts.wrappers[0][0] if facts.wrappers else facts.model
    ties = head.can_tie
    cls = plain_module(cls)
    members = [
        m
        for m in edit.members(cls)
        if (isinstance(m, cst.FunctionDef) and m.name.value == "__init__") or edit.is_docstring(m)
    ]
    cls = set_members(cls, members)
    body: list[edit.Statement] = []
    for node in edit.body_of(init):
        pair = edit.assigned_attribute(node)
        if pair and pair[0] == "config":
            continue
        if pair and edit.is_call(pair[1], held):
            node = edit.statement(construct_model(held, facts.model_attr)).with_changes(
                leading_lines=node.leading_lines
            )
        body.append(node)
        if pair and pair[0] == head.attr and ties:
            body += edit.statements(f"""
if config.tie_word_embeddings:
    # The checkpoint has no {head.attr}.weight of its own.
    self.{head.attr}.weight = self.{facts.model_path}.{facts.embedding.path}.weight
""")
    after_super = edit.statements(
        "config = vllm_config.model_config.hf_config\nself.config = config"
    )
    cls = rewrite_init(cls, 'self, *, vllm_config: VllmConfig, prefix: str = ""', body, after_super)
    cls = set_method(cls, embed_method(f"self.{facts.model_attr}.embed_input_ids(input_ids)"))
    call = (
        f"return self.{facts.model_attr}(input_ids, positions, intermediate_tensors, inputs_embeds)"
    )
    cls = set_method(cls, edit.with_body(edit.function(FORWARD), [edit.statement(call)]))
    compute = edit.function(
        "def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:\n    pass"
    )
    cls = set_method(cls, edit.with_body(compute, logits))
    work.put(cls)
    work.did.append(
        f"{facts.causal_lm}: forward returns hidden states; compute_logits applies {head.attr}."
    )


def _logits_body(work: Work, forward: cst.FunctionDef) -> list[edit.Statement]:
    """What HF's forward did from last_hidden_state to logits, without slicing, loss and outputs."""
    facts = work.facts
    forward = prune.inference_only(forward)
    outputs = None
    body: list[edit.Statement] = []
    for node in edit.body_of(forward):
        pair = edit.assigned(node)
        if pair and edit.is_call(pair[1], f"self.{facts.model_attr}", f"self.{facts.model_path}"):
            outputs = edit.code(pair[0])
            continue
        if pair and edit.is_call(pair[1], f"self.{facts.head.attr}") is False and outputs:
            read = edit.flat(pair[1])
            if read in (f"{outputs}.last_hidden_state", f"{outputs}[0]"):
                if edit.code(pair[0]) != "hidden_states":
                    body.append(edit.statement(f"{edit.code(pair[0])} = hidden_states"))
                continue
        body.append(returned(node, "logits"))
    if outputs is None:
        raise Blocker(
            f"{facts.causal_lm}.forward does not call self.{facts.model_attr}(...).",
            work.line_of(f"class {facts.causal_lm}"),
        )

    def change(here: cst.CSTNode) -> cst.CSTNode | None:
        if (
            isinstance(here, cst.Subscript)
            and "slice_indices" in edit.code(here)
            and isinstance(here.value, cst.Name)
        ):
            return here.value
        if isinstance(here, cst.Call) and edit.code(here.func).endswith(".contiguous"):
            return here.func.value
        if isinstance(here, cst.Attribute) and edit.code(here) == f"{outputs}.last_hidden_state":
            return cst.Name("hidden_states")
        return None

    body = prune.live_body([edit.replace(_one_line_comments(n), change) for n in body])
    new = edit.with_body(edit.function("def compute_logits(self, hidden_states):\n    pass"), body)
    check_no_leftovers(new, forward, f"{facts.causal_lm}.compute_logits, made from forward:", work)
    if outputs in edit.names_read(new):
        raise Blocker(
            f"{facts.causal_lm}.forward needs more than the model's hidden states for its logits.",
            work.line_of(f"class {facts.causal_lm}"),
        )
    if (
        len(body) == 2
        and edit.assigned(body[0])
        and edit.code(body[1]).strip() == f"return {edit.code(edit.assigned(body[0])[0])}"
    ):
        return [edit.statement(f"return {edit.flat(edit.assigned(body[0])[1])}")]
    return body


def _one_line_comments(node: edit.Statement) -> edit.Statement:
    """Drop comments about slicing and loss, which are gone."""
    lines = [x for x in node.leading_lines if x.comment is None or "logits" not in x.comment.value]
    return (
        node.with_changes(leading_lines=lines)
        if isinstance(node, cst.SimpleStatementLine | cst.If)
        else node
    )
