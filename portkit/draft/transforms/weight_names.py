"""Step weights: what the checkpoint calls otherwise than the port, and names that clash."""

from __future__ import annotations

import ast

from portkit.analysis.classes import ModuleView, call_name, text
from portkit.analysis.conversion import Merge, conversions_of
from portkit.analysis.making import made_by
from portkit.draft.blocker import Blocker

EXPERTS = "FusedMoEFactory"


def renames(
    architecture: str, mapped: str = ""
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(plain renames, renames by regular expression) from the checkpoint's names to the model's.

    `mapped`: source of the mapper that the class has; tensors that it loads as shards of one
    parameter need no concatenation. Blocker for any other conversion that changes values: a port
    has to do that in `load_weights` itself.
    """
    plain: list[tuple[str, str]] = []
    patterns: list[tuple[str, str]] = []
    for conversion in conversions_of(architecture):
        if isinstance(conversion, Merge):
            names = [s.removesuffix(".weight") for s in conversion.sources]
            shards = conversion.operations == ("Concatenate",)
            if shards and all(f'".{name}."' in mapped for name in names):
                continue
            if not conversion.stacks_experts:
                raise Blocker(
                    f"Transformers makes {conversion.target} of {', '.join(conversion.sources)} by "
                    f"{', '.join(conversion.operations)}: load_weights has to do the same.",
                )
        elif conversion.plain is None:
            patterns.append((conversion.source, conversion.target))
        elif not any(source in conversion.plain[0] for source, _ in plain):
            plain.append(conversion.plain)
    return plain, patterns


def owners(module: ModuleView, fused: str) -> list[str]:
    """Attributes whose class makes the fused linear, where experts have parts of the same names.

    vLLM's mapper replaces text anywhere in a name, and one expert's `gate_proj` is no part of the
    fused linear of a dense block. Empty: nothing can clash.
    """
    made = [(view, item) for view in module.classes.values() for item in view.assigned]
    if not any(call_name(item.value) == EXPERTS for _, item in made):
        return []
    holding = {v.name for v in module.classes.values() if v.get(fused) is not None}
    found = [
        name
        for view, item in made
        if any(c.name in holding for c in made_by(module, view, item.value))
        for name in _numbered(item.attr, item.value)
    ]
    return list(dict.fromkeys(found))


def _numbered(attr: str, value: ast.expr) -> list[str]:
    """attr, or attr.0, attr.1, ... of a ModuleList over numbers that are written out."""
    for node in ast.walk(value):
        if isinstance(node, ast.ListComp) and isinstance(node.generators[0].iter, ast.List):
            return [f"{attr}.{text(number)}" for number in node.generators[0].iter.elts]
    return [attr]
