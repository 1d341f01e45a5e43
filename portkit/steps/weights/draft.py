"""Draft of step weights: load_weights, from the fused linears that the file already has.

`packed_modules_mapping` says which linears of the checkpoint each fused linear holds; the mapper
says the same in vLLM's loading terms, with the shard that each part goes to.
"""

from __future__ import annotations

import ast

import libcst as cst

from portkit.analysis.classes import call_name, view_module
from portkit.analysis.facts import facts_of
from portkit.draft import edit, source_draft
from portkit.draft.blocker import Blocker
from portkit.draft.finish import finish
from portkit.draft.mapper import mapper_of, with_mapper
from portkit.draft.outcome import DraftOutcome
from portkit.draft.serving.linears import TRANSPOSED
from portkit.draft.transforms.ignored_weights import UNEXPECTED
from portkit.draft.transforms.weight_names import owners, renames
from portkit.draft.work import Work, set_members, set_method
from portkit.port import Port

_LOAD = """
def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
    loader = AutoWeightsLoader(self{ignored})
    return loader.load_weights(weights{mapper})
"""
_LOAD_TRANSPOSED = """
def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
    def transposed() -> Iterable[tuple[str, torch.Tensor]]:
        for name, weight in weights:
            *_, layer, kind = ("", *name.split("."))
            if kind == "weight" and layer in self.transposed_weights:
                weight = weight.t()
            yield name, weight

    loader = AutoWeightsLoader(self{ignored})
    return loader.load_weights(transposed(){mapper})
"""


def draft_source(source: str, architecture: str) -> Work:
    """Draft the weights state of a source in the parallel state. Raises Blocker where it cannot."""
    facts = facts_of(source, architecture)
    work = Work(cst.parse_module(source), facts)
    source_draft.need_roles(work)
    if facts.state == "weights":
        return work
    if facts.state != "parallel":
        raise Blocker(
            f"{facts.architecture} still has its own linears: do step parallel first.",
            work.line_of(f"class {facts.architecture}"),
        )
    cls = work.cls(facts.causal_lm)
    stacked = stacked_mapping(work)
    old = next((m for m in edit.members(cls) if mapper_of(m) is not None), None)
    plain, patterns = renames(architecture, edit.code(old) if old is not None else "")
    mapper = ""
    if stacked or plain or patterns:
        made = edit.statement(_made_mapper(stacked, plain, patterns))
        cls = set_members(cls, with_mapper(edit.members(cls), made))
    if stacked or any(mapper_of(m) is not None for m in edit.members(cls)):
        mapper = ", mapper=self.hf_to_vllm_mapper"
    names = f"{UNEXPECTED} = [" in edit.code(cls)
    ignored = f", {UNEXPECTED}=self.{UNEXPECTED}" if names else ""
    load = _LOAD_TRANSPOSED if f"{TRANSPOSED} =" in edit.code(cls) else _LOAD
    cls = set_method(cls, edit.function(load.format(mapper=mapper, ignored=ignored)))
    work.put(cls)
    work.did.append(
        f"{facts.causal_lm}: load_weights by AutoWeightsLoader"
        + (f", {len(stacked)} names into fused linears." if stacked else ".")
    )
    if facts.head is not None and facts.head.can_tie:
        work.did.append(
            f"A tied {facts.head.attr} needs nothing: the loader skips aliased parameters."
        )
    work.module = cst.parse_module(finish(work))
    return work


def _made_mapper(
    stacked: list[tuple[str, str, str | int]],
    plain: list[tuple[str, str]],
    patterns: list[tuple[str, str]],
) -> str:
    """WeightsMapper(...): vLLM applies patterns, then plain renames, then the fused linears."""
    parts = []
    if patterns:
        lines = "".join(f'        re.compile(r"{old}"): r"{new}",\n' for old, new in patterns)
        parts.append("    orig_to_new_regex={\n" + lines + "    }")
    if plain:
        lines = "".join(f'        "{old}": "{new}",\n' for old, new in plain)
        note = "        # name in the checkpoint: name in this file\n"
        parts.append("    orig_to_new_substr={\n" + note + lines + "    }")
    if stacked:
        lines = "".join(
            f'        "{name}": ("{fused}", {shard!r}),\n'.replace("'", '"')
            for name, fused, shard in stacked
        )
        note = "        # name in the checkpoint: (fused parameter, its shard)\n"
        parts.append("    orig_to_new_stacked={\n" + note + lines + "    }")
    return "hf_to_vllm_mapper = WeightsMapper(\n" + ",\n".join(parts) + "\n)"


def stacked_mapping(work: Work) -> list[tuple[str, str, str | int]]:
    """(name in the checkpoint, fused name, shard) for each part; none if it is fused there too."""
    module = view_module(work.module.code)
    causal_lm = module.classes[work.facts.causal_lm].node
    packed, written = _packed(causal_lm), ast.unparse(causal_lm)
    made = {
        item.attr: call_name(item.value)
        for view in module.classes.values()
        for item in view.assigned
    }
    names = set(made) | {part for parts in packed.values() for part in parts}
    stacked: list[tuple[str, str, str | int]] = []
    for fused, parts in packed.items():
        kind = made.get(fused, "")
        if parts == [fused] or (not kind and f".{fused}." in written):
            continue  # not fused here, or inside a layer of vLLM's, and mapped already
        if kind not in ("QKVParallelLinear", "MergedColumnParallelLinear"):
            raise Blocker(
                f"packed_modules_mapping names {fused}, but no fused linear of that name is made.",
                work.line_of("packed_modules_mapping"),
            )
        shards: list[str | int] = (
            list("qkv") if kind == "QKVParallelLinear" else list(range(len(parts)))
        )
        if len(shards) != len(parts):
            raise Blocker(
                f"{fused} is a {kind} but holds {len(parts)} linears.",
                work.line_of("packed_modules_mapping"),
            )
        holders = [] if kind == "QKVParallelLinear" else owners(module, fused)
        for part, shard in zip(parts, shards, strict=False):
            # The mapper replaces substrings: end at the dot if another name begins the same way.
            dot = "." if any(n != part and n.startswith(part) for n in names) else ""
            for owner in [f".{o}" for o in holders] or [""]:
                stacked.append((f"{owner}.{part}{dot}", f"{owner}.{fused}{dot}", shard))
    fusing = {
        a for a, kind in made.items() if kind in ("QKVParallelLinear", "MergedColumnParallelLinear")
    }
    missing = sorted(fusing - set(packed))
    if missing:
        raise Blocker(
            f"packed_modules_mapping does not say what {missing[0]} holds.",
            work.line_of(missing[0]),
            "Add it to the ForCausalLM class, then draft again.",
        )
    return stacked


def _packed(node: ast.ClassDef) -> dict[str, list[str]]:
    for item in node.body:
        target = item.targets[0] if isinstance(item, ast.Assign) else getattr(item, "target", None)
        if isinstance(target, ast.Name) and target.id == "packed_modules_mapping":
            try:
                return dict(ast.literal_eval(item.value))
            except (ValueError, TypeError) as error:
                raise Blocker(
                    "packed_modules_mapping is not a plain dictionary.", item.lineno
                ) from error
    return {}


def draft(port: Port) -> DraftOutcome:
    """Draft the port's modeling file; nothing is written."""
    return source_draft.draft_file(port, "weights", draft_source)
