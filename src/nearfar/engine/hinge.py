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

from nearfar.engine.stream import BlockRule
from nearfar.relation import Block, Relation

# Measured: up to so many positives a row the sweeps are faster than the look-up.
_FEW = 32


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
        anchors = Anchors.of(d, who, relation, rows)
        sums = hinges(d, anchors, margin, smooth=smooth, gradient=gradient)
        tally.add(sums.valid.sum(), sums.active.sum())
        force = sums.force
        if force is not None and weight is not None:
            force = force.mul_(weight[:, None])
        loss = torch.where(sums.valid > 0, sums.loss, 0)
        return loss, sums.active if mean_of_active else sums.valid, force

    return rule


def hinges(
    d: Tensor,
    anchors: "Anchors",
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
    if smooth or anchors.most <= _FEW:
        loss, pull, push = _sweep(reach, far, smooth, weight)
    else:
        loss, pull, push = _look_up(reach, far, d, weight)
    active = valid if smooth else pull.nan_to_num(0).sum(1, dtype=exact(d)).long()
    if not gradient:
        return Hinges(loss, valid, active, None)
    force = push.neg_()
    force[anchors.row, anchors.column] = pull[anchors.row, anchors.slot].to(d.dtype)
    return Hinges(loss, valid, active, force)


@dataclass(frozen=True, eq=False)
class Anchors:
    """The rows of a block, and who is who for them, listed: positives are few.

    Attributes:
        row, column: (k,) where positives are, row by row.
        slot: (k,) the how-manieth of its row each is.
        count: (b,) how many a row has.
        most: how many the row with the most has.
        n_negatives: (b,) how many negatives a row has.
        itself: (s,), (s,) rows that meet themselves, and in which column.
    """

    row: Tensor
    column: Tensor
    slot: Tensor
    count: Tensor
    most: int
    n_negatives: Tensor
    itself: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, d: Tensor, who: Block, relation: Relation, rows: slice) -> "Anchors":
        """The anchors of a block of distances from some rows to all columns."""
        nobody = torch.zeros(0, dtype=torch.int64, device=d.device)
        own = nobody.new_full((len(d),), -1) if relation.own is None else relation.own[rows]
        (met,) = (own >= 0).nonzero(as_tuple=True)
        row = column = nobody
        if who.similar is not None:
            row, column = who.similar.nonzero(as_tuple=True)
        count = torch.bincount(row, minlength=len(d))
        slot = torch.arange(len(row), device=d.device) - (count.cumsum(0) - count)[row]
        most = int(count.max()) if len(d) else 0
        return cls(
            row, column, slot, count, most, d.shape[1] - count - (own >= 0).long(), (met, own[met])
        )

    def hide(self, d: Tensor) -> Tensor:
        """`d` with everyone who is no negative as far away as can be; overwrites it."""
        d[self.row, self.column] = inf
        d[self.itself] = inf
        return d

    def table(self, d: Tensor, fill: float) -> Tensor:
        """(b, most) the distances to them, filled up."""
        table = d.new_full((len(d), self.most), fill)
        table[self.row, self.slot] = d[self.row, self.column]
        return table

    def columns(self) -> Tensor:
        """(b, most) which columns they are; 0 where there are fewer."""
        table = self.column.new_zeros(len(self.count), self.most)
        table[self.row, self.slot] = self.column
        return table

    def extreme(self, d: Tensor, *, farthest: bool) -> Tensor:
        """(b,) the column of the farthest or the nearest; 0 where there is none."""
        if not self.most:
            return torch.zeros_like(self.count)
        table = self.table(d, -inf if farthest else inf)
        slot = table.argmax(1, keepdim=True) if farthest else table.argmin(1, keepdim=True)
        return self.columns().gather(1, slot)[:, 0]


