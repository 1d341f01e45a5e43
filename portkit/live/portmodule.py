"""Import the port's own code, afresh, in the process of a job."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from portkit.errors import PortkitError
from portkit.port import Port


def import_port(port: Port) -> ModuleType:
    """Import the port's modeling module anew and return it; what its code raises passes through.

    Its package is found in the port's folder before anywhere else, so an installed copy of the
    plugin is never what is tested.
    """
    if not port.modeling.exists():
        raise PortkitError(
            "The port has no modeling file yet.",
            str(port.modeling.relative_to(port.root)),
            "Step 1 brings it: notebook 01_copy, or `portkit draft copy --apply`.",
        )
    package = port.package  # read from port.toml each time; there are thousands of modules
    for name in [n for n in sys.modules if n == package or n.startswith(package + ".")]:
        del sys.modules[name]
    root = str(port.root)
    if root in sys.path:
        sys.path.remove(root)
    sys.path.insert(0, root)
    importlib.invalidate_caches()
    return importlib.import_module(port.module)


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
