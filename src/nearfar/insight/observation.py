"""What a loss on aligned rows measures, and the forces on it."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from nearfar.engine.observe import Measured


@dataclass(frozen=True, eq=False)
class Observation:
    """What a loss on aligned rows measured, its forces and its losses.

    Attributes:
        measured: what it measured, by role.
        forces: for each of `measured`, the force on it: > 0 pulls together, < 0 pushes apart.
        per_row: (n,) the losses.
        active: (n,) bool, whether any force acts in the row.
    """

    measured: Mapping[str, Measured]
    forces: Mapping[str, Tensor]
    per_row: Tensor
    active: Tensor

    @classmethod
    def of(
        cls, per_row: Tensor, record: list[Measured], derivatives: tuple[Tensor, ...]
    ) -> "Observation":
        measured, forces = {}, {}
        for m, derivative in zip(record, derivatives, strict=True):
            values = m.values.detach().cpu()
            force = derivative.cpu() if m.closeness == "distance" else -derivative.cpu()
            if m.closeness == "distance":
                force = force.masked_fill(values == 0, 0)  # no direction, so no gradient either
            similar = None if m.similar is None else m.similar.cpu()
            measured[str(m.role)] = Measured(m.role, m.closeness, values, similar)
            forces[str(m.role)] = force + 0.0  # no -0
        strongest = torch.stack(
            [f.abs().reshape(len(f), f[:1].numel()).sum(1) for f in forces.values()]
        ).amax(0)
        # Softmax forces are never exactly 0; a millionth of the strongest is negligible.
        active = strongest > 1e-6 * strongest.max() if len(strongest) else strongest > 0
        return cls(measured, forces, per_row.detach().cpu(), active)

    def similar_and_not(self) -> tuple[Tensor, Tensor]:
        """How far apart the similar and the dissimilar rows are (similarities negated)."""
        if "pair" in self.measured:
            pair = self.measured["pair"]
            assert pair.similar is not None
            similar = pair.similar if pair.similar.dtype is torch.bool else pair.similar >= 0.5
            return pair.values[similar], pair.values[~similar]
        sign = 1 if self.measured["positive"].closeness == "distance" else -1
        near, far = (sign * self.measured[role].values for role in ("positive", "negative"))
        return near, far[far < inf]
