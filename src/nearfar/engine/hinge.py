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

from nearfar.engine import anchors as lookup
from nearfar.engine.anchors import Anchors, look_up_rows
from nearfar.engine.budget import Workspace
from nearfar.reduction import sum_dtype


@dataclass(eq=False)
class Tally:
    """How many terms a loss has in all, and how many of them cost something.

    Filled by an executor while it runs; the numbers stay on the device.
    """

    valid: Tensor | int = 0
    active: Tensor | int = 0

    def add(self, valid: Tensor | int, active: Tensor | int) -> None:
        self.valid, self.active = self.valid + valid, self.active + active


@dataclass(eq=False)
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


def hinges(
    d: Tensor,
    anchors: Anchors,
    margin: float,
    space: Workspace,
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
        space: where the forces go.
        smooth: softplus in place of the hinge.
        weight: (b, m) by which the triplets with each negative count; None: all by 1.
        gradient: whether the forces are wanted.
    """
    valid = anchors.count * anchors.n_negatives
    if not anchors.most:
        nothing = torch.zeros_like(d) if gradient else None
        return Hinges(
            d.new_zeros(len(d), dtype=sum_dtype(d)), valid, torch.zeros_like(valid), nothing
        )
    reach = anchors.table(d, -inf).add_(margin)
    with anchors.only_negatives(d):
        if smooth:
            loss, pull, force = _softly(reach, d, weight)
        else:
            pull, force = counted(reach, d, weight, space)
    if not smooth:
        loss = of_positives(reach, pull) + of_negatives(reach, d, force, space)
    active = valid if smooth else pull.nan_to_num(0).sum(1, dtype=sum_dtype(d)).long()
    if not gradient:
        return Hinges(loss, valid, active, None)
    force[anchors.row, anchors.column] = pull[anchors.row, anchors.slot].to(d.dtype)
    return Hinges(loss, valid, active, force)


def counted(
    reach: Tensor, far: Tensor, weight: Tensor | None, space: Workspace
) -> tuple[Tensor, Tensor]:
    """By how many negatives each positive is pulled, and by how many positives each is pushed.

    Args:
        reach: (b, p) how far each positive reaches, -inf where there is none.
        far: (b, m) distances to the negatives, inf to everyone else.
        weight: (b, m) by which each negative counts; None: all by 1.
        space: where the forces go.

    Returns:
        (b, p) pulls, float64; (b, m) forces on the negatives, their numbers below 0.
    """
    if reach.shape[1] > lookup.FEW:
        return _look_up(reach, far, weight)
    pull = torch.zeros_like(reach, dtype=sum_dtype(far))
    pushed = space.like(far)
    by_slot = reach.T.contiguous()  # which a tile seen from its columns is compared with faster
    with space.lent(far) as short:
        for slot in range(len(by_slot)):
            one = short if slot else pushed
            torch.gt(by_slot[slot, :, None], far, out=one)
            if weight is not None:
                one.mul_(weight)
            # A float32 counts up to 2^24, which weights may exceed.
            pull[:, slot] = one.sum(1, dtype=None if weight is None else sum_dtype(far))
            if slot:
                pushed.add_(one)
    return pull, pushed.neg_()


def _look_up(reach: Tensor, far: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """All positives at once; see `counted`."""
    rows, most = reach.shape
    ordered, order = reach.sort(1)
    place = look_up_rows(ordered, far).long()
    bucket = place + torch.arange(0, rows * (most + 1), most + 1, device=far.device)[:, None]
    by = None if weight is None else weight.flatten().to(sum_dtype(far))
    nearer = torch.bincount(bucket.flatten(), by, rows * (most + 1)).view(rows, most + 1)
    pull = nearer[:, :most].cumsum(1).to(sum_dtype(far))
    force = (place - most).to(far.dtype)
    return torch.empty_like(pull).scatter_(1, order, pull), (
        force if weight is None else force.mul_(weight)
    )


# A loss is a sum over positives and one over negatives. Both are taken from the farthest reach:
# from 0 they would lose the digits of a small loss.


def _farthest(reach: Tensor) -> Tensor:
    """(b, 1) how far the positives of each row reach; 0 where there is none."""
    top = reach.amax(1, keepdim=True)
    return top.masked_fill_(top == -inf, 0)


def of_positives(reach: Tensor, pull: Tensor) -> Tensor:
    """(b,) the part of the losses that comes from how far positives reach, and how they pull."""
    short = (reach - _farthest(reach)).masked_fill_(reach == -inf, 0)
    return (short.to(pull.dtype) * pull).sum(1)


def of_negatives(reach: Tensor, d: Tensor, force: Tensor, space: Workspace) -> Tensor:
    """(b,) the part that comes from how far the negatives are, and how they are pushed."""
    with space.lent(d) as short:
        return torch.sub(d, _farthest(reach), out=short).mul_(force).sum(1)


def _softly(reach: Tensor, far: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (b,), pulls (b, p) and forces (b, m) of the softplus, positive by positive."""
    loss = far.new_zeros(len(far), dtype=sum_dtype(far))
    pull, force = torch.zeros_like(reach, dtype=sum_dtype(far)), torch.zeros_like(far)
    for slot in range(reach.shape[1]):
        short = reach[:, slot, None] - far
        slope, cost = short.sigmoid(), logsigmoid(short.neg_()).neg_()
        force -= slope
        loss += cost.sum(1) if weight is None else torch.linalg.vecdot(cost, weight)
        pull[:, slot] = slope.sum(1) if weight is None else torch.linalg.vecdot(slope, weight)
    return loss, pull, force if weight is None else force.mul_(weight)
