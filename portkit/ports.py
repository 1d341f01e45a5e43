"""Which port is meant when nobody says: PORTKIT_PORT, this folder, or the only one there is."""

from __future__ import annotations

import os
from pathlib import Path

from portkit.errors import PortkitError
from portkit.port import Port, open_port, ports_dir


def known_ports() -> tuple[Path, ...]:
    """Return the folders under the ports folder that are ports, by name."""
    folder = ports_dir()
    if not folder.is_dir():
        return ()
    return tuple(sorted(path.parent for path in folder.glob("*/port.toml")))


def find_port(given: str | Path | None = None) -> Port:
    """Open the port that is meant; PortkitError if there is none, or more than one."""
    if given:
        return open_port(given)
    if named := os.environ.get("PORTKIT_PORT"):
        return open_port(named)
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "port.toml").is_file():
            return open_port(folder)
    found = known_ports()
    if len(found) == 1:
        return open_port(found[0])
    if not found:
        raise PortkitError(
            "There is no port yet.",
            str(ports_dir()),
            "Make one: open notebooks/00_choose.ipynb, or run "
            "`portkit new helium --model HeliumForCausalLM`.",
        )
    names = ", ".join(path.name for path in found)
    raise PortkitError(
        f"There are {len(found)} ports: {names}. Which one is meant?",
        str(ports_dir()),
        f"Say so: --port {found[0].name}, or set PORTKIT_PORT={found[0].name} before starting.",
    )
