"""Make a port of a vLLM model file that exists already: by hand, by an assistant, vLLM's own.

The file comes in as it is. Only its relative imports are made absolute, because it moves into the
port's package, operators that it registers get names of the port's own, and a class of another name
than the checkpoint's architecture gets a subclass of that name. The port is at no step in
particular: `portkit diagnose` says how it stands. Nothing of the file is run, and neither torch nor
vLLM is imported.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import libcst as cst

from portkit import models
from portkit.architectures import find_architecture
from portkit.checkpoint import read_config
from portkit.create import new_port
from portkit.errors import PortkitError
from portkit.lint.source import parse
from portkit.port import META, Port
from portkit.vllm_source import registered_class, vllm_folder, with_own_operators

SECTION = "adopted"
"""Table of port.toml that says where the code comes from; only adopted ports have it."""
VLLM_MODELS = ("vllm", "model_executor", "models")


def adopt(
    file: str | Path,
    *,
    architecture: str | None = None,
    checkpoint: str | Path | None = None,
    name: str | None = None,
    cls: str | None = None,
    original: str | Path | None = None,
    root: str | Path | None = None,
    accept_unlicensed: bool = False,
    trust_remote_code: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> Port:
    """Create a port of the vLLM model file `file` (a path, or a module as "vllm.….llama").

    `architecture` and `checkpoint` as for `new_port`: without a checkpoint the bundled one is used,
    else a tiny random one is made. `cls` is the class in the file, if it is not called like the
    architecture. `original`: the Transformers modeling file to compare with, for an architecture
    that the installed Transformers lacks. Raises PortkitError if the file does not parse, lacks the
    class, or imports what is neither beside it nor in vLLM, and as `new_port` does.
    """
    wanted = _architecture(architecture, checkpoint, original is not None)
    registered = cls or registered_class(wanted)
    found = _file(file, registered or wanted)
    source = _read(found)
    called = name or _name_for(found, wanted)
    moved = _absolute(with_own_operators(parse(source, found.name), called), _Imports.of(found))
    text, cls = _named(moved.code, wanted, cls, registered, found)
    port = new_port(
        called,
        architecture=wanted,
        checkpoint=checkpoint,
        source=original,
        root=root,
        accept_unlicensed=accept_unlicensed,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    files: dict[Path | str, str | bytes] = {port.modeling: text}
    for beside in moved.beside:
        files[port.modeling.parent / beside.name] = beside.read_bytes()
    files[META] = port.meta_with(SECTION, file=str(found), cls=cls)
    port.apply(files, f"adopt {found.name}")
    return port


def adopted(port: Port) -> bool:
    """Whether the port's code was adopted and did not come by the steps."""
    return SECTION in port.meta


# ---- what was asked for -------------------------------------------------------------------------


def _file(given: str | Path, cls: str) -> Path:
    path = Path(given).expanduser().absolute()
    if path.is_file():
        return path
    text = str(given)
    if text.startswith("vllm.") and all(part.isidentifier() for part in text.split(".")):
        inside = vllm_folder().joinpath(*text.split(".")[1:])
        if inside.with_suffix(".py").is_file():
            return inside.with_suffix(".py")
        if (inside / "__init__.py").is_file():
            return _in_package(text, inside, cls)
    raise PortkitError(
        f"There is no file {text!r}.",
        "FILE",
        "Give the path of a vLLM model file, or a module such as vllm.model_executor.models.llama.",
    )


def _in_package(module: str, folder: Path, cls: str) -> Path:
    """Return the package's file that defines the class; platforms may have one each."""
    define = re.compile(rf"^class {re.escape(cls)}\b", re.MULTILINE)
    files = [f for f in sorted(folder.rglob("*.py")) if define.search(_read(f))]
    if len(files) == 1:
        return files[0]
    names = [".".join((module, *f.relative_to(folder).with_suffix("").parts)) for f in files]
    raise PortkitError(
        f"{module} is a package with {len(files) or 'no'} files that define {cls}.",
        str(folder),
        f"Say which one: {_list(names)}." if files else "Give the module that defines the class.",
    )


def _read(file: Path) -> str:
    try:
        return file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise PortkitError(
            f"{file.name} is not UTF-8 text.", str(file), "Save it as UTF-8."
        ) from error


