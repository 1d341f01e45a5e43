"""Draft of step `out_of_tree`: the plugin's `register()`.

vLLM calls the entry points of the group `vllm.general_plugins` in each of its processes (API
server, engine core, workers), so `register()` may run many times, and before a worker forks: it
names the class by a lazy "module:Class" string and imports nothing heavy (docs: Registering a
model, Out-of-tree models; Plugin system).
"""

from __future__ import annotations

from portkit.draft.outcome import DraftOutcome
from portkit.port import Port

PLUGIN = '''"""{title}: {architecture} for vLLM, out of tree."""


def register() -> None:
    """Tell vLLM where the class is. vLLM calls this in each process, possibly more than once."""
    from vllm import ModelRegistry

    # A string, not the class: importing the model here would import torch and vLLM's layers in
    # every process, and CUDA must not be initialised before vLLM forks its workers.
    ModelRegistry.register_model(
        "{architecture}",
        "{module}:{architecture}",
    )
'''
CONFIG = """
    # vLLM reads config.json through Transformers, which does not know this model type.
    from transformers import AutoConfig

    from {config_module} import {config_class}

    AutoConfig.register({config_class}.model_type, {config_class}, exist_ok=True)
"""


def draft(port: Port) -> DraftOutcome:
    """Write vllm_<name>/__init__.py; `skipped` if it is there."""
    text = plugin_source(port)
    if port.init_file.exists() and port.init_file.read_text() == text:
        return DraftOutcome(
            "out_of_tree", "skipped", reason="The plugin registers the port already."
        )
    did = [
        f"{port.package}/__init__.py: register() with the lazy string "
        f"{port.module}:{port.architecture}"
    ]
    if "AutoConfig.register" in text:
        did.append("AutoConfig.register for the port's own configuration class")
    return DraftOutcome(
        "out_of_tree", "success", ((str(port.init_file.relative_to(port.root)), text),), tuple(did)
    )


def plugin_source(port: Port) -> str:
    """Return the text of the plugin's __init__.py."""
    text = PLUGIN.format(
        title=f"vllm-{port.name}", architecture=port.architecture, module=port.module
    )
    own = port.meta.get("source", {}).get("config_class")
    files = sorted(port.modeling.parent.glob("configuration_*.py"))
    if own and files:
        text += CONFIG.format(config_module=f"{port.package}.{files[0].stem}", config_class=own)
    return text
