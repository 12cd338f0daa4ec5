"""Every triplet of a batch, without listing one.

An anchor's triplets combine each of its positives with each of its negatives. A positive at
distance d sets a threshold at d + margin: every negative nearer than that adds the difference. With
few positives, it is fastest to compare the block with each of them. With many, each negative is
looked up once in the sorted thresholds: the number above it gives sums, forces and counts. That
takes O(block * log positives) time for block * positives triplets.

In a batch compared with itself, each pair of rows is measured once. If rows are sorted by class,
all positives lie in square tiles on the diagonal, which give each anchor's thresholds; the other
tiles hold only negatives, each of them for both its row and its column. The products then take
3 N^2 d operations instead of 6 N^2 d.
"""

from bisect import bisect_right
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nearfar.engine import anchors as lookup
from nearfar.engine import budget, gpu
from nearfar.engine.anchor_sums import block_loss
from nearfar.engine.anchors import Anchors, look_up_rows
from nearfar.engine.budget import Workspace
from nearfar.engine.closeness import Closeness, Tile
from nearfar.engine.listed_tuples import Tally
from nearfar.engine.observe import force_visitors
from nearfar.engine.relation import Relation
from nearfar.engine.slices import part, spans
from nearfar.engine.step import Answer, Executor, Request
from nearfar.engine.walk import Place, Walk
from nearfar.losses.hinge_range import Part, in_range, parts_of, thresholds
from nearfar.reduction import ACTIVE, Between, sum_dtype

# Copies of a tile held at the same time: distances, forces of rows and columns, comparisons.
_BUFFERS = 6


