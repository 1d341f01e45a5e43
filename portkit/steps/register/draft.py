"""Draft of step `register`: the patch that puts the port into a vLLM checkout.

Four files, as vLLM's guide asks (Registering a model: Built-in models; Unit testing: Model
loading): the model file, its row in the registry, its row in the registry of the tests, and its
row on the page of supported models. vLLM's lists are alphabetical, and its tests say so.
"""

from __future__ import annotations

import difflib
import re

from portkit.architectures import transformers_folder
from portkit.draft.outcome import DraftOutcome
from portkit.errors import PortkitError
from portkit.lint.source import must_parse
from portkit.port import Port
from portkit.steps.register import rows, tree

REGISTRY = "vllm/model_executor/models/registry.py"
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
    """Where the model file goes, relative to the vLLM checkout."""
    return f"vllm/model_executor/models/{port.name}.py"


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
    arch, module = port.architecture, port.name
    hub, warnings = _hub_example(port)

    new_registry = rows.drop_dict_row(registry, "_TRANSFORMERS_SUPPORTED_MODELS", arch)
    new_registry = rows.drop_dict_row(new_registry, "_PREVIOUSLY_SUPPORTED_MODELS", arch)
    new_registry = rows.add_dict_row(
        new_registry,
        "_TEXT_GENERATION_MODELS",
        SECTION,
        arch,
        f'    "{arch}": ("{module}", "{arch}"),\n',
    )
    offline = "" if hub else ", is_available_online=False"
    new_tests = rows.drop_dict_row(tests, "_TEXT_GENERATION_EXAMPLE_MODELS", arch)
    new_tests = rows.add_dict_row(
        new_tests,
        "_TEXT_GENERATION_EXAMPLE_MODELS",
        SECTION,
        arch,
        f'    "{arch}": _HfExamplesInfo("{hub or module}"{offline}),\n',
    )
    lora, pp = (YES if base in port.source else "" for base in ("SupportsLoRA", "SupportsPP"))
    cells = (f"`{arch}`", _title(arch), f"`{hub or module}`, etc.", lora, pp)
    new_page = rows.add_table_row(
        page, HEADING, arch, "| " + " | ".join(cells).replace("|  |", "| |").rstrip() + " |\n"
    )
    changes = (
        (SUPPORTED, page, new_page),
        (TEST_REGISTRY, tests, new_tests),
        (model_path(port), "", in_tree_source(port)),
        (REGISTRY, registry, new_registry),
    )
    text = f"[Model] Add {arch}\n\n" + "".join(_diff(*change) for change in changes)
    did = (
        f"{model_path(port)}: the model file, with relative imports and vLLM's SPDX header",
        f"{REGISTRY}: the row {arch} in _TEXT_GENERATION_MODELS, in alphabetical order",
        f"{TEST_REGISTRY}: the row that vLLM's own registry tests want",
        f"{SUPPORTED}: the row on the page of supported models",
    )
    return text, did, warnings


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
