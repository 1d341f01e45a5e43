"""Why no list of decoder layers was found where a port needs it: what the file has instead."""

from __future__ import annotations

import ast

from portkit.analysis.classes import ClassView, ModuleView, call_name, text, view_class
from portkit.analysis.nesting import stacks_of
from portkit.analysis.recurrent import kind_of, without_draft


def missing_layers(module: ModuleView, lm: ClassView) -> tuple[str, int]:
    """(what stands in the way, line), for a ForCausalLM class without a plain list below it."""
    for item in lm.assigned:
        model = module.classes.get(call_name(item.value))
        if model is None:
            continue
        stacks = stacks_of(module, model)
        if len({cls.name for _, cls in stacks}) > 1:
            named = ", ".join(f"{attr}: {cls.name}" for attr, cls in stacks)
            return (
                f"{model.name} runs several stacks of layers on each other's output ({named}); "
                "vLLM has one sequence of tokens and one list of layers, and a person would start "
                "from CrossAttention (layers/attention/cross_attention.py) for what joins them",
                model.line,
            )
        for inner in model.assigned:
            name = call_name(inner.value)
            method = model.methods.get(name.removeprefix("self."))
            if name.startswith("self.") and method is not None and "ModuleList" in text(method):
                return (
                    f"{model.name}.{method.name} makes the layers one by one, sharing modules "
                    "between them: make_layers needs a class for each number",
                    method.lineno,
                )
            if name.endswith("ModuleList"):
                made = [call_name(n) for n in ast.walk(inner.value) if isinstance(n, ast.Call)]
                unknown = next((n for n in made[1:] if n and "." not in n and n != "range"), "")
                if unknown and unknown not in module.classes:
                    if (nested := _nested_recurrence(module, unknown)) is not None:
                        return nested
                    return (
                        f"{model.name} makes its layers of {unknown}, "
                        "which is no class at the top level of the file",
                        inner.line,
                    )
            stack = module.classes.get(name)
            if stack is not None and any("ModuleList" in text(a.value) for a in stack.assigned):
                return (
                    f"{model.name} runs stacks of layers ({stack.name}) in a recurrence of its "
                    "own: vLLM caches keys and values once for each layer",
                    inner.line,
                )
    return f"no submodule of {lm.name} holds a list of decoder layers", lm.line


def missing_attention(module: ModuleView, layer: ClassView) -> tuple[str, int]:
    """(what stands in the way, line), for a decoder layer without an attention that is known."""
    made = {call_name(item.value) for item in layer.assigned}
    for view in (view for name, view in module.classes.items() if name in made):
        written = text(view.node)
        if not any(w in written for w in ("softmax(", "Softmax(")):
            continue
        if (shift := next((m for m in view.methods.values() if "shift" in m.name), None)) and (
            "einsum" in written
        ):
            return (
                f"{view.name} scores positions relative to each other beside its keys "
                f"({shift.name}): vLLM's Attention knows one score for a query and a key, "
                "and ALiBi's bias",
                shift.lineno,
            )
        if "Softmax(" in written:
            line = next(n.lineno for n in ast.walk(view.node) if call_name(n).endswith(".Softmax"))
            return (
                f"{view.name} attends by hand with a module nn.Softmax, which cannot be followed: "
                "write nn.functional.softmax there",
                line,
            )
    return f"no submodule of {layer.name} is an attention", layer.line


def _nested_recurrence(module: ModuleView, layer: str) -> tuple[str, int] | None:
    """What a layer class in a branch of an `if` keeps from token to token, if it does."""
    top = {id(view.node) for view in module.classes.values()}
    nested = [
        view_class(n)
        for n in ast.walk(module.tree)
        if isinstance(n, ast.ClassDef) and id(n) not in top
    ]
    if layer not in {view.name for view in nested}:
        return None
    for view in nested:
        kind = kind_of(view)
        if kind is not None:
            facts = without_draft(view, kind)
            return (
                f"{layer} stands in a branch of an `if`, and {facts.why}; a person would start "
                f"from vLLM's {facts.start}",
                view.line,
            )
    return None
