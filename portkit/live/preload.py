"""What the worker imports before it forks, so that a job's engine starts at once."""

from __future__ import annotations

MODULES = (
    "torch",
    "transformers",
    "vllm",
    "vllm.entrypoints.llm",
)


def warm() -> None:
    """Do once what every engine start would do again and that leaves nothing behind but caches."""
