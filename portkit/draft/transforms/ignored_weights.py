"""Step forward: what Transformers leaves out of a checkpoint, the port leaves out as well."""

from __future__ import annotations

import ast

from portkit.analysis.classes import view_module
from portkit.analysis.ignored import Ignored, Translated, translate
from portkit.draft import edit
from portkit.draft.mapper import with_mapper
from portkit.draft.work import Work, set_members

UNEXPECTED = "ignore_unexpected_prefixes"


def declare_ignored(work: Work, ignored: tuple[Ignored, ...]) -> None:
    """Drop in the class's mapper what nothing of the port is called; name what only may be more.

    Raises nothing: what cannot be translated is a warning, for load_weights would say it too.
    """
    facts = work.facts
    names = _attributes(work.module.code)
    found = translate(
        tuple(i for i in ignored if i.pattern), names, f"{facts.model_path}.{facts.layers_attr}"
    )
    cls = work.cls(facts.causal_lm)
    members = edit.members(cls)
    if found.unexpected:
        shown = "".join(f'    "{prefix}",\n' for prefix in found.unexpected)
        made = edit.comment_before(
            edit.statement(f"{UNEXPECTED} = [\n{shown}]"),
            "Left out of a checkpoint where the model has no such layer.",
        )
        at = 1 if members and edit.is_docstring(members[0]) else 0
        members[at] = edit.blank_before(members[at])
        members = [*members[:at], made, *members[at:]]
    if mapper := _mapper(found):
        members = with_mapper(members, edit.statement(mapper))
    work.put(set_members(cls, members))
    dropped = [*found.prefix, *found.substr, *found.regex, *found.unexpected]
    if dropped:
        work.did.append(
            f"{facts.causal_lm}: Transformers ignores these tensors of a checkpoint, so does "
            f"load_weights: {', '.join(dropped)}."
        )
    for item in (*found.left, *(i for i in ignored if not i.pattern)):
        work.warnings.append(_warning(item))


def _mapper(found: Translated) -> str:
    note = "        # left out of the checkpoint, as Transformers does\n"
    parts = []
    if found.regex:
        lines = "".join(f'        re.compile(r"{p}"): None,\n' for p in found.regex)
        parts.append("    orig_to_new_regex={\n" + note + lines + "    },\n")
    for kind, names in (("substr", found.substr), ("prefix", found.prefix)):
        if names:
            lines = "".join(f'        "{name}": None,\n' for name in names)
            parts.append(f"    orig_to_new_{kind}={{\n" + note + lines + "    },\n")
    return "hf_to_vllm_mapper = WeightsMapper(\n" + "".join(parts) + ")" if parts else ""


def _warning(item: Ignored) -> str:
    what = f"r'{item.pattern}'" if item.pattern else "what it computes there"
    return (
        f"Transformers ignores tensors of a checkpoint that match {what} ({item.cls}, line "
        f"{item.line}); load_weights does not. If yours has such tensors, give AutoWeightsLoader "
        "their ignore_unexpected_prefixes."
    )


def _attributes(source: str) -> set[str]:
    """Names that a parameter of the file can have in it."""
    module = view_module(source)
    names = {item.attr for view in module.classes.values() for item in view.assigned}
    names |= {
        node.value
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value.isidentifier()
    }
    return names | {"weight", "bias"}