def _sweep(
    reach: Tensor, far: Tensor, smooth: bool, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Positive by positive: (b,) sums, (b, p) pulls, (b, m) pushes."""
    loss = far.new_zeros(len(far), dtype=exact(far))
    pull, push = torch.zeros_like(reach, dtype=exact(far)), torch.zeros_like(far)
    short = torch.empty_like(far)
    for slot in range(reach.shape[1]):
        torch.sub(reach[:, slot, None], far, out=short)
        if smooth:
            slope, cost = short.sigmoid(), logsigmoid(short.neg_()).neg_()
        else:
            cost = short.relu_()
        loss += cost.sum(1) if weight is None else torch.linalg.vecdot(cost, weight)
        slope = slope if smooth else cost.sign_()
        push += slope
        # A float32 counts up to 2^24, which weights may exceed.
        pull[:, slot] = (
            slope.sum(1) if weight is None else (slope * weight).sum(1, dtype=exact(far))
        )
    return loss, pull, push if weight is None else push.mul_(weight)


def _look_up(
    reach: Tensor, far: Tensor, d: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """All positives at once: (b,) sums, (b, p) pulls, (b, m) pushes."""
    rows, most = reach.shape
    ordered, order = reach.sort(1)
    place = beaten(ordered, far).long()
    bucket = place + torch.arange(0, rows * (most + 1), most + 1, device=d.device)[:, None]
    by = None if weight is None else weight.flatten().to(exact(d))
    nearer = torch.bincount(bucket.flatten(), by, rows * (most + 1)).view(rows, most + 1)
    pull = nearer[:, :most].cumsum(1).to(exact(d))
    push = (most - place).to(d.dtype)
    push = push if weight is None else push.mul_(weight)
    # Both sums are from the farthest reach: from 0 they would lose the digits of a small loss.
    top = ordered[:, -1:].masked_fill(ordered[:, -1:] == -inf, 0)
    short = (ordered - top).masked_fill_(ordered == -inf, 0).to(exact(d))
    loss = (short * pull).sum(1) + ((top - d) * push).sum(1, dtype=exact(d))
    return loss, torch.empty_like(pull).scatter_(1, order, pull), push


def beaten(ordered: Tensor, d: Tensor, *, strict: bool = False) -> Tensor:
    """(b, m) how many of its row's entries each value is not below; strict: is above.

    Args:
        ordered: (b, p) entries, ascending.
        d: (b, m) values; a NaN beats nobody.
        strict: equal entries are not beaten.
    """
    rows, most = ordered.shape
    if most > _FEW:
        start = torch.arange(0, rows * most, most, device=d.device)[:, None]
        return look_up(ordered.flatten(), d, start, start + most, most, strict=strict) - start
    count = torch.zeros(d.shape, dtype=torch.uint8, device=d.device)
    for slot in range(most):
        entry = ordered[:, slot, None]
        count += (d > entry if strict else d >= entry).view(torch.uint8)
    return count


def look_up(
    table: Tensor,
    values: Tensor,
    start: Tensor,
    stop: Tensor,
    longest: int,
    *,
    strict: bool = False,
) -> Tensor:
    """Where values belong in sorted segments of a table: after the entries that are no larger.

    As `torch.searchsorted`, several times as fast on a CPU: no step depends on a comparison.

    Args:
        table: (t,) entries, ascending within each segment.
        values: (r, c) what to look up; a NaN belongs at the start.
        start: int64 that broadcasts to (r, c), the first entry of the segment of each value.
        stop: likewise, the one past its last.
        longest: at least the length of the longest segment.
        strict: after the entries that are smaller only.

    Returns:
        (r, c) places from `start` to `stop`, int32 where they fit.
    """
    index = torch.int32 if len(table) + 2 * longest < 2**31 else torch.int64
    step = 1 << max(longest, 1).bit_length() >> 1
    padded = torch.cat([table, table.new_full((2 * step,), inf)])
    place = start.to(index).expand(values.shape).contiguous()
    last = stop.to(index)
    while step:
        probe = place + (step - 1)
        entry = padded.index_select(0, probe.flatten()).view(values.shape)
        on = entry < values if strict else entry <= values
        on &= probe < last
        place.add_(on, alpha=step)
        step //= 2
    return place


def exact(d: Tensor) -> torch.dtype:
    """What sums are kept in: float64 where the device has it."""
    return torch.float32 if d.device.type == "mps" else torch.float64
