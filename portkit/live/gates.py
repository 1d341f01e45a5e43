"""What becomes of a projection between its output and the next module: a gate, a cut in parts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from portkit.live.comparing import NEAR, Evidence

GATES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu(gate)": nn.functional.silu,
    "tanh(gate)": torch.tanh,
    "gelu(gate)": nn.functional.gelu,
    "the gate as it is": lambda x: x,
    "1 - sigmoid(gate)": lambda x: 1 - torch.sigmoid(x),
    "nothing": torch.ones_like,
}
"""Instead of sigmoid(gate)."""


class WithGates(Evidence):
    """Evidence that can tell how a tensor is gated, and how a projection is cut."""

    def _gate(self, parent: str) -> None:
        """Say what the attention's result is multiplied by in the place of sigmoid(gate)."""
        plain, ours = self.theirs.values.get((parent, "attn")), self._ours()
        target = self.theirs.values[self.at.path, self.at.role]
        if plain is None or not plain.shape == ours.shape == target.shape:
            return
        told = plain.abs() > 1e-3 * plain.abs().max()
        gate, found = (target / plain)[told], (ours / plain)[told]
        if float(gate.min()) <= 0 or float(gate.max()) >= 1 or self._near(target, plain):
            return
        values = torch.logit(gate.double())
        for name, function in GATES.items():
            wanted = function(values).float()
            if torch.allclose(found, wanted, rtol=1e-2, atol=1e-2):
                self.found.append(
                    f"The attention's result is multiplied by {name} where the original multiplies "
                    "by sigmoid(gate) (the numbers agree)."
                )
                return

    def _other_columns(self, parent: str) -> None:
        """Say so if both sides hold values of one projection, but other ones.

        Told at position 0, where attention returns a token's own values, if they differ there.
        """
        ours, target = self._ours()[:1], self.theirs.values[self.at.path, self.at.role][:1]
        if self._near(ours, target):
            return
        for (path, role), whole in self.theirs.values.items():
            if role != "out" or path.rpartition(".")[0] != parent or path == self.at.path:
                continue
            if whole.shape[1] <= ours.shape[1]:
                continue
            if all(_within(part, whole[:1]) for part in (ours, target)):
                self.found.append(
                    f"It holds other columns of {path} than in the original: each head's part is "
                    "cut in another way (all heads at once, or head by head; another order)."
                )
                return


def _within(part: torch.Tensor, whole: torch.Tensor) -> bool:
    nearest = (part.reshape(-1, 1) - whole.reshape(1, -1)).abs().amin(dim=1)
    return bool(nearest.max() <= NEAR * float(whole.abs().max()))
