"""Import the port's own code, afresh, and say where in it something went wrong."""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path
from types import ModuleType

from portkit.errors import PortkitError
from portkit.port import Port


def import_port(port: Port) -> ModuleType:
    """Import the port's modeling module anew and return it; PortkitError with the line if it fails.

    Its package is found in the port's folder before anywhere else, so an older installed copy of
    the plugin is never what is tested.
    """
    if not port.modeling.exists():
        raise PortkitError(
            "The port has no modeling file yet.", str(port.modeling.relative_to(port.root)),
            "Do step 1 first: `portkit draft copy`.",
        )
    for name in [n for n in sys.modules if n == port.package or n.startswith(port.package + ".")]:
        del sys.modules[name]
    root = str(port.root)
    if root in sys.path:
        sys.path.remove(root)
    sys.path.insert(0, root)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(port.module)
    except PortkitError:
        raise
    except SyntaxError as error:
        raise PortkitError(
            f"The modeling file does not parse: {error.msg}.",
            f"{Path(error.filename or port.modeling).name}:{error.lineno}", "Mend that line.",
        ) from error
    except Exception as error:
        raise PortkitError(
            f"Importing the port fails: {type(error).__name__}: {error}",
            frame_in_port(error, port) or port.modeling.name,
            "Mend the line; a name that does not exist there may have moved in this version.",
        ) from error


def port_class(port: Port) -> type:
    """Import the port and return its class for the architecture."""
    module = import_port(port)
    cls = getattr(module, port.architecture, None)
    if not isinstance(cls, type):
        classes = [n for n, v in vars(module).items() if isinstance(v, type) and v.__module__ == module.__name__]
        raise PortkitError(
            f"The port defines no class {port.architecture}.", port.modeling.name,
            f"It defines {', '.join(classes) or 'none'}; config.json asks for {port.architecture}.",
        )
    return cls


def frame_in_port(error: BaseException, port: Port) -> str:
    """Return the innermost frame of the port's own code, "file.py:12, in forward", or ""."""
    seen: BaseException | None = error
    while seen is not None:
        for frame in reversed(traceback.extract_tb(seen.__traceback__)):
            if Path(frame.filename).is_relative_to(port.root / port.package):
                return f"{Path(frame.filename).name}:{frame.lineno}, in {frame.name}"
        seen = seen.__cause__ or seen.__context__
    return ""