def _architecture(given: str | None, checkpoint: str | Path | None, own: bool) -> str:
    if given:
        bundle = models.find(given)
        name = bundle.architecture if bundle else given
        return name if own else find_architecture(name).name
    if checkpoint:
        named = read_config(Path(checkpoint).expanduser()).get("architectures") or []
        if named:
            return str(named[0])
    raise PortkitError(
        "Which architecture is it?",
        "--model",
        "Say `--model ARCHITECTURE`, or `--checkpoint DIR` with a config.json that names it.",
    )


def _name_for(file: Path, architecture: str) -> str:
    stem = file.stem.removeprefix("modeling_").lower()
    return stem if stem.isidentifier() else architecture.removesuffix("ForCausalLM").lower()


def _named(
    text: str, architecture: str, cls: str | None, registered: str, file: Path
) -> tuple[str, str]:
    """Return the text with a class of the architecture's name in it, and which of its own that is.

    Without a `cls`, that of the architecture's name, else the one that vLLM registers for it.
    """
    classes = [n.name for n in ast.parse(text).body if isinstance(n, ast.ClassDef)]
    if cls is not None and cls not in classes:
        raise PortkitError(
            f"{file.name} defines no class {cls}.", str(file), f"It defines {_list(classes)}."
        )
    if cls is None:
        cls = next((c for c in (architecture, registered) if c in classes), None)
    if cls == architecture:
        return text, cls
    if cls is None:
        raise PortkitError(
            f"{file.name} defines no class {architecture}, which the checkpoint asks for.",
            str(file),
            f"Say which one it is: `--class NAME`. It defines {_list(classes)}.",
        )
    return (
        f"{text.rstrip()}\n\n\nclass {architecture}({cls}):\n"
        f'    """The name that config.json asks for; all of it is {cls}."""\n',
        cls,
    )


def _list(names: list[str]) -> str:
    return ", ".join(names) or "none"


# ---- imports ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Moved:
    """The file's code for its new place, and the files that come along."""

    code: str
    beside: tuple[Path, ...]


@dataclass(frozen=True)
class _Imports:
    """Where relative imports of a file point to."""

    file: Path
    package: tuple[str, ...]
    """The package that the file lies in, e.g. ("vllm", "model_executor", "models"); or empty."""

    @classmethod
    def of(cls, file: Path) -> _Imports:
        parts: list[str] = []
        folder = file.parent
        while (folder / "__init__.py").is_file():
            parts.insert(0, folder.name)
            folder = folder.parent
        # A checkout that is not on the path is read as the installed vLLM.
        return cls(file, tuple(parts) if parts[:1] == ["vllm"] else ())

    def resolve(self, level: int, name: str) -> tuple[str, Path | None]:
        """Return (absolute module, None), or ("", file) for a file beside that comes along."""
        head = name.split(".")[0]
        sibling = self.file.parent / f"{head}.py"
        if not self.package and level == 1 and head and sibling.is_file():
            return "", sibling
        base = list(self.package or VLLM_MODELS)
        parts = base[: len(base) - (level - 1)] + ([p for p in name.split(".") if p])
        place = vllm_folder().joinpath(*parts[1:])
        if parts[:1] == ["vllm"] and (place.is_dir() or place.with_suffix(".py").is_file()):
            return ".".join(parts), None
        raise PortkitError(
            f"{self.file.name} imports {'.' * level}{name}: neither beside it nor in "
            f"vLLM's models.",
            str(self.file),
            f"Put {head or name}.py into the folder of {self.file.name}, or write the import "
            f"absolutely.",
        )


class _Absolute(cst.CSTTransformer):
    def __init__(self, imports: _Imports) -> None:
        self.imports = imports
        self.beside: dict[Path, None] = {}

    def leave_ImportFrom(
        self, original_node: cst.ImportFrom, updated_node: cst.ImportFrom
    ) -> cst.ImportFrom:
        level = len(updated_node.relative)
        if not level:
            return updated_node
        name = cst.Module([]).code_for_node(updated_node.module) if updated_node.module else ""
        module, sibling = self.imports.resolve(level, name)
        if sibling is not None:
            self.beside[sibling] = None
            return updated_node
        return updated_node.with_changes(
            relative=[],
            module=cst.parse_expression(module),
            whitespace_after_from=cst.SimpleWhitespace(" "),
        )


def _absolute(module: cst.Module, imports: _Imports) -> _Moved:
    visitor = _Absolute(imports)
    code = module.visit(visitor).code
    return _Moved(code, tuple(visitor.beside))
