"""Why no list of decoder layers was found where a port needs it: what the file has instead."""

from __future__ import annotations

import ast

from portkit.analysis.classes import ClassView, ModuleView, call_name, text


def missing_layers(module: ModuleView, lm: ClassView) -> tuple[str, int]:
    """(what stands in the way, line), for a ForCausalLM class without a plain list below it."""
    for item in lm.assigned:
        model = module.classes.get(call_name(item.value))
        if model is None:
            continue
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
