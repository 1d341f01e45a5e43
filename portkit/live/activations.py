"""Which activation a feed-forward applied, and to which of its branches, beside the original's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from portkit.live.comparing import Evidence

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu in its tanh form": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": torch.relu,
    "relu squared": lambda x: torch.relu(x) ** 2,
    "no function": lambda x: x,
}


class WithActivations(Evidence):
    """Evidence that can tell activations apart."""

    def _activation(self, parent: str, *, product: bool) -> None:
        """Try the functions and the order of an activation on what its neighbours returned."""
        branches = [
            (path, self._get(path, "out"))
            for path, role in self.theirs.values
            if role == "out"
            and path.rpartition(".")[0] == parent
            and path != self.at.path
            and getattr(self._original(path), "weight", None) is not None
        ]
        ours = self._ours()
        alone = [(p, t) for p, t in branches if t is not None and len(t) == len(ours)]
        branches = [(p, t) for p, t in alone if t.shape == ours.shape]
        if (
            product
            and not branches
            and len(alone) == 1
            and alone[0][1].shape[1] == 2 * ours.shape[1]
        ):
            (path, both), halves = alone[0], ("first", "second")
            name = path.rpartition(".")[2]  # gate and up in one tensor of the checkpoint
            branches = [
                (f"the {half} half of {name}", part)
                for half, part in zip(halves, both.chunk(2, dim=1), strict=True)
            ]
        if not branches or (product and len(branches) > 2):
            return
        # A feed-forward without a gate has one branch, and nothing to multiply by.
        product = product and len(branches) == 2
        target = self.theirs.values[self.at.path, self.at.role]

        def tried(name: str, which: int) -> torch.Tensor:
            result = ACTIVATIONS[name](branches[which][1])
            return result * branches[1 - which][1] if product else result

        ways = [(n, w) for w in range(len(branches)) for n in ACTIVATIONS]
        right = self._nearest({way: tried(*way) for way in ways}, target)
        used = self._nearest({way: tried(*way) for way in ways}, self._ours())
        if right is None or used is None or used == right:
            return
        if used[1] != right[1]:
            self.found.append(
                f"The activation is applied to {branches[used[1]][0].rpartition('.')[2]}, in "
                f"the original to "
                f"{branches[right[1]][0].rpartition('.')[2]}: the two are swapped."
            )
        if used[0] != right[0]:
            self.found.append(
                f"The activation is {used[0]}, the original's is {right[0]} (config.hidden_act)."
            )
