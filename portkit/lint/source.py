"""One parsed file, read once and shared by all rules: classes, layers, imports, positions.

Facts are gathered first, into plain values; rules only ask. Nothing here imports torch or vLLM:
names are resolved through the file's own import statements.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from functools import cached_property

import libcst as cst
from libcst.metadata import CodeRange, MetadataWrapper, PositionProvider

from portkit.errors import PortkitError
from portkit.lint.finding import PortContext

# What a short example means by these names when it shows no imports.
USUAL_ALIASES = {"nn": "torch.nn", "F": "torch.nn.functional", "torch": "torch", "np": "numpy"}

LINEAR_CLASSES = frozenset(
    {
        "ReplicatedLinear",
        "RowParallelLinear",
        "ColumnParallelLinear",
        "MergedColumnParallelLinear",
        "QKVParallelLinear",
    }
)
"""vLLM's linear layers (layers/linear.py); each returns `(output, bias)`."""

CAUSAL_LM_NAME = re.compile(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration)$")


@dataclass(frozen=True)
class Layer:
    """`self.<attribute> = <call>` in a class."""

    attribute: str
    name: str
    """Last part of what is called, e.g. "Linear", "QKVParallelLinear"."""
    dotted: str
    """Resolved name, e.g. "torch.nn.Linear"."""
    call: cst.Call
    method: str


@dataclass
class ClassFacts:
    """One top-level class."""

    name: str
    node: cst.ClassDef
    bases: tuple[str, ...]
    """Resolved names of the bases."""
    methods: dict[str, cst.FunctionDef] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)
    values: dict[str, cst.BaseExpression] = field(default_factory=dict)
    """Class-level assignments, e.g. packed_modules_mapping."""
    text: str = ""
    """The class as written: for cheap "is it mentioned at all" questions."""

    def layer(self, attribute: str) -> Layer | None:
        return next((layer for layer in self.layers if layer.attribute == attribute), None)

    @property
    def has_base_elsewhere(self) -> bool:
        """True if a base may bring methods that this file does not show."""
        known = ("torch.nn.Module", "nn.Module", "Module", "object", "Protocol", "ABC")
        return any(
            base not in known and not re.search(r"\.?(Supports\w+|\w*Mixin|Is\w+|Has\w+)$", base)
            for base in self.bases
        )


