"""What every test runs under, and which tests this machine cannot run."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
OWN_WORKERS = ("test_worker.py", "test_notebooks.py", "test_setup.py")
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome")

# Set before anything imports torch, transformers or vLLM; child processes inherit them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    VLLM_NO_USAGE_STATS="1",
    DO_NOT_TRACK="1",
    PYTHONUTF8="1",
)
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; the default takes half the memory
# The environment's own tools (portkit, jupyter, ninja) even where it is not activated.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

sys.path.insert(0, str(ROOT / "requirements"))
import machine  # noqa: E402  (the installer's own look at the machine)


@pytest.hookimpl(tryfirst=True, optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return how many tests run at a time: a core and 8 GiB for each, and one on a GPU."""
    if machine.find_device(dict(os.environ)).name == "gpu":
        return 1
    room = psutil.virtual_memory().total // (8 << 30)
    return max(1, min(len(os.sched_getaffinity(0)), room))


@pytest.fixture(autouse=True)
def worker_stays(request: pytest.FixtureRequest) -> None:
    """Keep one handle on the worker open: it imports vLLM once for all files, not once for each."""
    if request.node.get_closest_marker("vllm") and request.path.name not in OWN_WORKERS:
        from portkit.live.client import live_for

        live_for(None).device()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest files first. Skip what needs a GPU or a browser where there is none, and say so."""
    slow = {item.path for item in items if item.get_closest_marker("vllm")}
    books = {item.path for item in items if item.get_closest_marker("notebooks")}
    items.sort(key=lambda item: (item.path not in books, item.path not in slow))
    marks = {mark.name for item in items for mark in item.iter_markers()}
    reasons = {}
    if "gpu" in marks:
        device = machine.find_device(dict(os.environ))
        if device.name != "gpu":
            reasons["gpu"] = device.reason
    if "browser" in marks and not any(map(shutil.which, CHROMIUM)):
        reasons["browser"] = f"none of {', '.join(CHROMIUM)} on the PATH"
    for item in items:
        for name, reason in reasons.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))
