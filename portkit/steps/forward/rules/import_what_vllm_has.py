"""Imports from vLLM must exist in the installed vLLM."""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule

MOVED = {
    "vllm.attention": "vllm.model_executor.layers.attention",
    "vllm.attention.layer": "vllm.model_executor.layers.attention",
    "vllm.model_executor.parallel_utils.parallel_state": "vllm.distributed",
    "vllm.model_executor.input_metadata": "",
}
"""Where often copied imports went; the new place is offered if the installed vLLM has the name."""


class ImportWhatVllmHas(Rule):
    """Import from modules that the installed vLLM has.

    ## What it does
    Looks up `from vllm... import name` in the files of the installed vLLM, without importing it:
    reports modules that are gone and names that a module does not mention. Silent without vLLM.

    ## Why vLLM wants it
    Modules move between releases, and tutorials age. An import that fails shows up late, and a
    plugin that fails to load is only logged.

    ## Example
        from vllm.attention import Attention

    ## Use instead
        from vllm.model_executor.layers.attention import Attention

    ## Fix safety
    Safe: offered only for moves where the new module has the name.

    ## References
    - The installed vLLM's own files
    """

    fix_safety = "safe"

    VALID = [
        Valid("from vllm.config import VllmConfig\n"),
        Valid("from vllm.model_executor.layers.attention import Attention\n"),
        Valid("from vllm.model_executor.models import llama\n"),
        Valid("from torch import nn\n"),
    ]
    INVALID = [
        Invalid(
            "from vllm.attention import Attention\n",
            line=1,
            names="vllm.attention",
            fixed="from vllm.model_executor.layers.attention import Attention\n",
        ),
        Invalid(
            "from vllm.model_executor.layers.linear import PagedLinear\n",
            line=1,
            names="PagedLinear",
        ),
        Invalid(
            "from vllm.model_executor.input_metadata import InputMetadata\n",
            line=1,
            names="input_metadata",
        ),
    ]

    def visit_ImportFrom(self, node: cst.ImportFrom) -> None:
        if node.relative or node.module is None or isinstance(node.names, cst.ImportStar):
            return
        module = self.source.module.code_for_node(node.module).strip()
        if module.partition(".")[0] != "vllm" or vllm_root() is None:
            return
        names = [alias.evaluated_name for alias in node.names]
        if not mentions(module, ()):
            new = MOVED.get(module, "")
            known = bool(new) and mentions(new, tuple(names))
            self.report(
                node,
                f"`{module}` is not a module of the installed vLLM"
                + (
                    f": import {', '.join(names)} from `{new}`."
                    if known
                    else f": look for `{names[0]}` in its current files."
                ),
                replacement=node.with_changes(module=cst.parse_expression(new)) if known else None,
            )
            return
        for alias in node.names:
            if not mentions(module, (alias.evaluated_name,)):
                self.report(
                    alias,
                    f"`{module}` of the installed vLLM has no `{alias.evaluated_name}`: look for "
                    "its successor there.",
                )


@cache
def vllm_root() -> Path | None:
    """Folder of the installed vLLM, found without importing it."""
    spec = find_spec("vllm")
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None


@cache
def mentions(module: str, names: tuple[str, ...]) -> bool:
    """True if the module exists and its text mentions every name (or has a file of that name)."""
    root = vllm_root()
    if root is None:
        return True
    base = root.joinpath(*module.split(".")[1:])
    file = next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)
    if file is None:
        return base.is_dir() and all((base / f"{name}.py").is_file() for name in names)
    text = file.read_text(errors="replace")
    return all(
        re.search(rf"\b{re.escape(name)}\b", text) is not None
        or (base / f"{name}.py").is_file()
        or (base / name).is_dir()
        or re.search(r"^def __getattr__|import \*", text, re.M) is not None
        for name in names
    )