class Source:
    """A parsed file with its facts. Raises PortkitError if it does not parse."""

    def __init__(self, text: str, path: str = "", port: PortContext | None = None) -> None:
        self.text = text
        self.path = path
        self.port = port or PortContext()
        self.module = parse(text, path)
        self.wrapper = MetadataWrapper(self.module, unsafe_skip_copy=True)
        self.aliases: dict[str, str] = {}
        self.imports: list[tuple[str, str, cst.ImportFrom]] = []
        """(module with its leading dots, imported name, statement)."""
        self.classes: dict[str, ClassFacts] = {}
        self.functions: dict[str, cst.FunctionDef] = {}
        self.parents: dict[cst.CSTNode, cst.CSTNode] = {}
        self.module.visit(_Gather(self))

    # ---- where things are --------------------------------------------------------------------

    @cached_property
    def positions(self) -> dict[cst.CSTNode, CodeRange]:
        return self.wrapper.resolve(PositionProvider)

    def ancestors(self, node: cst.CSTNode):
        """Yield the node's parents, innermost first."""
        current = self.parents.get(node)
        while current is not None:
            yield current
            current = self.parents.get(current)

    def function_of(self, node: cst.CSTNode) -> cst.FunctionDef | None:
        return next((a for a in self.ancestors(node) if isinstance(a, cst.FunctionDef)), None)

    def class_of(self, node: cst.CSTNode) -> ClassFacts | None:
        """The outermost class around a node."""
        found = [a for a in self.ancestors(node) if isinstance(a, cst.ClassDef)]
        return self.classes.get(found[-1].name.value) if found else None

    def statement_of(self, node: cst.CSTNode) -> cst.CSTNode | None:
        return next(
            (
                a
                for a in self.ancestors(node)
                if isinstance(a, (cst.Assign, cst.AnnAssign, cst.AugAssign, cst.Return, cst.Expr))
            ),
            None,
        )

    def symbol(self, node: cst.CSTNode) -> str:
        """Qualified name of the class or function around (or being) a node."""
        chain = [node, *self.ancestors(node)]
        names = [a.name.value for a in chain if isinstance(a, (cst.FunctionDef, cst.ClassDef))]
        return ".".join(reversed(names))

    def code(self, node: cst.CSTNode) -> str:
        return self.module.code_for_node(node).strip()

    # ---- what names mean ---------------------------------------------------------------------

    def dotted(self, node: cst.CSTNode) -> str:
        """Dotted name of a Name/Attribute chain with imports resolved; "" for anything else."""
        parts: list[str] = []
        while isinstance(node, cst.Attribute):
            parts.append(node.attr.value)
            node = node.value
        if not isinstance(node, cst.Name):
            return ""
        root = node.value
        if root not in self.classes and root not in self.functions:
            root = self.aliases.get(root) or USUAL_ALIASES.get(root, root)
        return ".".join([root, *reversed(parts)])

    def vllm_name(self, function: cst.CSTNode) -> str:
        """Last part of a called name if it may be vLLM's: not local, not from elsewhere."""
        dotted = self.dotted(function)
        root = dotted.partition(".")[0]
        if not dotted or root in ("torch", "transformers", "self") or dotted in self.classes:
            return ""
        return dotted.rpartition(".")[2]

    # ---- which class is which ----------------------------------------------------------------

    @cached_property
    def top(self) -> ClassFacts | None:
        """The class being ported: the port's architecture, else the last causal LM of the file."""
        if self.port.architecture:
            return self.classes.get(self.port.architecture)
        found = [c for c in self.classes.values() if CAUSAL_LM_NAME.search(c.name)]
        return found[-1] if found else None

    @cached_property
    def backbone(self) -> ClassFacts | None:
        """The local `...Model` class that the top class is made of: the one that embeds tokens."""
        if self.top is None:
            return None
        built = [
            self.classes[layer.name]
            for layer in self.top.layers
            if layer.name.endswith("Model") and layer.name in self.classes
        ]
        for facts in built:
            if any("Embedding" in layer.name for layer in facts.layers):
                return facts
        by_name = self.classes.get(CAUSAL_LM_NAME.sub("Model", self.top.name))
        return by_name or (built[0] if len(built) == 1 else None)

    @cached_property
    def layers(self) -> list[tuple[ClassFacts, Layer]]:
        return [(facts, layer) for facts in self.classes.values() for layer in facts.layers]


class _Gather(cst.CSTVisitor):
    """Collect imports, top-level classes and functions, and the layers of each class."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.stack: list[cst.CSTNode] = []
        """Classes and functions around the current node, outermost first."""
        self.path: list[cst.CSTNode] = []
        self.current: ClassFacts | None = None

    def on_visit(self, node: cst.CSTNode) -> bool:
        if self.path:
            self.source.parents[node] = self.path[-1]
        self.path.append(node)
        super().on_visit(node)
        return True

    def on_leave(self, original_node: cst.CSTNode) -> None:
        self.path.pop()
        super().on_leave(original_node)

    def visit_Import(self, node: cst.Import) -> None:
        for alias in node.names:
            name = _plain(alias.name)
            local = alias.evaluated_alias or name.partition(".")[0]
            self.source.aliases[local] = name if alias.evaluated_alias else local

    def visit_ImportFrom(self, node: cst.ImportFrom) -> None:
        module = "." * len(node.relative) + (_plain(node.module) if node.module else "")
        if not isinstance(node.names, cst.ImportStar):
            for alias in node.names:
                name = _plain(alias.name)
                local = alias.evaluated_alias or name
                self.source.aliases[local] = (
                    f"{module}.{name}" if not module.endswith(".") else module + name
                )
                self.source.imports.append((module, name, node))

    def visit_ClassDef(self, node: cst.ClassDef) -> None:
        if not self.stack:
            bases = tuple(self.source.dotted(base.value) for base in node.bases)
            self.current = ClassFacts(node.name.value, node, bases, text=self.source.code(node))
            self.source.classes[node.name.value] = self.current
        self.stack.append(node)

    def leave_ClassDef(self, original_node: cst.ClassDef) -> None:
        self.stack.pop()
        if not self.stack:
            self.current = None

    def visit_FunctionDef(self, node: cst.FunctionDef) -> None:
        if not self.stack:
            self.source.functions[node.name.value] = node
        elif self.current is not None and self.stack == [self.current.node]:
            self.current.methods[node.name.value] = node
        self.stack.append(node)

    def leave_FunctionDef(self, original_node: cst.FunctionDef) -> None:
        self.stack.pop()

    def visit_Assign(self, node: cst.Assign) -> None:
        self._assignment(node.targets[0].target, node.value)

    def visit_AnnAssign(self, node: cst.AnnAssign) -> None:
        if node.value is not None:
            self._assignment(node.target, node.value)

    def _assignment(self, target: cst.BaseExpression, value: cst.BaseExpression) -> None:
        if self.current is None:
            return
        if isinstance(target, cst.Name) and self.stack == [self.current.node]:
            self.current.values[target.value] = value
        if isinstance(target, cst.Tuple) and target.elements:
            target = target.elements[-1].value
        attribute = self_attribute(target)
        if attribute and isinstance(value, cst.Call):
            dotted = self.source.dotted(value.func)
            method = next((n.name.value for n in self.stack if isinstance(n, cst.FunctionDef)), "")
            self.current.layers.append(
                Layer(attribute, dotted.rpartition(".")[2], dotted, value, method)
            )


def must_parse(text: str, path: str = "") -> None:
    """Raise PortkitError as `parse` does; for a file that parses it is much quicker."""
    try:
        must_compile(text)
    except (SyntaxError, ValueError, RecursionError):
        parse(text, path)


def must_compile(text: str) -> None:
    """Raise SyntaxError or ValueError for what Python would not import.

    LibCST and ast.parse take more than that: a keyword given twice, a `return` in no function.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an escape that is none is the reader's business
        compile(text, "source", "exec", dont_inherit=True)


