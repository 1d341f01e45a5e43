"""Tensors of a checkpoint that Transformers leaves out without a word where a model lacks them.

Its classes say so by regular expressions, `_keys_to_ignore_on_load_unexpected`, and a class's
parts add theirs. What has a place in the model is loaded all the same: GLM-4 MoE names layer 46,
one too many for one of its checkpoints and the middle of another. Reads source only.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

from portkit.analysis.classes import ModuleView, text

ATTRIBUTE = "_keys_to_ignore_on_load_unexpected"
POSITIONS = r"(^|\.)position_ids$"
"""Transformers adds it for every model that has such a buffer."""


@dataclass(frozen=True)
class Ignored:
    """One pattern, or a place in the code that computes some."""

    pattern: str
    """A regular expression that is searched for in a tensor's name; "" if computed."""
    cls: str
    line: int


def ignored_patterns(module: ModuleView) -> tuple[Ignored, ...]:
    """Patterns of all classes of the file, each once, in its order; computed ones have no text."""
    constants = {
        target.id: node.value
        for node in module.tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    found: dict[str, Ignored] = {}
    for view in module.classes.values():
        for node in ast.walk(view.node):
            if isinstance(node, ast.Assign) and any(_is_it(t) for t in node.targets):
                for pattern in _strings(node.value, constants):
                    found.setdefault(pattern, Ignored(pattern, view.name, node.lineno))
            elif _grows(node):
                found.setdefault("", Ignored("", view.name, node.lineno))
            elif _is_position_buffer(node):
                found.setdefault(POSITIONS, Ignored(POSITIONS, view.name, node.lineno))
    return tuple(found.values())


def _is_it(node: ast.expr) -> bool:
    return text(node) in (ATTRIBUTE, f"self.{ATTRIBUTE}")


def _grows(node: ast.AST) -> bool:
    """self._keys_to_ignore_on_load_unexpected.extend(...) and its like."""
    if isinstance(node, ast.AugAssign):
        return _is_it(node.target)
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and _is_it(node.func.value)
    )


def _is_position_buffer(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return text(node).startswith("self.register_buffer('position_ids',")
    return isinstance(node, ast.Assign) and text(node).startswith("self.position_ids = nn.Buffer(")


def _strings(value: ast.expr, constants: dict[str, ast.expr]) -> list[str]:
    """Strings of a list, tuple or set; "" for what is computed, nothing for None."""
    if isinstance(value, ast.Name):
        value = constants.get(value.id, value)
    if isinstance(value, ast.Constant) and value.value is None:
        return []
    if not isinstance(value, ast.List | ast.Tuple | ast.Set):
        return [""]
    return [
        str(item.value) if isinstance(item, ast.Constant) and isinstance(item.value, str) else ""
        for item in value.elts
    ]


@dataclass(frozen=True)
class Translated:
    """How vLLM's loader leaves the same tensors out."""

    prefix: tuple[str, ...] = ()
    """Names that begin so are dropped: nothing of the port is called so."""
    substr: tuple[str, ...] = ()
    regex: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    """Prefixes that are dropped only where the port has no such module: layers by their number."""
    left: tuple[Ignored, ...] = ()
    """What could not be translated."""


def translate(ignored: tuple[Ignored, ...], attributes: set[str], layers: str) -> Translated:
    """Translate the patterns for a port that has these attributes and its layers at this path.

    A pattern with a word that is in no attribute can meet nothing that the port has, so what it
    names may be dropped; any other one must ask whether the port has the module. A dot in a
    pattern stands for the dot of a name, escaped or not. A bias without a parameter needs nothing:
    vLLM's loader ignores it.
    """
    found: dict[str, list[str]] = {"prefix": [], "substr": [], "regex": [], "unexpected": []}
    left = []
    for item in ignored:
        pattern = re.sub(r"(?<!\\)\.\*$", "", item.pattern)
        plain = re.sub(r"\\([._-])", r"\1", pattern.removeprefix("^"))
        words = re.findall(r"[A-Za-z_]\w*", re.sub(r"\\[A-Za-z]", " ", pattern))
        foreign = any(not any(word in name for name in attributes) for word in words)
        if foreign and plain and not re.search(r"[\\^$*+?()\[\]{}|]", plain):
            found["prefix" if pattern.startswith("^") else "substr"].append(plain)
        elif foreign:
            found["regex"].append(item.pattern)
        elif prefix := _numbered(plain.removeprefix("(^|.)"), layers):
            found["unexpected"].append(prefix)
        elif not plain.endswith(".bias"):
            left.append(item)
    return Translated(**{name: tuple(values) for name, values in found.items()}, left=tuple(left))


def _numbered(plain: str, layers: str) -> str:
    """The whole prefix of layers with a number, of a pattern that may begin within the path."""
    match = re.fullmatch(r"(.*?)\.\d+\.?", plain)
    if match is None or not f".{layers}".endswith(f".{match[1]}"):
        return ""
    return layers.removesuffix(match[1]) + plain
