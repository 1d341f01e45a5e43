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
    """
    name = request.args["architecture"]
    found: dict[str, Any] = {"answer": "unknown", "version": vllm.__version__, "module": ""}
    for table in NATIVE:
        if name in getattr(registry, table):
            module, cls = getattr(registry, table)[name][:2]
            found |= {"answer": "native", "table": table, "class": cls}
            found["module"] = f"vllm.model_executor.models.{module}"
            return found
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
