"""Which term of a sum is another one than in the original: residuals, branches, shared experts."""

from __future__ import annotations

import re

import torch

from portkit.live.comparing import Evidence

MOST = 40
"""Terms that are tried, those of the layer first."""


class WithSums(Evidence):
    """Evidence that can tell what was added to a tensor, or was not."""

    def _terms(self) -> None:
        """Say so if our tensor differs from the original's by tensors that the original has."""
        target = self.theirs.values[self.at.path, self.at.role]
        rows = min(len(self._ours()), len(target))
        difference = self._ours()[:rows] - target[:rows]
        terms = self._candidates(target.shape[1], rows)
        for name, term in terms:
            if self._near(difference, term):
                self.found.append(f"{name} is added in the port, and not in the original.")
                return
            if self._near(-difference, term):
                self.found.append(
                    f"{name} is not added in the port: a residual or a branch is left out."
                )
                return
        for name, term in terms:
            for other, wanted in terms:
                if name != other and self._near(difference, term - wanted):
                    self.found.append(
                        f"The port adds {name} where the original adds {other}: the residual is "
                        "taken in another place."
                    )
                    return

    def _candidates(self, width: int, rows: int) -> list[tuple[str, torch.Tensor]]:
        """Return what the original computed in this layer, or outside of all, with its name."""
        layer = re.match(r".*?\.\d+(?=\.|$)", self.at.path)
        inside = f"{layer[0]}." if layer else ""
        found: dict[str, torch.Tensor] = {}
        for role, word in (("out", "what {} returns"), ("in", "what goes into {}")):
            for (path, kind), value in self.theirs.values.items():
                near = path.startswith(inside) or not re.search(r"\.\d+(?=\.|$)", path)
                if kind == role and near and value.shape[1] == width and len(value) >= rows:
                    found[word.format(path)] = value[:rows]
        return list(found.items())[:MOST]
