"""Import the port's own code, afresh, in the process of a job."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType

from portkit.errors import PortkitError
from portkit.port import Port

_imported: dict[str, tuple[int, bytes]] = {}
"""Port folder -> (process, code) of what that process imported last."""


def import_port(port: Port) -> ModuleType:
    """Import the port's modeling module anew and return it; what its code raises passes through.

    Anew for each job: once in a process, unless the code changed, because an operator or a layer
    that it registers has a name that torch and vLLM take once. Its package is found in the port's
    folder before anywhere else, so an installed copy of the plugin is never what is tested.
    """
    if not port.modeling.exists():
        raise PortkitError(
            "The port has no modeling file yet.",
            str(port.modeling.relative_to(port.root)),
            "Step 1 brings it: notebook 01_copy, or `portkit draft copy --apply`.",
        )
    package = port.package  # read from port.toml each time; there are thousands of modules
    state = os.getpid(), port.modeling.read_bytes()
    if _imported.get(str(port.root)) == state and port.module in sys.modules:
        return sys.modules[port.module]
    for name in [n for n in sys.modules if n == package or n.startswith(package + ".")]:
        del sys.modules[name]
    root = str(port.root)
    if root in sys.path:
        sys.path.remove(root)
    sys.path.insert(0, root)
    importlib.invalidate_caches()
    module = importlib.import_module(port.module)
    _imported[str(port.root)] = state
    return module


def port_class(port: Port) -> type:
    """Import the port and return its class for the architecture; PortkitError if it has none."""
    module = import_port(port)
    cls = getattr(module, port.architecture, None)
    if not isinstance(cls, type):
        own = [
            name
            for name, value in vars(module).items()
            if isinstance(value, type) and value.__module__ == module.__name__
        ]
        raise PortkitError(
            f"The port defines no class {port.architecture}.",
            port.modeling.name,
            f"config.json asks for {port.architecture}; the file defines "
            f"{', '.join(own) or 'none'}.",
        )
    return cls
