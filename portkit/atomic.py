"""Writing a file so that a kill, a full disk or a read-only folder leaves the old text or the new.

Does not lock: whoever may race with another process (Port does) holds a lock around it.
"""

from __future__ import annotations

import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil

from portkit.errors import PortkitError

SUFFIX = ".portkit-tmp"
"""Ends every temporary file; ports tell git to ignore it."""
NOT_OURS = {".git", "checkpoint", "__pycache__"}
"""Folders of a port in which portkit writes no file this way."""


def cannot_write(path: Path, error: OSError) -> PortkitError:
    """Say in words why a write failed: full disk, read-only folder, quota, missing rights."""
    return PortkitError(
        f"Could not write {path.name}: {error.strerror or error}.",
        str(path),
        "The old text is untouched. Free some disk space or fix the permissions, then try again.",
    )


def write_atomically(path: Path, data: str | bytes) -> None:
    """Replace `path` by `data` so that a crash leaves the old or the new text, never a part.

    Text is written as UTF-8 with its line ends unchanged; an existing file keeps its mode.
    Raises PortkitError if the system refuses (the old text is then untouched).
    """
    payload = data.encode() if isinstance(data, str) else data
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The process id in the name tells a later portkit whether its writer still lives.
        handle, temporary = tempfile.mkstemp(
            prefix=f".{path.name}.{os.getpid()}.", suffix=SUFFIX, dir=path.parent
        )
        with os.fdopen(handle, "wb") as stream:
            stream.write(payload)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, path.stat().st_mode & 0o777 if path.exists() else 0o644)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename survives a power cut where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_leftovers(root: Path) -> None:
    """Delete temporary files under `root` whose writer was killed."""
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in NOT_OURS]
        for name in files:
            match = re.search(r"\.(\d+)\.[^.]*" + re.escape(SUFFIX) + "$", name)
            if match and not psutil.pid_exists(int(match[1])):
                with suppress(OSError):
                    (Path(folder) / name).unlink()
