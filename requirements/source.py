"""Fetch vLLM's source distribution, which step 5 patches, and verify it.

`pip download` cannot do it: pip builds the metadata of a source distribution, and vLLM's build
wants CMake and torch for that.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import ssl
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from machine import SetupError, output_of

PYPI = "https://pypi.org/simple"
ACCEPT = "application/vnd.pypi.simple.v1+json, text/html;q=0.5"


@dataclass(frozen=True)
class Pin:
    """One line `name==version --hash=sha256:…`."""

    name: str
    version: str
    sha256: str

    @property
    def file(self) -> str:
        return f"{self.name}-{self.version}.tar.gz"


def read_pin(path: Path) -> Pin:
    """Return the pin that a file holds."""
    found = re.search(r"^(\S+)==(\S+) --hash=sha256:([0-9a-f]{64})$", path.read_text(), re.M)
    if not found:
        raise SetupError("no pin `name==version --hash=sha256:…`", str(path), "git checkout it")
    return Pin(*found.groups())


def index_url(python: Path, env: dict) -> str:
    """Return the package index that the user's pip is set to, else PyPI."""
    configured = output_of([str(python), "-m", "pip", "config", "get", "global.index-url"], env)
    return env.get("PIP_INDEX_URL") or (configured or "").strip() or PYPI


def get(url: str, accept: str = "*/*") -> bytes:
    """Return what a URL serves. Proxies come from the environment, as with pip."""
    cafile = os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE")
    request = urllib.request.Request(url, headers={"Accept": accept, "User-Agent": "portkit"})
    context = ssl.create_default_context(cafile=cafile) if url.startswith("https:") else None
    with urllib.request.urlopen(request, timeout=60, context=context) as answer:
        return answer.read()


def url_of(pin: Pin, index: str) -> str:
    """Return the file's URL from the index (the simple API, in JSON or in HTML)."""
    page_url = f"{index.rstrip('/')}/{pin.name}/"
    page = get(page_url, ACCEPT).decode("utf-8", "replace")
    if page.lstrip().startswith("{"):
        urls = [file["url"] for file in json.loads(page)["files"]]
    else:
        urls = re.findall(r"""href=["']([^"']+)["']""", page)
    for url in urls:
        if url.split("#")[0].rsplit("/", 1)[-1] == pin.file:
            return urllib.parse.urljoin(page_url, url.split("#")[0])
    raise SetupError(
        f"the index has no {pin.file}", page_url, "set another index: export PIP_INDEX_URL=…"
    )


def fetch(pin: Pin, folder: Path, index: str, say) -> Path:
    """Put the verified source distribution into the folder; nothing to do if it is there."""
    target = folder / pin.file
    if target.is_file() and hashlib.sha256(target.read_bytes()).hexdigest() == pin.sha256:
        return target
    say(f"fetching vLLM's source, {pin.file} (for step 5)")
    by_hand = f"try again; or put {pin.file} there yourself"
    try:
        data = get(url_of(pin, index))
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise SetupError(
            f"cannot fetch {pin.file} from {index}: {reason}", str(target), by_hand
        ) from error
    found = hashlib.sha256(data).hexdigest()
    if found != pin.sha256:
        raise SetupError(
            f"{pin.file} is not the expected file: sha256 {found[:12]}…, not {pin.sha256[:12]}…",
            index,
            by_hand,
        )
    folder.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".part")
    partial.write_bytes(data)
    partial.replace(target)
    return target
