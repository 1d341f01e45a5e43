"""Draft of step `register`: the patch that puts the port into a vLLM checkout.

Four files, as vLLM's guide asks (Registering a model: Built-in models; Unit testing: Model
loading): the model file, its row in the registry, its row in the registry of the tests, and its
row on the page of supported models. vLLM's lists are alphabetical, and its tests say so.

Of an architecture that vLLM has already, the patch points the registry's row at the port's file,
beside vLLM's own, and leaves the other two rows as they are.
"""

from __future__ import annotations

import difflib
import re
from importlib.util import find_spec
from pathlib import Path

from portkit.architectures import transformers_folder
from portkit.draft.outcome import DraftOutcome
from portkit.errors import PortkitError
from portkit.lint.source import must_parse
from portkit.port import Port
from portkit.steps.register import rows, tree

MODELS = "vllm/model_executor/models"
REGISTRY = f"{MODELS}/registry.py"
TEST_REGISTRY = "tests/models/registry.py"
SUPPORTED = "docs/models/supported_models.md"
SECTION = "# [Decoder-only]"
HEADING = "#### Text Generation"
SPDX = (
    "# SPDX-License-Identifier: {licence}\n"
    "# SPDX-FileCopyrightText: Copyright contributors to the vLLM project\n"
)
YES = "✅︎"


def patch_path(port: Port) -> str:
    """Where the patch lies, relative to the port."""
    return f"in_tree/add-{port.name}.patch"


def model_path(port: Port) -> str:
    """Where the model file goes, relative to the vLLM checkout; never over a file of vLLM's."""
    return f"{MODELS}/{model_module(port)}.py"


def model_module(port: Port) -> str:
    """The module that the registry's row names: the port's name, "_port" added if it is taken."""
    spec = find_spec("vllm")
    for folder in spec.submodule_search_locations or () if spec else ():
        if Path(folder, "model_executor", "models", f"{port.name}.py").exists():
            return f"{port.name}_port"
    return port.name


def draft(port: Port) -> DraftOutcome:
    """Write the patch for a vLLM checkout; `skipped` if the port's patch is up to date."""
    others = [
        p.name
        for p in port.modeling.parent.glob("*.py")
        if p not in (port.modeling, port.init_file)
    ]
    if others:
        return DraftOutcome(
            "register",
            "failed",
            reason=f"The port has more files than its model ({', '.join(others)}). In a vLLM "
            "checkout a configuration goes to vllm/transformers_utils/configs/ and is registered "
            "there: move it by hand, or keep the port out of tree (step 6).",
        )
    try:
        must_parse(port.source, port.modeling.relative_to(port.root).as_posix())
        text, did, warnings = _patch(port)
    except PortkitError as error:
        return DraftOutcome("register", "failed", reason=str(error))
    path = port.root / patch_path(port)
    if path.exists() and path.read_text() == text:
        return DraftOutcome("register", "skipped", reason="The patch is up to date with the port.")
    return DraftOutcome("register", "success", ((patch_path(port), text),), did, warnings)


