"""The draft of step copy: the modeling code stands alone, with its licence and where it is from."""

import ast
import json
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from portkit.architectures import find_architecture
from portkit.create import new_port
from portkit.draft.pipeline import apply_draft, draft_step
from portkit.errors import PortkitError
from portkit.port import Port
from portkit.steps.copy.extract import extract
from portkit.steps.copy.licence import licence_of, recognise
from portkit.steps.copy.places import BesideFile, InTransformers

OTHERS = (
    "llama", "gpt2", "gemma2", "olmo2", "bloom", "mpt", "persimmon", "phi3", "granite", "cohere2",
    "qwen3", "mixtral", "falcon", "gpt_neox", "nemotron_h", "mamba", "starcoder2",
)  # fmt: skip
HELIUM = Path(__file__).parent.parent / "portkit" / "models" / "helium" / "checkpoint"

MINE = '''"""My own model."""
import torch
from torch import nn
from transformers import PreTrainedModel

from .configuration_mine import MineConfig
from ...activations import ACT2FN
from unused import nothing

SCALE = 2.0
UNUSED = 3


def double(x):
    return x * SCALE


class MineModel(PreTrainedModel):
    config_class = MineConfig

    def forward(self, x):
        from ...cache_utils import Cache
        return ACT2FN["silu"](double(x))


class MineForCausalLM(MineModel):
    pass


class MineForTokenClassification(MineModel):
    pass
'''
CONFIG = "from .base_mine import BASE\nfrom transformers import PretrainedConfig\n\n\n" + (
    'class MineConfig(PretrainedConfig):\n    model_type = "mine"\n    base = BASE\n'
)


@pytest.fixture(scope="module")
def helium(tmp_path_factory) -> Port:
    port = new_port("helium", architecture="helium", root=tmp_path_factory.mktemp("ports"))
    assert apply_draft(port, "copy").status == "success"
    return port


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A reader's own modeling file with what it imports from beside it."""
    folder = tmp_path / "my model"
    folder.mkdir()
    (folder / "modeling_mine.py").write_text(MINE)
    (folder / "configuration_mine.py").write_text(CONFIG)
    (folder / "base_mine.py").write_text("BASE = 1\n")
    (folder / "checkpoint").mkdir()
    for path in HELIUM.glob("model*"):
        (folder / "checkpoint" / path.name).symlink_to(path)
    config = {"architectures": ["MineForCausalLM"], "model_type": "mine", "vocab_size": 9}
    (folder / "checkpoint" / "config.json").write_text(json.dumps(config))
    return folder


def names_in(source: str) -> set[str]:
    return {n.name for n in ast.parse(source).body if isinstance(n, ast.ClassDef | ast.FunctionDef)}


def test_helium_stands_alone_without_what_its_class_does_not_reach(helium):
    names = names_in(helium.source)
    assert {"HeliumForCausalLM", "HeliumAttention", "rotate_half", "repeat_kv"} <= names
    assert not names & {"HeliumForSequenceClassification", "HeliumForTokenClassification"}
    tree = ast.parse(helium.source)
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level]
    assert "auto_docstring" not in helium.source
    assert "GenericForSequenceClassification" not in helium.source
    assert "@can_return_tuple" in helium.source  # it changes what is returned: it stays