def every_triplet(
    closeness: Closeness,
    relation: Relation,
    margin: float,
    smooth: bool,
    tally: Tally,
) -> Executor:
    """All triplets of each anchor; `tally` counts them, and those with a non-zero loss."""

    def by_blocks(request: Request) -> Answer:
        def rule(
            tile: Tile, weight: Tensor | None, gradient: bool, space: Workspace
        ) -> tuple[Tensor, Tensor, Tensor | None]:
            d, anchors = tile.closeness, Anchors.of(tile.block)
            if smooth:
                sums = softpluses(d, anchors, margin, request.kept, gradient=gradient)
            else:
                sums = hinges(d, anchors, margin, request.kept, space, gradient=gradient)
            tally.add(sums.valid.sum(), sums.active.sum())
            force = sums.force
            if force is not None and weight is not None:
                force = force.mul_(weight[:, None])
            return sums.loss.where(sums.valid > 0, 0), sums.counts, force

        return block_loss(rule, closeness, relation)(request)

    def execute(request: Request) -> Answer:
        if gpu.takes_every_tuple(request, closeness, relation):
            from nearfar.engine.gpu import tuples  # loads Triton

            return tuples.every_triplet(request, closeness, relation, margin, smooth, tally)
        a = request.a
        height, width = budget.tile(request.limits, a.device, a.element_size(), _BUFFERS)
        shape = max(height // 2, 1), 2 * width
        plain = not smooth and closeness.symmetric and request.kept in (None, ACTIVE)
        large = len(a) > shape[0] and not force_visitors() and _has_small_classes(relation)
        if not (plain and large):
            return by_blocks(request)
        answer, active = _ByClass(closeness, relation, margin, request).answer(shape)
        assert isinstance(answer.counts, Tensor)  # the number of triplets of each anchor
        tally.add(answer.counts.sum(), active.sum())
        return answer if request.kept is None else replace(answer, counts=active)

    return execute


def _has_small_classes(relation: Relation) -> bool:
    """Whether a batch is compared with itself, in classes so small that no look-up is needed."""
    if not relation.symmetric or relation.row_labels is None or relation.row_labels.ndim == 2:
        return False
    return 0 < int(relation.n_positives().max()) <= lookup.FEW


class _ByClass:
    """A batch sorted by class."""

    def __init__(
        self, closeness: Closeness, relation: Relation, margin: float, request: Request
    ) -> None:
        assert relation.row_labels is not None
        labels, self.order = relation.row_labels.sort(stable=True)
        in_order = replace(relation, row_labels=labels, column_labels=labels)
        self.weight = None if request.weight is None else request.weight[self.order]
        request = replace(request, a=request.a[self.order], weight=self.weight)
        self.walk = Walk(request, closeness, in_order, buffers=_BUFFERS)
        self.original, self.margin, self.space = relation, margin, Workspace()
        a, n = self.walk.a, len(labels)
        most = int(relation.n_positives().max())
        self.threshold = a.new_full((n, most), -inf)
        self.pull = a.new_zeros((n, most), dtype=sum_dtype(a))
        self.loss = a.new_zeros(n, dtype=sum_dtype(a))
        self.ends = [*(labels.diff() != 0).nonzero()[:, 0].add(1).tolist(), n]

    def answer(self, shape: tuple[int, int]) -> tuple[Answer, Tensor]:
        """The answer in the order of the batch, and each row's number of active triplets."""
        room, squares = self.walk.kept_elements(1, shape), self._squares(shape[0])
        kept: list[tuple[Anchors, Tile | None]] = []
        for rows in squares:
            square = self.walk.tile((rows, rows, False))
            anchors = Anchors.of(square.block)
            table = anchors.table(square.closeness, -inf)
            self.threshold[rows, : anchors.most] = table.add_(self.margin)
            room -= square.closeness.numel()
            kept.append((anchors, square if room >= 0 else None))
        n = len(self.loss)
        for rows in squares:
            for at in spans(n - rows.stop, shape[1]):
                self._negatives_tile((rows, slice(rows.stop + at.start, rows.stop + at.stop), True))
        for rows, (anchors, known) in zip(squares, kept, strict=True):
            self._diagonal_tile(known or self.walk.tile((rows, rows, False)), anchors)
        return self._in_order()

    def _squares(self, step: int) -> list[slice]:
        """Slices of about `step` rows, cut where the class changes."""
        cuts = [0]
        while cuts[-1] < len(self.loss):
            fits = bisect_right(self.ends, cuts[-1] + step) - 1
            cuts.append(self.ends[max(fits, bisect_right(self.ends, cuts[-1]))])
        return [slice(*cut) for cut in pairwise(cuts)]

    def _negatives_tile(self, place: Place) -> None:
        """A tile that holds only negatives, of its rows as anchors and of its columns."""
        tile = self.walk.tile(place)
        self.space.clear()
        force = self._forces(tile.rows, tile.closeness)
        other = self._forces(tile.columns, tile.closeness.T)
        if self.walk.gradient is not None:
            self.walk.pull(tile, force.add_(other.T))

    def _diagonal_tile(self, tile: Tile, anchors: Anchors) -> None:
        """A tile on the diagonal, visited last: by then the pulls on its positives are complete."""
        self.space.clear()
        force = self._forces(tile.rows, tile.closeness, anchors)
        if self.walk.gradient is not None:
            pull = self.pull[tile.rows][anchors.row, anchors.slot].to(force.dtype)
            if self.weight is not None:
                pull *= self.weight[tile.rows][anchors.row]
            force[anchors.row, anchors.column] = pull
            self.walk.pull(tile, force)

    def _forces(self, rows: slice, d: Tensor, anchors: Anchors | None = None) -> Tensor:
        """(r, c) the forces of anchors on their negatives; adds the losses of the negatives.

        Args:
            rows: the anchors.
            d: (r, c) their distances.
            anchors: their positives, to be left out; None: all columns are negatives.
        """
        threshold = part(self.threshold, rows)
        with nullcontext() if anchors is None else anchors.only_negatives(d):
            pull, force = count_violations(threshold, d, None, self.space)
        part(self.pull, rows).add_(pull)
        part(self.loss, rows).add_(negative_part(threshold, d, force, self.space))
        return force if self.weight is None else force.mul_(self.weight[rows, None])

    def _in_order(self) -> tuple[Answer, Tensor]:
        place = self.order.argsort()
        valid = self.original.n_positives() * self.original.n_negatives()
        active = self.pull.nan_to_num(0).sum(1).long()[place]
        loss = (self.loss + positive_part(self.threshold, self.pull))[place].where(valid > 0, 0)
        answer = self.walk.answer(loss, valid)
        return replace(answer, da=None if answer.da is None else answer.da[place]), active


@dataclass(eq=False)
class Sums:
    """Sums over the triplets of a block of anchors.

    Attributes:
        loss: (b,) the sum of the losses that count, float64.
        valid: (b,) int64, the number of triplets, or the sum of their weights.
        active: (b,) int64, likewise of those with a non-zero loss.
        counts: (b,) int64, likewise of those that count.
        force: (b, m) derivative of each row's loss with respect to its distances, or None.
    """

    loss: Tensor
    valid: Tensor
    active: Tensor
    counts: Tensor
    force: Tensor | None


def hinges(
    d: Tensor,
    anchors: Anchors,
    margin: float,
    kept: Between | None,
    space: Workspace,
    *,
    weight: Tensor | None = None,
    valid: Tensor | None = None,
    gradient: bool = True,
) -> Sums:
    """Sums over the triplets of each row of max(0, d_ip - d_in + margin).

    Args:
        d: (b, m) distances.
        anchors: their positives.
        margin: how much farther a negative must be than a positive.
        kept: which of them count; None: all.
        space: where the forces go.
        weight: (b, m) the weight of the triplets with each negative; None: all 1.
        valid: (b,) the weight of all triplets of each row; None: their number.
        gradient: whether to compute the forces.
    """
    if valid is None:
        valid = anchors.count * anchors.n_negatives
    first, *rest = parts_of(margin, kept)
    # What is left after a subtraction may be far smaller than the sums.
    wide = d.to(sum_dtype(d)) if rest else d
    sums = _hinges(wide, anchors, first, space, weight, valid, gradient)
    for other in rest:
        more = _hinges(wide, anchors, other, space, weight, valid, gradient)
        sums.loss, sums.counts = sums.loss - more.loss, sums.counts - more.counts
        if sums.force is not None and more.force is not None:
            sums.force = sums.force.sub_(more.force).to(d.dtype)
    sums.loss = in_range(sums.loss, sums.counts, kept)
    return sums


def _hinges(
    d: Tensor,
    anchors: Anchors,
    summed: Part,
    space: Workspace,
    weight: Tensor | None,
    valid: Tensor,
    gradient: bool,
) -> Sums:
    """One of the sums of which those of `hinges` are made."""
    if not anchors.most:
        return _nothing(d, gradient=gradient)
    threshold = thresholds(anchors.table(d, -inf), summed)
    with anchors.only_negatives(d):
        pull, force = count_violations(threshold, d, weight, space)
    loss = positive_part(threshold, pull) + negative_part(threshold, d, force, space)
    active = pull.nan_to_num(0).sum(1, dtype=sum_dtype(d)).long()
    if summed.start:
        loss += summed.start * active.to(loss.dtype)
    sums = Sums(loss, valid, active, valid if summed.every else active, force if gradient else None)
    if gradient:
        force[anchors.row, anchors.column] = pull[anchors.row, anchors.slot].to(d.dtype)
    return sums


def softpluses(
    d: Tensor, anchors: Anchors, margin: float, kept: Between | None, *, gradient: bool
) -> Sums:
    """Sums over the triplets of each row of log(1 + e^(d_ip - d_in + margin))."""
    valid = anchors.count * anchors.n_negatives
    if not anchors.most:
        return _nothing(d, gradient=gradient)
    threshold = anchors.table(d, -inf).add_(margin)
    with anchors.only_negatives(d):
        loss, counts, pull, force = _smooth(threshold, d, kept)
    force[anchors.row, anchors.column] = pull[anchors.row, anchors.slot].to(d.dtype)
    counts = valid if kept is None else counts
    return Sums(loss, valid, valid, counts, force if gradient else None)


def _nothing(d: Tensor, *, gradient: bool) -> Sums:
    """The sums of anchors without a positive."""
    none = torch.zeros(len(d), dtype=torch.int64, device=d.device)
    force = torch.zeros_like(d) if gradient else None
    return Sums(d.new_zeros(len(d), dtype=sum_dtype(d)), none, none, none, force)


def count_violations(
    threshold: Tensor, far: Tensor, weight: Tensor | None, space: Workspace
) -> tuple[Tensor, Tensor]:
    """How many negatives lie below each threshold, and how many thresholds above each negative.

    Args:
        threshold: (b, p) of each positive, -inf where there is none.
        far: (b, m) distances to the negatives, inf to all other rows.
        weight: (b, m) the weight of each negative; None: all 1.
        space: where the forces go.

    Returns:
        (b, p) float64, the pulls on the positives; (b, m) the forces on the negatives, which are
            the negated numbers.
    """
    if threshold.shape[1] > lookup.FEW:
        return _look_up(threshold, far, weight)
    pull = torch.zeros_like(threshold, dtype=sum_dtype(far))
    pushed = space.like(far)
    by_slot = threshold.T.contiguous()  # faster to compare with a transposed tile
    with space.lent(far) as buffer:
        for slot in range(len(by_slot)):
            one = buffer if slot else pushed
            torch.gt(by_slot[slot, :, None], far, out=one)
            if weight is not None:
                one.mul_(weight)
            # A float32 counts up to 2^24, which weighted counts may exceed.
            pull[:, slot] = one.sum(1, dtype=None if weight is None else sum_dtype(far))
            if slot:
                pushed.add_(one)
    return pull, pushed.neg_()


def _look_up(threshold: Tensor, far: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Look up all positives at once; see `count_violations`."""
    rows, most = threshold.shape
    ordered, order = threshold.sort(1)
    place = look_up_rows(ordered, far).long()
    bucket = place + torch.arange(0, rows * (most + 1), most + 1, device=far.device)[:, None]
    by = None if weight is None else weight.flatten().to(sum_dtype(far))
    nearer = torch.bincount(bucket.flatten(), by, rows * (most + 1)).view(rows, most + 1)
    pull = nearer[:, :most].cumsum(1).to(sum_dtype(far))
    force = (place - most).to(far.dtype)
    return torch.empty_like(pull).scatter_(1, order, pull), (
        force if weight is None else force.mul_(weight)
    )


# A loss is a sum over positives plus one over negatives. Both are measured from the largest
# threshold: measured from 0, they would cancel, and a small loss would lose precision.


def _largest(threshold: Tensor) -> Tensor:
    """(b, 1) the largest threshold of each row; 0 where there is none."""
    top = threshold.amax(1, keepdim=True)
    return top.masked_fill_(top == -inf, 0)


def positive_part(threshold: Tensor, pull: Tensor) -> Tensor:
    """(b,) the part of the losses that comes from the thresholds of positives and their pulls."""
    gap = (threshold - _largest(threshold)).masked_fill_(threshold == -inf, 0)
    return (gap.to(pull.dtype) * pull).sum(1)


def negative_part(threshold: Tensor, d: Tensor, force: Tensor, space: Workspace) -> Tensor:
    """(b,) the part that comes from the distances of negatives and the forces on them."""
    with space.lent(d) as gap:
        return torch.sub(d, _largest(threshold), out=gap).mul_(force).sum(1)


def _smooth(
    threshold: Tensor, far: Tensor, kept: Between | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses (b,), their numbers (b,), pulls (b, p) and forces (b, m) of the softplus."""
    loss = far.new_zeros(len(far), dtype=sum_dtype(far))
    counts = torch.zeros_like(loss, dtype=torch.int64)
    pull, force = torch.zeros_like(threshold, dtype=sum_dtype(far)), torch.zeros_like(far)
    for slot in range(threshold.shape[1]):
        violation = threshold[:, slot, None] - far
        slope, value = violation.sigmoid(), logsigmoid(violation.neg_()).neg_()
        if kept is not None:
            # Where there is no positive or no negative, the violation was -inf, and is now inf.
            outside = kept.outside(value).logical_or_(violation == inf)
            slope.masked_fill_(outside, 0)
            value.masked_fill_(outside, 0)
            counts += (~outside).sum(1)
        force -= slope
        loss += value.sum(1)
        pull[:, slot] = slope.sum(1)
    return loss, counts, pull, force
