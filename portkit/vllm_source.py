"""What `adopt` asks of the installed vLLM, and what a copy of one of its files needs.

Read as text: neither torch nor vLLM is imported.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import libcst as cst
import libcst.matchers as m

from portkit.errors import PortkitError

REGISTRY = ("model_executor", "models", "registry.py")
TABLES = "_MODELS"
REGISTERS = "direct_register_custom_op"


def vllm_folder() -> Path:
    """Return the installed vLLM's package folder; PortkitError if there is none."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise PortkitError(
            "vLLM is not installed, so its modules cannot be found.",
            "",
            "Set the environment up: `make setup` in portkit.",
        )
    return Path(next(iter(spec.submodule_search_locations)))


def registered_class(architecture: str) -> str:
    """Return the name of the class that vLLM's registry has for an architecture, "" if none."""
    try:
        text = vllm_folder().joinpath(*REGISTRY).read_text(encoding="utf-8")
    except (OSError, PortkitError):
        return ""
    for node in ast.parse(text).body:
        names = [ast.unparse(t) for t in getattr(node, "targets", ())]
        if not isinstance(getattr(node, "value", None), ast.Dict):
            continue
        if not any(name.endswith(TABLES) for name in names):
            continue
        for key, value in zip(node.value.keys, node.value.values, strict=True):
            row = getattr(value, "elts", ())
            if getattr(key, "value", None) == architecture and len(row) > 1:
                return str(getattr(row[1], "value", ""))
    return ""


def with_own_operators(module: cst.Module, port: str) -> cst.Module:
    """Return the file with operators that it registers on import under names of the port's own.

    vLLM registers those of its file already, and torch takes a name once in a process; the port is
    imported afresh for every job, so it registers its own only where that did not happen yet.
    """
    names = {
        cst.ensure_type(arg.value, cst.SimpleString).raw_value
        for call in m.findall(module, m.Call(func=m.Name(REGISTERS)))
        for arg in call.args
        if m.matches(arg, m.Arg(keyword=m.Name("op_name"), value=m.SimpleString()))
    }
    if not names:
        return module
    suffix = re.sub(r"\W", "_", port)
    return module.visit(_Operators({name: f"{name}_{suffix}" for name in names}))


class _Operators(cst.CSTTransformer):
    def __init__(self, names: dict[str, str]) -> None:
        self.names = names

    def leave_Attribute(
        self, original_node: cst.Attribute, updated_node: cst.Attribute
    ) -> cst.Attribute:
        called = m.Attribute(value=m.Attribute(attr=m.Name("ops")), attr=m.Name("vllm"))
        if m.matches(updated_node.value, called) and updated_node.attr.value in self.names:
            return updated_node.with_changes(attr=cst.Name(self.names[updated_node.attr.value]))
        return updated_node

    def leave_Arg(self, original_node: cst.Arg, updated_node: cst.Arg) -> cst.Arg:
        if not m.matches(updated_node, m.Arg(keyword=m.Name("op_name"), value=m.SimpleString())):
            return updated_node
        name = cst.ensure_type(updated_node.value, cst.SimpleString).raw_value
        return updated_node.with_changes(value=cst.SimpleString(f'"{self.names[name]}"'))

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.SimpleStatementLine | cst.If:
        if not m.matches(updated_node, m.SimpleStatementLine([m.Expr(m.Call(m.Name(REGISTERS)))])):
            return updated_node
        (name,) = (
            n for n in self.names.values() if m.findall(updated_node, m.SimpleString(f'"{n}"'))
        )
        condition = f'not hasattr(torch.ops.vllm, "{name}")'
        return cst.If(
            test=cst.parse_expression(condition),
            body=cst.IndentedBlock([updated_node.with_changes(leading_lines=[])]),
            leading_lines=updated_node.leading_lines,
        )
