"""The import block: what the file uses, from where, in the order vLLM's own files keep.

Names that a draft introduces are looked up in VLLM_NAMES, the one place that knows import paths of
vLLM 0.32. Everything no longer used goes: imports, helper functions, classes, `__all__`.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterable

import libcst as cst

from portkit.draft import edit
from portkit.draft.blocker import Blocker

_LAYERS = "vllm.model_executor.layers"
VLLM_NAMES = {
    "support_torch_compile": "vllm.compilation.decorators",
    "CacheConfig": "vllm.config",
    "ModelConfig": "vllm.config",
    "VllmConfig": "vllm.config",
    "get_pp_group": "vllm.distributed",
    "get_tensor_model_parallel_rank": "vllm.distributed",
    "get_tensor_model_parallel_world_size": "vllm.distributed",
    "split_tensor_along_last_dim": "vllm.distributed",
    "tensor_model_parallel_all_gather": "vllm.distributed",
    "get_act_and_mul_fn": f"{_LAYERS}.activation",
    "get_act_fn": f"{_LAYERS}.activation",
    "Attention": f"{_LAYERS}.attention",
    "FusedMoEFactory": f"{_LAYERS}.fused_moe",
    "activation_without_mul": f"{_LAYERS}.fused_moe",
    "GateLinear": f"{_LAYERS}.fused_moe",
    "RoutedExperts": f"{_LAYERS}.fused_moe.routed_experts",
    "GemmaRMSNorm": f"{_LAYERS}.layernorm",
    "RMSNorm": f"{_LAYERS}.layernorm",
    "ColumnParallelLinear": f"{_LAYERS}.linear",
    "MergedColumnParallelLinear": f"{_LAYERS}.linear",
    "QKVParallelLinear": f"{_LAYERS}.linear",
    "ReplicatedLinear": f"{_LAYERS}.linear",
    "RowParallelLinear": f"{_LAYERS}.linear",
    "LogitsProcessor": f"{_LAYERS}.logits_processor",
    "QwenGatedDeltaNetAttention": f"{_LAYERS}.mamba.gdn.qwen_gdn_linear_attn",
    "OlmoHybridGatedDeltaNetAttention": f"{_LAYERS}.mamba.gdn.olmo_gdn_linear_attn",
    "MiniMaxText01LinearAttention": f"{_LAYERS}.mamba.linear.minimax_linear_attn",
    "LinearAttentionMetadata": "vllm.v1.attention.backends.linear_attn",
    "get_current_vllm_config": "vllm.config",
    "MambaMixer": f"{_LAYERS}.mamba.mamba_mixer",
    "MambaMixer2": f"{_LAYERS}.mamba.mamba_mixer2",
    "Mixer2RMSNormGated": f"{_LAYERS}.mamba.mamba_mixer2",
    "MambaStateCopyFunc": f"{_LAYERS}.mamba.mamba_utils",
    "MambaStateCopyFuncCalculator": f"{_LAYERS}.mamba.mamba_utils",
    "MambaStateDtypeCalculator": f"{_LAYERS}.mamba.mamba_utils",
    "MambaStateShapeCalculator": f"{_LAYERS}.mamba.mamba_utils",
    "ShortConv": f"{_LAYERS}.mamba.short_conv",
    "QuantizationConfig": f"{_LAYERS}.quantization",
    "default_weight_loader": "vllm.model_executor.model_loader.weight_utils",
    "set_weight_attrs": "vllm.model_executor.utils",
    "get_rope": f"{_LAYERS}.rotary_embedding",
    "ParallelLMHead": f"{_LAYERS}.vocab_parallel_embedding",
    "VocabParallelEmbedding": f"{_LAYERS}.vocab_parallel_embedding",
    "HasInnerState": "vllm.model_executor.models.interfaces",
    "IsAttentionFree": "vllm.model_executor.models.interfaces",
    "IsHybrid": "vllm.model_executor.models.interfaces",
    "SupportsLoRA": "vllm.model_executor.models.interfaces",
    "SupportsPP": "vllm.model_executor.models.interfaces",
    "AutoWeightsLoader": "vllm.model_executor.models.utils",
    "PPMissingLayer": "vllm.model_executor.models.utils",
    "WeightsMapper": "vllm.model_executor.models.utils",
    "extract_layer_index": "vllm.model_executor.models.utils",
    "make_empty_intermediate_tensors_factory": "vllm.model_executor.models.utils",
    "make_layers": "vllm.model_executor.models.utils",
    "maybe_prefix": "vllm.model_executor.models.utils",
    "IntermediateTensors": "vllm.sequence",
    "copy": "copy",
    "Callable": "collections.abc",
    "Iterable": "collections.abc",
    "islice": "itertools",
    "partial": "functools",
}
"""Name -> module of everything a draft may introduce."""

_PLAIN = {
    "torch": "import torch",
    "nn": "from torch import nn",
    "math": "import math",
    "re": "import re",
}


def keep_reachable(module: cst.Module, roots: Iterable[str]) -> cst.Module:
    """Drop top-level classes, functions and assignments that `roots` do not need."""
    defined: dict[str, cst.CSTNode] = {}
    for item in module.body:
        if isinstance(item, cst.ClassDef | cst.FunctionDef):
            defined[item.name.value] = item
        else:
            pair = edit.assigned(item)
            if pair and isinstance(pair[0], cst.Name):
                defined[pair[0].value] = item
    wanted: set[str] = set()
    queue = [name for name in roots if name in defined]
    while queue:
        name = queue.pop()
        if name in wanted:
            continue
        wanted.add(name)
        queue += [n for n in edit.names_read(defined[name]) if n in defined]
    keep = {id(defined[name]) for name in wanted}
    every = {id(node) for node in defined.values()}
    return module.with_changes(body=[i for i in module.body if id(i) not in every or id(i) in keep])


def rebuild_imports(module: cst.Module) -> cst.Module:
    """Replace the import block by one that imports exactly what the file reads, sorted."""
    origins: dict[str, tuple[str, str]] = {}
    body: list[cst.BaseStatement] = []
    header: list[cst.EmptyLine] = list(module.header)
    first = True
    for item in module.body:
        lines = _import_lines(item)
        if lines is None:
            body.append(item)
        else:
            origins.update(lines)
            if first:
                header += list(item.leading_lines)
        first = False
    code_only = module.with_changes(body=body)
    defined = {i.name.value for i in body if isinstance(i, cst.ClassDef | cst.FunctionDef)}
    defined |= {p[0].value for i in body if (p := edit.assigned(i)) and isinstance(p[0], cst.Name)}
    needed = _free_names(code_only) - defined
    wanted: dict[str, set[str]] = {}
    plain: set[str] = set()
    for name in sorted(needed):
        if name in VLLM_NAMES and name not in origins:
            wanted.setdefault(VLLM_NAMES[name], set()).add(name)
        elif name in origins:
            source, spelled = origins[name]
            if name == "nn" and spelled in ("import torch.nn as nn", "nn"):
                plain.add(_PLAIN["nn"])
            elif source:
                wanted.setdefault(source, set()).add(spelled)
            else:
                plain.add(spelled)
        elif name in _PLAIN:
            plain.add(_PLAIN[name])
    lines = _sorted_block(wanted, plain)
    block = edit.statements("\n".join(lines)) if lines else []
    docstring = body[:1] if body and edit.is_docstring(body[0]) else []
    rest = body[len(docstring) :]
    if block and docstring:
        block[0] = edit.blank_before(block[0])
    rest = [_two_blank_lines(r) if i == 0 else r for i, r in enumerate(rest)]
    return module.with_changes(header=header, body=[*docstring, *block, *rest])


def unknown_names(module: cst.Module) -> set[str]:
    """Names that the file reads but neither defines nor imports: a draft must not leave any."""
    defined: set[str] = set()
    for item in module.body:
        if isinstance(item, cst.ClassDef | cst.FunctionDef):
            defined.add(item.name.value)
        elif (pair := edit.assigned(item)) and isinstance(pair[0], cst.Name):
            defined.add(pair[0].value)
        elif (lines := _import_lines(item)) is not None:
            defined |= set(lines)
    return _free_names(module) - defined


def _import_lines(item: cst.CSTNode) -> dict[str, tuple[str, str]] | None:
    """{local name: (module, spelling)} of an import line; None if it is no import."""
    if not isinstance(item, cst.SimpleStatementLine):
        return None
    found: dict[str, tuple[str, str]] = {}
    for small in item.body:
        if isinstance(small, cst.ImportFrom):
            if isinstance(small.names, cst.ImportStar):
                raise Blocker("a star import hides where names come from; import them by name.")
            source = "." * len(small.relative) + edit.code(small.module)
            for alias in small.names:
                name = alias.evaluated_alias or alias.evaluated_name
                spelled = alias.evaluated_name + (
                    f" as {alias.evaluated_alias}" if alias.evaluated_alias else ""
                )
                found[name] = (source, spelled)
        elif isinstance(small, cst.Import):
            for alias in small.names:
                spelled = f"import {edit.code(alias.name)}"
                spelled += f" as {alias.evaluated_alias}" if alias.evaluated_alias else ""
                found[alias.evaluated_alias or alias.evaluated_name.split(".")[0]] = ("", spelled)
        else:
            return None
    return found


def _sorted_block(wanted: dict[str, set[str]], plain: set[str]) -> list[str]:
    groups: dict[int, list[tuple[tuple[int, str], str]]] = {0: [], 1: [], 2: [], 3: []}
    for line in plain:
        is_from = line.startswith("from ")
        module = line.split()[1]
        groups[_group(module)].append(((int(is_from), module), line))
    for module, names in wanted.items():
        joined = ", ".join(sorted(names, key=lambda n: (not n.isupper(), n[0].islower(), n)))
        line = f"from {module} import {joined}"
        if len(line) > 88:
            line = f"from {module} import (\n    " + joined.replace(", ", ",\n    ") + ",\n)"
        groups[_group(module)].append(((1, module), line))
    lines: list[str] = []
    for key in sorted(groups):
        if groups[key]:
            lines += ([""] if lines else []) + [line for _, line in sorted(groups[key])]
    return lines


def _group(module: str) -> int:
    root = module.split(".")[0]
    if module.startswith("."):
        return 3
    if root in sys.stdlib_module_names:
        return 0
    return 2 if root == "vllm" else 1


def _free_names(module: cst.Module) -> set[str]:
    """Names read anywhere in the file that are not bound in the function that reads them."""
    found: set[str] = set()

    def walk(node: cst.CSTNode, bound: frozenset[str]) -> None:
        if isinstance(node, cst.FunctionDef | cst.Lambda):
            outside = [
                p
                for p in (node.params.params, node.params.kwonly_params, node.params.posonly_params)
            ]
            for group in outside:
                for parameter in group:
                    for part in (parameter.annotation, parameter.default):
                        if part is not None:
                            walk(part, bound)
            if isinstance(node, cst.FunctionDef):
                for part in (*node.decorators, *((node.returns,) if node.returns else ())):
                    walk(part, bound)
                for star in (node.params.star_kwarg, node.params.star_arg):
                    if isinstance(star, cst.Param) and star.annotation is not None:
                        walk(star.annotation, bound)
            inner = bound | _bound_in(node)
            walk(node.body, inner)
            return
        if isinstance(node, cst.ListComp | cst.GeneratorExp | cst.SetComp | cst.DictComp):
            bound = bound | {
                n.value
                for n in edit.find(node.for_in, lambda n: isinstance(n, cst.Name))
                if any(n is t for t in edit.find(node.for_in.target, lambda m: True))
            }
        if isinstance(node, cst.ClassDef):
            bound = bound | {
                p[0].value
                for m in edit.members(node)
                if (p := edit.assigned(m)) and isinstance(p[0], cst.Name)
            }
        if isinstance(node, cst.Import | cst.ImportFrom):
            return
        if isinstance(node, cst.Name):
            if node.value not in bound and not hasattr(builtins, node.value):
                found.add(node.value)
        elif isinstance(node, (cst.Attribute, cst.Arg)):
            walk(node.value, bound)
        elif isinstance(node, cst.FormattedStringExpression):
            walk(node.expression, bound)
        elif isinstance(node, cst.AssignTarget) and isinstance(node.target, cst.Name):
            return
        elif isinstance(node, cst.AnnAssign) and isinstance(node.target, cst.Name):
            walk(node.annotation, bound)
            if node.value is not None:
                walk(node.value, bound)
        elif isinstance(node, cst.ClassDef):
            for part in (*node.bases, *node.decorators, node.body):
                walk(part, bound)
        else:
            for child in node.children:
                walk(child, bound)

    walk(module, frozenset())
    return found


def _bound_in(node: cst.FunctionDef | cst.Lambda) -> set[str]:
    """Parameters and local names of a function."""
    every = [*node.params.posonly_params, *node.params.params, *node.params.kwonly_params]
    every += [s for s in (node.params.star_kwarg, node.params.star_arg) if isinstance(s, cst.Param)]
    bound = {p.name.value for p in every}
    bound |= {f.name.value for f in edit.find(node.body, lambda n: isinstance(n, cst.FunctionDef))}
    for target in edit.find(
        node,
        lambda n: isinstance(
            n, cst.AssignTarget | cst.For | cst.NamedExpr | cst.AnnAssign | cst.AsName
        ),
    ):
        inner = target.name if isinstance(target, cst.AsName) else target.target
        bound |= {
            n.value
            for n in edit.find(inner, lambda m: isinstance(m, cst.Name))
            if not _in_attribute(inner, n)
        }
    return bound


def _in_attribute(root: cst.CSTNode, name: cst.CSTNode) -> bool:
    return any(
        name in (a, *edit.find(a, lambda n: True))
        for a in edit.find(root, lambda n: isinstance(n, cst.Attribute | cst.Subscript))
    )


def _two_blank_lines(node: cst.BaseStatement) -> cst.BaseStatement:
    lines = [line for line in node.leading_lines if line.comment is not None]
    count = 2 if isinstance(node, cst.ClassDef | cst.FunctionDef) else 1
    return node.with_changes(leading_lines=[*[cst.EmptyLine(indent=False)] * count, *lines])
