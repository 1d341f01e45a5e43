"""Step forward, norms: vLLM's RMSNorm takes the place of a class that computes the same formula."""

from __future__ import annotations

import libcst as cst

from portkit.draft import edit
from portkit.draft.blocker import Blocker
from portkit.draft.work import Work, plain_module

_SAME = {"rms": "RMSNorm", "rms_fp32_weight": "RMSNorm", "rms_one_plus_weight": "GemmaRMSNorm"}


def port_norms(work: Work) -> None:
    """Replace uses of each recognised class; a class with another formula stays as it is."""
    for norm in work.facts.norm_classes:
        new = _SAME.get(norm.formula)
        uses = edit.find(work.module, lambda n, name=norm.name: edit.is_call(n, name))
        if not uses:
            continue
        if new is None:
            work.put(plain_module(work.cls(norm.name)))
            if norm.formula != "layernorm":
                work.did.append(
                    f"{norm.name} stays: {norm.why or 'vLLM has no layer of this formula'}."
                )
            continue

        def change(here: cst.CSTNode, norm=norm, new=new) -> cst.CSTNode | None:
            if not edit.is_call(here, norm.name):
                return None
            return edit.expression(f"{new}({', '.join(_arguments(here, norm))})")

        work.module = edit.replace(work.module, change)
        why = {
            "rms": "the same formula",
            "rms_fp32_weight": "the same formula; in 16 bits vLLM rounds before the weight, "
            "Transformers after it",
            "rms_one_plus_weight": "it multiplies by 1 + weight",
        }[norm.formula]
        work.did.append(f"{norm.name} -> {new}: {why}.")


def _arguments(call: cst.Call, norm) -> list[str]:
    """(size, eps=...) for vLLM's class from the original's arguments and default."""
    given: dict[str, str] = {}
    for index, argument in enumerate(call.args):
        name = argument.keyword.value if argument.keyword is not None else norm.parameters[index]
        given[name] = edit.flat(argument.value)
    eps = next((n for n in norm.parameters if "eps" in n), "")
    size = [n for n in norm.parameters if n != eps]
    if len(size) != 1 or size[0] not in given:
        raise Blocker(f"{norm.name} takes more than a size and an epsilon.", norm.line)
    value = given.get(eps, norm.default_eps)
    if not value:
        raise Blocker(f"{norm.name}: the epsilon is neither an argument nor a default.", norm.line)
    return [given[size[0]], f"eps={value}"]
