"""portkit: port a Transformers model to vLLM, every step validated in the real vLLM.

The names that a notebook imports. They are found when first used, so that `import portkit` loads
neither torch nor vLLM, nor anything else that is slow.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "adopt": "portkit.adopt",
    "diagnose": "portkit.diagnosis.run",
    "begin": "portkit.notebook",
    "begin_diagnosis": "portkit.clinic",
    "Session": "portkit.notebook",
    "new_port": "portkit.create",
    "open_port": "portkit.port",
    "find_port": "portkit.ports",
    "Port": "portkit.port",
    "findings": "portkit.lint.engine",
    "fix": "portkit.lint.engine",
    "run_checks": "portkit.checks.runner",
    "draft_step": "portkit.draft.pipeline",
    "apply_draft": "portkit.draft.pipeline",
    "walk": "portkit.autopilot",
    "PortkitError": "portkit.errors",
}

__all__ = [
    "Port",
    "PortkitError",
    "Session",
    "adopt",
    "apply_draft",
    "begin",
    "begin_diagnosis",
    "diagnose",
    "draft_step",
    "find_port",
    "findings",
    "fix",
    "new_port",
    "open_port",
    "run_checks",
    "walk",
]

if TYPE_CHECKING:
    from portkit.adopt import adopt
    from portkit.autopilot import walk
    from portkit.checks.runner import run_checks
    from portkit.clinic import begin_diagnosis
    from portkit.create import new_port
    from portkit.diagnosis.run import diagnose
    from portkit.draft.pipeline import apply_draft, draft_step
    from portkit.errors import PortkitError
    from portkit.lint.engine import findings, fix
    from portkit.notebook import Session, begin
    from portkit.port import Port, open_port
    from portkit.ports import find_port


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'portkit' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