def _patch(port: Port) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    registry, tests, page = tree.read(REGISTRY, TEST_REGISTRY, SUPPORTED)
    arch, module = port.architecture, model_module(port)
    native = arch in rows.dict_keys(registry, "_TEXT_GENERATION_MODELS", SECTION)
    hub, warnings = _hub_example(port)
    new_registry = registry
    for table in ("_TRANSFORMERS_SUPPORTED_MODELS", "_PREVIOUSLY_SUPPORTED_MODELS"):
        new_registry = rows.drop_dict_row(new_registry, table, arch)
    new_registry = rows.add_dict_row(
        rows.drop_dict_row(new_registry, "_TEXT_GENERATION_MODELS", arch),
        "_TEXT_GENERATION_MODELS",
        SECTION,
        arch,
        f'    "{arch}": ("{module}", "{arch}"),\n',
    )
    if native:
        warnings = (
            f"vLLM has {arch} natively. The patch points its row at {module}.py and leaves vLLM's "
            "own file: compare the two before you replace it in earnest.",
        )
        new_tests, new_page = tests, page
    else:
        new_tests, new_page = _new_rows(port, hub or module, bool(hub), tests, page)
    changes = (
        (SUPPORTED, page, new_page),
        (TEST_REGISTRY, tests, new_tests),
        (model_path(port), "", in_tree_source(port)),
        (REGISTRY, registry, new_registry),
    )
    changes = tuple(change for change in changes if change[1] != change[2])
    verb = "Replace" if native else "Add"
    text = f"[Model] {verb} {arch}\n\n" + "".join(_diff(*change) for change in changes)
    said = {
        model_path(port): "the model file, with relative imports and vLLM's SPDX header",
        REGISTRY: f"the row {arch} in _TEXT_GENERATION_MODELS, in alphabetical order",
        TEST_REGISTRY: "the row that vLLM's own registry tests want",
        SUPPORTED: "the row on the page of supported models",
    }
    touched = {path for path, *_ in changes}
    did = tuple(f"{path}: {what}" for path, what in said.items() if path in touched)
    return text, did, warnings


def _new_rows(port: Port, example: str, online: bool, tests: str, page: str) -> tuple[str, str]:
    """Return the registry of the tests and the page of supported models, each with the row."""
    arch = port.architecture
    offline = "" if online else ", is_available_online=False"
    tests = rows.add_dict_row(
        rows.drop_dict_row(tests, "_TEXT_GENERATION_EXAMPLE_MODELS", arch),
        "_TEXT_GENERATION_EXAMPLE_MODELS",
        SECTION,
        arch,
        f'    "{arch}": _HfExamplesInfo("{example}"{offline}),\n',
    )
    lora, pp = (YES if base in port.source else "" for base in ("SupportsLoRA", "SupportsPP"))
    cells = (f"`{arch}`", _title(arch), f"`{example}`, etc.", lora, pp)
    row = "| " + " | ".join(cells).replace("|  |", "| |").rstrip() + " |\n"
    return tests, rows.add_table_row(page, HEADING, arch, row)


def in_tree_source(port: Port) -> str:
    """Return the port's model file as it stands in a vLLM checkout."""
    source = re.sub(
        r"^from vllm\.model_executor\.models\.(\w+) import",
        r"from .\1 import",
        port.source,
        flags=re.M,
    )
    licence = port.meta.get("source", {}).get("licence") or "Apache-2.0"
    return source if source.startswith("# SPDX-") else SPDX.format(licence=licence) + source


def _diff(path: str, old: str, new: str) -> str:
    lines = list(
        difflib.unified_diff(
            old.splitlines(keepends=True),
            new.splitlines(keepends=True),
            f"a/{path}" if old else "/dev/null",
            f"b/{path}",
        )
    )
    mode = "" if old else "new file mode 100644\n"
    return f"diff --git a/{path} b/{path}\n{mode}" + "".join(lines)


def _title(architecture: str) -> str:
    return re.sub(r"(ForCausalLM|LMHeadModel)$", "", architecture)


def _hub_example(port: Port) -> tuple[str, tuple[str, ...]]:
    """The hub's checkpoint for vLLM's tests: the reader's choice, else Transformers' example."""
    meta = port.meta
    if chosen := meta.get("decisions", {}).get("hub_example"):
        return str(chosen), ()
    module = str(meta.get("source", {}).get("module", ""))
    package, _, name = module.rpartition(".")
    if package.startswith("transformers."):
        folder = transformers_folder().joinpath(*package.split(".")[1:])
        file = folder / f"{name.replace('modeling_', 'configuration_')}.py"
        found = re.search(r'checkpoint="([^"]+)"', file.read_text()) if file.exists() else None
        if found:
            return found.group(1), ()
    return "", (
        "No checkpoint on the hub is known for this model: set hub_example in [decisions] of "
        "port.toml; until then the test row says is_available_online=False.",
    )
