"""Run one job and print its result: python -m portkit.live.run JOB PORT key=value ...

For who writes a job. PORT is a port's folder or name, or "-" for none; values are JSON, or text
if they are not. `timeout=` and `max_memory_mib=` go to Live.run.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from portkit.errors import PortkitError
from portkit.live.client import live_for


def main(arguments: list[str]) -> int:
    if len(arguments) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    job, name, *pairs = arguments
    args = {}
    for pair in pairs:
        key, _, text = pair.partition("=")
        try:
            args[key] = json.loads(text)
        except json.JSONDecodeError:
            args[key] = text
    try:
        from portkit.port import open_port

        live = live_for(None if name == "-" else open_port(name))
    except PortkitError as error:
        print(error, file=sys.stderr)
        return 2
    result = live.run(job, progress=lambda text: print(text, file=sys.stderr), **args)
    print(json.dumps(asdict(result), indent=2))
    return 0 if result.ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
