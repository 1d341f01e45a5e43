"""Step forward, classes between the ForCausalLM class and the model."""

from __future__ import annotations

from portkit.draft import edit
from portkit.draft.transforms.forward_model import FORWARD, construct_model, embed_method
from portkit.draft.work import Work, plain_module, set_members


def port_wrappers(work: Work) -> None:
    """They only pass on; their attributes keep the names that the checkpoint has."""
    classes = [name for name, _ in work.facts.wrappers] + [work.facts.model]
    for (name, attr), held in zip(work.facts.wrappers, classes[1:], strict=True):
        cls = plain_module(work.cls(name))
        kept = [m for m in edit.members(cls) if edit.is_docstring(m)]
        init = edit.function(
            'def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:\n'
            f"    super().__init__()\n    {construct_model(held, attr)}"
        )
        call = f"return self.{attr}(input_ids, positions, intermediate_tensors, inputs_embeds)"
        forward = edit.with_body(edit.function(FORWARD), [edit.statement(call)])
        embed = embed_method(f"self.{attr}.embed_input_ids(input_ids)")
        work.put(set_members(cls, [*kept, init, embed, edit.blank_before(forward)]))