def test_every_import_that_is_left_is_used(helium):
    tree = ast.parse(helium.source)
    imported = {
        (alias.asname or alias.name).split(".")[0]
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    assert imported <= used


def test_the_kept_code_is_the_originals_code(helium):
    """Kept functions are the same but for decorators and docstrings that only document."""
    original = ast.parse(find_architecture("helium").file.read_text())

    def plain(tree):
        found = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                found.setdefault(node.name, []).append([ast.dump(line) for line in body])
        return found

    before, after = plain(original), plain(ast.parse(helium.source))
    for name, bodies in after.items():
        assert all(body in before[name] for body in bodies), name


def test_the_header_stays_and_the_generators_banner_goes(helium):
    head = helium.source.split("import math")[0]
    assert "Copyright 2024 The Kyutai and HuggingFace Inc. teams" in head
    assert "Licensed under the Apache License, Version 2.0" in head
    assert "automatically generated" not in head
    assert "transformers/models/helium/modeling_helium.py" in head


def test_provenance_and_licence_are_recorded(helium):
    source = helium.meta["source"]
    original = find_architecture("helium").file
    assert source["sha256"] == sha256(original.read_bytes()).hexdigest()
    assert source["module"] == "transformers.models.helium.modeling_helium"
    assert (source["licence"], source["licence_found"]) == ("Apache-2.0", "header")
    assert "Apache License" in (helium.root / "LICENSE").read_text()


def test_drafting_again_changes_nothing_and_warns_before_it_replaces(helium):
    before = helium.git("log", "--format=%H")
    outcome = apply_draft(helium, "copy")
    assert any("committed first" in warning for warning in outcome.warnings)
    assert helium.git("log", "--format=%H") == before


def test_other_architectures_stand_alone_and_import(tmp_path):
    """Copies of very different models import in one process, and give the class."""
    for query in OTHERS:
        found = find_architecture(query)
        taken = extract(
            found.file.read_text(), found.name, found.file.name, InTransformers(found.module)
        )
        assert found.name in taken.kept
        (tmp_path / f"copy_{query}.py").write_text(taken.code)
    names = {f"copy_{q}": find_architecture(q).name for q in OTHERS}
    code = (
        "import importlib, json, sys\nsys.path.insert(0, sys.argv[1])\n"
        "for module, name in json.loads(sys.argv[2]).items():\n"
        "    cls = getattr(importlib.import_module(module), name)\n"
        "    assert cls.__module__ == module\n"
        "print('all')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), json.dumps(names)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.strip() == "all", done.stderr[-2000:]


def test_the_readers_own_file_brings_what_is_beside_it(mine, tmp_path):
    port = new_port(
        "mine", source=mine / "modeling_mine.py", checkpoint=mine / "checkpoint",
        root=tmp_path / "ports", accept_unlicensed=True,
    )  # fmt: skip
    # The port holds its own copy: the reader's folder may move.
    (mine / "modeling_mine.py").unlink()
    outcome = apply_draft(port, "copy")
    assert outcome.status == "success", outcome.reason
    assert "from .configuration_mine import MineConfig" in port.source
    assert "from transformers.activations import ACT2FN" in port.source
    assert "from transformers.cache_utils import Cache" in port.source
    assert "unused" not in port.source.lower()
    assert {"double", "MineModel", "MineForCausalLM"} == names_in(port.source)
    package = port.root / port.package
    assert {p.name for p in package.glob("*.py")} == {
        "__init__.py", "modeling_mine.py", "configuration_mine.py", "base_mine.py",
    }  # fmt: skip
    assert port.meta["source"]["licence"] == "none"
    assert any("no licence" in warning for warning in outcome.warnings)


def test_code_without_a_licence_needs_the_readers_word(mine, tmp_path):
    asked = {"source": mine / "modeling_mine.py", "checkpoint": mine / "checkpoint"}
    with pytest.raises(PortkitError, match="says no licence") as error:
        new_port("mine", root=tmp_path / "ports", **asked)
    assert "--accept-unlicensed" in error.value.next
    assert not (tmp_path / "ports" / "mine").exists()
    port = new_port("mine", root=tmp_path / "ports", accept_unlicensed=True, **asked)
    port.update_meta("source", accept_unlicensed=False)
    outcome = draft_step(port, "copy")
    assert outcome.status == "failed" and "says no licence" in outcome.reason
    (mine / "LICENSE").write_text("MIT License\n\nCopyright (c) 2025 Me\n\nPermission is hereby\n")
    licensed = new_port("licensed", root=tmp_path / "ports", **asked)
    apply_draft(licensed, "copy")
    assert licensed.meta["source"]["licence"] == "MIT"
    assert "Copyright (c) 2025 Me" in (licensed.root / "LICENSE").read_text()
    assert "SPDX-License-Identifier: MIT" in licensed.source


def test_an_import_that_is_nowhere_is_named(mine):
    text = MINE.replace(".configuration_mine", ".configuration_gone")
    (mine / "modeling_mine.py").write_text(text)
    with pytest.raises(PortkitError, match=r"imports \.configuration_gone"):
        extract(text, "MineForCausalLM", "modeling_mine.py", BesideFile(mine / "modeling_mine.py"))


@pytest.mark.parametrize(
    ("text", "spdx"),
    [
        ("SPDX-License-Identifier: BSD-3-Clause", "BSD-3-Clause"),
        ('Licensed under the Apache License, Version 2.0 (the "License");', "Apache-2.0"),
        ("Permission is hereby granted, free of charge, to any person", "MIT"),
        ("LLAMA 2 COMMUNITY LICENSE AGREEMENT", "LicenseRef-custom"),
        ("under the terms of the GNU General Public License, version 3", "GPL-3.0-or-later"),
        ("CC BY-NC 4.0", "CC-BY-NC-4.0"),
        ("Copyright 2025 Me. All rights reserved.", None),
    ],
)
def test_licences_are_recognised_by_their_words(text, spdx):
    found = recognise(text, "header")
    assert (found and found.spdx) == spdx
    assert found is None or found.terms


def test_a_header_without_licence_falls_back_to_the_package():
    text = "import torch\n"
    assert licence_of(text) is None
    licence = licence_of(text, package="transformers")
    assert (licence.spdx, licence.found) == ("Apache-2.0", "metadata of transformers")


def test_a_class_of_another_models_file_is_brought_along():
    found = find_architecture("nemotron_h")
    text = found.file.read_text(encoding="utf-8")
    code = extract(text, found.name, found.file.name, InTransformers(found.module)).code
    assert "import Zamba2RMSNormGated" not in code
    assert "# From transformers.models.zamba2.modeling_zamba2\nclass Zamba2RMSNormGated(" in code
    # Where the file uses a name of that class for something else, the import stays.
    other = (
        text.replace("Zamba2RMSNormGated", "Zamba2RotaryEmbedding")
        .replace(
            "class NemotronHMLP", "def dynamic_rope_update():\n    pass\n\n\nclass NemotronHMLP"
        )
        .replace("self.act_fn = ", "dynamic_rope_update()\n        self.act_fn = ")
    )
    code = extract(other, found.name, found.file.name, InTransformers(found.module)).code
    assert "import Zamba2RotaryEmbedding" in code


def test_classes_of_another_models_file_that_share_helpers_come_once(tmp_path):
    text = (
        "from ..llama.modeling_llama import LlamaAttention, LlamaForCausalLM\n\n\n"
        "class MineAttention(LlamaAttention):\n    pass\n\n\n"
        "class MineForCausalLM(LlamaForCausalLM):\n    attention = MineAttention\n"
    )
    file = tmp_path / "modeling_mine.py"
    file.write_text(text)
    code = extract(text, "MineForCausalLM", file.name, BesideFile(file)).code
    assert "modeling_llama import" not in code
    assert code.count("class LlamaAttention(") == code.count("def rotate_half(") == 1
    exec(compile(code, file.name, "exec"), {"__name__": "mine"})
