"""How much each item is like the items of its own identity, and of the others."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nearfar.distance import unit

TEMPERATURE = 0.05  # of cosines: the nearest few items of an identity decide
_AT_A_TIME = 2**24  # similarities held at the same time


@dataclass(frozen=True, eq=False)
class Judged:
    """What the likeness of items says about their labels.

    Attributes:
        margin: (n,) log of how many times the likest other identity is as alike as an item's own;
            -inf for items that are alone in their identity, which cannot be judged.
        suggested: (n,) int64, the likest other identity.
        other: (n,) int64, the nearest item of that identity.
        own_distance: (n,) cosine distance to the nearest item of its own identity; inf if alone.
    """

    margin: Tensor
    suggested: Tensor
    other: Tensor
    own_distance: Tensor

    def agreement(self, among: Tensor | None = None) -> float:
        """The share of items that are likest their own identity.

        Args:
            among: (n,) bool, which items count; None: all.
        """
        counts = self.margin.isfinite() if among is None else self.margin.isfinite() & among
        return float((self.margin[counts] < 0).double().mean().nan_to_num())


def judge(x: Tensor, identity: Tensor, rows: Tensor | None = None) -> Judged:
    r"""Judge the label of each item by all others.

    An item is as alike an identity of $n$ other items as
    $$\frac{1}{\sqrt n} \sum_j \exp(\cos(x, x_j) / 0.05).$$
    A sum would favour large identities, a mean would forget that several alike items are stronger
    evidence than one.

    Args:
        x: (n, d) features, of all items.
        identity: (n,) int64.
        rows: (m,) which items to judge; None: all.
    """
    rows = torch.arange(len(x)) if rows is None else rows
    z, n_identities = unit(x.float()), int(identity.max()) + 1
    size = identity.bincount(minlength=n_identities)
    parts = [
        _judged(z, identity, size, some)
        for some in torch.split(rows, max(1, _AT_A_TIME // (len(x) + n_identities)))
    ]
    return Judged(*(torch.cat(held) for held in zip(*parts, strict=True)))


def _judged(
    z: Tensor, identity: Tensor, size: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of `Judged` for some rows; tiles have a column for each of these."""
    here, own = torch.arange(len(rows)), identity[rows]
    cosine = z @ z[rows].T
    cosine[rows, here] = -torch.inf
    alike = torch.zeros(len(size), len(rows)).index_add_(
        0, identity, ((cosine - 1) / TEMPERATURE).exp()
    )
    others = size[:, None].repeat(1, len(rows))
    others[own, here] -= 1
    alike /= others.clamp(min=1).sqrt()
    of_own = alike[own, here].log()
    alike[own, here] = -1
    most, suggested = alike.max(0)
    margin = (most.log() - of_own).masked_fill(others[own, here] == 0, -torch.inf)
    is_own = identity[:, None] == own
    nearest_own = cosine.masked_fill(~is_own, -torch.inf).amax(0)
    other = cosine.masked_fill_(identity[:, None] != suggested, -torch.inf).argmax(0)
    return margin.nan_to_num(nan=-torch.inf), suggested, other, 1 - nearest_own
