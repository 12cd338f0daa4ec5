"""Every triplet of a block of rows, without listing one.

An anchor's triplets are all of its positives with all of its negatives. A positive at distance d
reaches d + margin far: every negative nearer than that costs the difference. With few positives
one sweep over the block a positive is fastest; with many, each negative is looked up once in the
sorted reaches, and how many it falls short of gives sums, forces and counts:
O(block * log positives), where the triplets number block * positives.
"""

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nearfar.engine import places
from nearfar.engine.anchors import Anchors
from nearfar.engine.places import exact, look_up_rows
from nearfar.engine.stream import BlockRule
from nearfar.relation import Block, Relation


@dataclass(eq=False)
class Tally:
    """How many terms a loss has in all, and how many of them cost something.

    Filled by an executor while it runs; the numbers stay on the device.
    """

    valid: Tensor | int = 0
    active: Tensor | int = 0

    def add(self, valid: Tensor | int, active: Tensor | int) -> None:
        self.valid, self.active = self.valid + valid, self.active + active


@dataclass(frozen=True, eq=False)
class Hinges:
    """All triplets of a block of anchors.

    Attributes:
        loss: (b,) the sums of their losses, float64.
        valid: (b,) int64, how many there are.
        active: (b,) int64, by how many (by what weight) something costs.
        force: (b, m) derivative of each row's loss by its distances; None unless asked for.
    """

    loss: Tensor
    valid: Tensor
    active: Tensor
    force: Tensor | None


def every_triplet(
    relation: Relation, margin: float, smooth: bool, mean_of_active: bool, tally: Tally
) -> BlockRule:
    """All triplets of each anchor, as a rule on a block."""

    def rule(
        d: Tensor, who: Block, rows: slice, weight: Tensor | None, gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        sums = hinges(d, Anchors.of(who), margin, smooth=smooth, gradient=gradient)
        tally.add(sums.valid.sum(), sums.active.sum())
        force = sums.force
        if force is not None and weight is not None:
            force = force.mul_(weight[:, None])
        loss = torch.where(sums.valid > 0, sums.loss, 0)
        return loss, sums.active if mean_of_active else sums.valid, force

    return rule


def hinges(
    d: Tensor,
    anchors: Anchors,
    margin: float,
    *,
    smooth: bool = False,
    weight: Tensor | None = None,
    gradient: bool = True,
) -> Hinges:
    """Sums over all triplets of each row of max(0, d_ip - d_in + margin), or its softplus.

    Args:
        d: (b, m) distances.
        anchors: their positives.
        margin: how much farther a negative must be than a positive.
        smooth: softplus in place of the hinge.
        weight: (b, m) by which the triplets with each negative count; None: all by 1.
        gradient: whether the forces are wanted.
    """
    valid = anchors.count * anchors.n_negatives
    if not anchors.most:
        nothing = torch.zeros_like(d) if gradient else None
        return Hinges(d.new_zeros(len(d), dtype=exact(d)), valid, torch.zeros_like(valid), nothing)
    reach = anchors.table(d, -inf).add_(margin)
    far = anchors.hide(d.clone())
    if smooth or anchors.most <= places.FEW:
        loss, pull, force = _sweep(reach, far, smooth, weight)
    else:
        loss, pull, force = _look_up(reach, far, d, weight)
    active = valid if smooth else pull.nan_to_num(0).sum(1, dtype=exact(d)).long()
    if not gradient:
        return Hinges(loss, valid, active, None)
    force[anchors.row, anchors.column] = pull[anchors.row, anchors.slot].to(d.dtype)
    return Hinges(loss, valid, active, force)


# Of each row: (b,) sums, (b, p) pulls on the positives, (b, m) forces on the negatives.
_Sums = tuple[Tensor, Tensor, Tensor]


def _sweep(reach: Tensor, far: Tensor, smooth: bool, weight: Tensor | None) -> _Sums:
    """Positive by positive."""
    loss = far.new_zeros(len(far), dtype=exact(far))
    pull, force = torch.zeros_like(reach, dtype=exact(far)), torch.zeros_like(far)
    short = torch.empty_like(far)
    for slot in range(reach.shape[1]):
        torch.sub(reach[:, slot, None], far, out=short)
        if smooth:
            slope, cost = short.sigmoid(), logsigmoid(short.neg_()).neg_()
        else:
            cost = short.relu_()
        loss += cost.sum(1) if weight is None else torch.linalg.vecdot(cost, weight)
        slope = slope if smooth else cost.sign_()
        force -= slope
        # A float32 counts up to 2^24, which weights may exceed.
        pull[:, slot] = (
            slope.sum(1) if weight is None else (slope * weight).sum(1, dtype=exact(far))
        )
    return loss, pull, force if weight is None else force.mul_(weight)


def _look_up(reach: Tensor, far: Tensor, d: Tensor, weight: Tensor | None) -> _Sums:
    """All positives at once."""
    rows, most = reach.shape
    ordered, order = reach.sort(1)
    place = look_up_rows(ordered, far).long()
    bucket = place + torch.arange(0, rows * (most + 1), most + 1, device=d.device)[:, None]
    by = None if weight is None else weight.flatten().to(exact(d))
    nearer = torch.bincount(bucket.flatten(), by, rows * (most + 1)).view(rows, most + 1)
    pull = nearer[:, :most].cumsum(1).to(exact(d))
    force = (place - most).to(d.dtype)
    force = force if weight is None else force.mul_(weight)
    # Both sums are from the farthest reach: from 0 they would lose the digits of a small loss.
    top = ordered[:, -1:].masked_fill(ordered[:, -1:] == -inf, 0)
    short = (ordered - top).masked_fill_(ordered == -inf, 0).to(exact(d))
    loss = (short * pull).sum(1) + ((d - top) * force).sum(1, dtype=exact(d))
    return loss, torch.empty_like(pull).scatter_(1, order, pull), force