def parse(text: str, path: str = "") -> cst.Module:
    """Parse a file; PortkitError with line, column and the line itself if it does not parse."""
    try:
        module = cst.parse_module(text)
        must_compile(text)
        return module
    except (cst.ParserSyntaxError, SyntaxError, ValueError) as error:
        reason, line, column = _reason(text, error)
    lines = text.splitlines()
    shown = lines[line - 1] if 0 < line <= len(lines) else ""
    caret = " " * len(shown[: column - 1].expandtabs(4)) + "^"
    raise PortkitError(
        f"{path or 'The source'} is not valid Python: {reason}.",
        f"{path or 'the source'}:{line}:{column}\n    {shown.expandtabs(4)}\n    {caret}",
        "Mend that line or the one above it (often a bracket, quote or indent); nothing "
        "was changed.",
    )


def _reason(text: str, error: Exception) -> tuple[str, int, int]:
    """Message, line and column (1-based): Python's own are plainer than the grammar's."""
    try:
        must_compile(text)
    except SyntaxError as python:
        return python.msg, python.lineno or 1, max(1, python.offset or 1)
    except ValueError as python:
        return str(python), 1, 1
    if not isinstance(error, cst.ParserSyntaxError):
        return str(error), 1, 1
    return error.message.splitlines()[0].rstrip("."), error.raw_line, error.raw_column + 1


def self_attribute(node: cst.CSTNode) -> str:
    """ "x" for `self.x`, else ""."""
    if (
        isinstance(node, cst.Attribute)
        and isinstance(node.value, cst.Name)
        and node.value.value == "self"
    ):
        return node.attr.value
    return ""


def keyword(call: cst.Call, name: str) -> cst.Arg | None:
    """The keyword argument of this name, if written."""
    return next((a for a in call.args if a.keyword is not None and a.keyword.value == name), None)


def argument(call: cst.Call, position: int, name: str) -> cst.BaseExpression | None:
    """An argument by keyword or by position; None if absent or hidden behind `*`/`**`."""
    named = keyword(call, name)
    if named is not None:
        return named.value
    plain = []
    for item in call.args:
        if item.keyword is not None or item.star:
            break
        plain.append(item.value)
    return plain[position] if position < len(plain) else None


def unpacks(call: cst.Call) -> bool:
    """True if arguments hide behind `*args` or `**kwargs`: then absence proves nothing."""
    return any(a.star for a in call.args)


def parameters(function: cst.FunctionDef) -> dict[str, cst.Param]:
    """Named parameters, `self` included."""
    p = function.params
    return {q.name.value: q for q in (*p.posonly_params, *p.params, *p.kwonly_params)}


def takes_kwargs(function: cst.FunctionDef) -> bool:
    return function.params.star_kwarg is not None


def _plain(node: cst.CSTNode) -> str:
    if isinstance(node, cst.Attribute):
        return f"{_plain(node.value)}.{node.attr.value}"
    return node.value if isinstance(node, cst.Name) else ""
