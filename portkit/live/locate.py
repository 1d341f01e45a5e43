"""Find the line of the port's file where a module is made, and the one where it is called."""

from __future__ import annotations

import ast
import inspect
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from portkit.live.fused import fused_parts

WINDOW = 60


@dataclass(frozen=True)
class Place:
    """Lines of the port's file; 0 where there is none."""

    file: str
    made: int
    called: int
    text: str
    """The construction, or else the call, as it stands there."""
    call_text: str = ""
    passed_on: bool = False
    """Whether the call hands on nothing but what its method was given."""

    @property
    def at_call(self) -> str:
        """The call, if there is one, for faults in what is handed over."""
        return f"{self.file}:{self.called}: {self.call_text}" if self.called else str(self)

    def __str__(self) -> str:
        line = self.made or self.called
        called = f" (called in line {self.called})" if self.made and self.called else ""
        return f"{self.file}:{line}{called}: {self.text}" if line else self.file


def place_of(model: nn.Module, path: str, *, call: str = "") -> Place | None:
    """Return where the module at `path` is made and called, in the class that holds it.

    If the port has no such attribute, the class that would hold it. `call`: another attribute of
    that class, whose call is meant, e.g. "rotary_emb".
    """
    parts = path.split(".")
    # An index belongs to the list that holds it: model.layers.0 is made where self.layers is.
    while parts and parts[-1].isdigit():
        parts.pop()
    holder: nn.Module = model
    depth = 0
    for part in parts[:-1]:
        child = getattr(holder, part, None)
        if not isinstance(child, nn.Module):
            break
        holder, depth = child, depth + 1
    names = [call] if call else [parts[-1] if depth == len(parts) - 1 else parts[depth]]
    packed = fused_parts(model)
    names += [fused for fused, members in packed.items() if names[0] in members]
    return _in_class(type(holder), names)


def call_of(model: nn.Module, path: str) -> Place | None:
    """Return the call that decides what the module at `path` is given.

    That is further out where a call only hands on what its own method got: q_proj's input is what
    the layer gives to the attention. What a layer after the first gets, the one before it made.
    """
    place = place_of(model, path)
    while place is not None and place.passed_on:
        path = path.rpartition(".")[0]
        index = path.rpartition(".")[2]
        outer = place_of(model, path) if path else None
        if outer is None or not outer.called or (index.isdigit() and index != "0"):
            break
        place = outer
    return place


def _in_class(cls: type, names: list[str]) -> Place | None:
    try:
        lines, start = inspect.getsourcelines(cls)
        file = Path(inspect.getsourcefile(cls) or "").name
        tree = ast.parse(
            inspect.cleandoc("\n" + "".join(lines)) if lines[0][0] == " " else "".join(lines)
        )
    except (OSError, TypeError, SyntaxError):
        return None
    made = 0
    text = ""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            flat = [e for t in targets for e in (t.elts if isinstance(t, ast.Tuple) else [t])]
            if not made and any(_is_self(t, names) for t in flat):
                made = node.lineno
                text = text or ast.unparse(node)
    call = _call(tree, names)
    called = call.lineno if call is not None else 0
    call_text = lines[called - 1].strip() if called else ""
    if called and not made:
        text = call_text
    if not text:
        return Place(file, start, 0, lines[0].strip())
    short = " ".join(text.split())
    shift = start - 1
    return Place(
        file,
        made and made + shift,
        called and called + shift,
        short if len(short) <= WINDOW else short[: WINDOW - 2] + " …",
        call_text,
        call is not None and _passes_on(tree, call),
    )


def _call(tree: ast.Module, names: list[str]) -> ast.Call | None:
    """Return the call of self.name, or that of its items in a loop."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _is_self(node.func, names):
            return node
    for loop in ast.walk(tree):
        if isinstance(loop, ast.For) and any(_is_self(n, names) for n in ast.walk(loop.iter)):
            items = {n.id for n in ast.walk(loop.target) if isinstance(n, ast.Name)}
            for node in ast.walk(loop):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Name)
                    and node.func.id in items
                ):
                    return node
    return None


def _passes_on(tree: ast.Module, call: ast.Call) -> bool:
    """Whether all arguments are the method's own, as it got them."""
    method = next(
        (
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and call in ast.walk(node)
        ),
        None,
    )
    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    names = {node.id for node in given if isinstance(node, ast.Name)}
    if method is None or not names or len(names) < len(given):
        return False
    own = {a.arg for a in (*method.args.args, *method.args.kwonlyargs)}
    changed = {
        node.id
        for node in ast.walk(method)
        if isinstance(node, ast.Name)
        and isinstance(node.ctx, ast.Store)
        and node.lineno < call.lineno
    }
    return names <= own - changed


def method_place(cls: type, name: str) -> Place | None:
    """Return the last `return` of a method, where what it answers is put together."""
    try:
        lines, start = inspect.getsourcelines(inspect.unwrap(getattr(cls, name)))
        file = Path(inspect.getsourcefile(inspect.unwrap(getattr(cls, name))) or "").name
    except (OSError, TypeError, AttributeError):
        return None
    last = max((n for n, line in enumerate(lines) if line.strip().startswith("return")), default=0)
    return Place(file, 0, start + last, lines[last].strip(), lines[last].strip())


def _is_self(node: ast.expr, names: list[str]) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
        and node.attr in names
    )
