"""What the installed vLLM's own tables say about an architecture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import vllm
from vllm.model_executor.models import registry

from portkit.live.job import JobRequest

BACKEND = "_TRANSFORMERS_SUPPORTED_MODELS"
NATIVE = (
    "_TEXT_GENERATION_MODELS",
    "_MULTIMODAL_MODELS",
    "_EMBEDDING_MODELS",
    "_SPECULATIVE_DECODING_MODELS",
)


def run(request: JobRequest, say: Callable[[str], None]) -> dict[str, Any]:
    """Look `request.args["architecture"]` up in `vllm/model_executor/models/registry.py`.

    "answer" is native, removed, backend (listed as served by Transformers' class), plugin or
    unknown (which vLLM tries to serve through the Transformers backend as well).
    args: "locate", True to import a native class and say in which module it is defined here
    ("defined_in", "" with "why" if it cannot be imported on this platform), and as what ("class").
    """
    name = request.args["architecture"]
    found: dict[str, Any] = {"answer": "unknown", "version": vllm.__version__, "module": ""}
    for table in NATIVE:
        if name in getattr(registry, table):
            module, cls = getattr(registry, table)[name][:2]
            found |= {"answer": "native", "table": table, "class": cls}
            inside = module.startswith("vllm.")
            found["module"] = module if inside else f"vllm.model_executor.models.{module}"
            return found | (_located(name) if request.args.get("locate") else {})
    if name in getattr(registry, BACKEND):
        return found | {
            "answer": "backend",
            "table": BACKEND,
            "class": getattr(registry, BACKEND)[name][1],
        }
    if name in registry._OOT_SUPPORTED_MODELS:
        return found | {"answer": "plugin", "plugin": registry._OOT_SUPPORTED_MODELS[name]}
    if name in registry._PREVIOUSLY_SUPPORTED_MODELS:
        return found | {"answer": "removed", "last": registry._PREVIOUSLY_SUPPORTED_MODELS[name]}
    return found


def _located(name: str) -> dict[str, Any]:
    """Where the class stands: packages pick a file by platform, modules import one of another."""
    try:
        cls = vllm.ModelRegistry.models[name].load_model_cls()
    except Exception as error:
        return {"defined_in": "", "why": f"{type(error).__name__}: {error}"}
    return {"defined_in": cls.__module__, "class": cls.__name__}
