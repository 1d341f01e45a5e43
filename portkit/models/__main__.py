"""`python -m portkit.models NAME --out DIR`: make a tutorial checkpoint again, from its recipe."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from portkit.errors import PortkitError
from portkit.models import bundled


def main() -> int:
    """Parse the command line, train, print progress; 1 if the request cannot be met."""
    parser = argparse.ArgumentParser(prog="python -m portkit.models", description=__doc__)
    parser.add_argument("name", help=f"one of: {', '.join(bundled())}")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--steps", type=int, help="train shorter than the recipe says")
    arguments = parser.parse_args()

    import torch

    from portkit.models.recipe import Progress, load_recipe, make

    # Two threads whatever the machine has: the number of threads changes how sums are rounded.
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)

    def show(line: Progress) -> None:
        print(
            f"step {line.step:5d}/{line.steps}  loss {line.loss:6.3f}  {line.seconds:6.1f} s",
            flush=True,
        )

    try:
        make(load_recipe(arguments.name), arguments.out, steps=arguments.steps, progress=show)
    except PortkitError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"written to {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
