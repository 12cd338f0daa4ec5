"""Every quadruplet of a batch, without listing one.

A quadruplet is a positive pair (i, j), a negative k and a second negative l, of three classes. The
first term is a triplet, counted once for each l. The second compares a positive pair with a pair
(k, l) of two other classes: with all negative pairs of the batch, minus those with a row in the
class of (i, j). To sum over both, each negative distance is looked up in the sorted thresholds
(d + margin) of all positive pairs, and of those of a class: n^4 terms take O(n^2 log n) time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nearfar.distance import Distance, between_rows
from nearfar.engine.anchors import Anchors, look_up
from nearfar.engine.budget import Limits, Workspace, block
from nearfar.engine.closeness import Tile, add_rows, by_distance
from nearfar.engine.listed import Picker, Tally, show_listed
from nearfar.engine.observe import force_visitors
from nearfar.engine.pick import order_preserving, walk
from nearfar.engine.relation import Relation
from nearfar.engine.slices import spans
from nearfar.engine.step import Answer, Executor, Request
from nearfar.engine.walk import Walk, show
from nearfar.losses.every_triplet import hinges
from nearfar.reduction import sum_dtype

# Copies of the rows of a pair held at the same time.
_BUFFERS = 6
# Copies of a block of pairs held at the same time.
_BLOCK_BUFFERS = 12


@dataclass(eq=False)
class Classes:
    """The classes of a batch, numbered.

    Attributes:
        of_row: (n,) int64, from 0 to c - 1.
        size: (c,) int64.
    """

    of_row: Tensor
    size: Tensor

    @classmethod
    def of(cls, labels: Tensor) -> "Classes":
        _, of_row, size = torch.unique(labels, return_inverse=True, return_counts=True)
        return cls(of_row, size)

    def quadruplets(self) -> Tensor:
        """(n,) int64, how many quadruplets have each row as anchor."""
        others = len(self.of_row) - self.size
        pairs = others.square() - (self.size.square().sum() - self.size.square())
        return (pairs * (self.size - 1))[self.of_row]

    def n_second_negatives(self, rows: slice) -> Tensor:
        """(b, n) how many second negatives l there are for an anchor and a negative k."""
        in_class = self.size[self.of_row]
        return len(self.of_row) - in_class[rows, None] - in_class

    def positive_pairs(self) -> tuple[Tensor, Tensor]:
        """(p,) and (p,), the rows of all ordered pairs within a class."""
        order = self.of_row.argsort(stable=True)
        size = self.size[self.of_row[order]]
        first = order.repeat_interleave(size)
        start = (self.size.cumsum(0) - self.size)[self.of_row[first]]
        run = torch.arange(len(first), device=order.device)
        second = order[start + run - (size.cumsum(0) - size).repeat_interleave(size)]
        return first[first != second], second[first != second]


def every_quadruplet(
    labels: Tensor,
    relation: Relation,
    distance: Distance,
    margin: float,
    margin2: float,
    first: Tally,
    second: Tally,
) -> Executor:
    """All quadruplets of a batch with itself; `first` and `second` count the active terms."""
    classes, closeness = Classes.of(labels), by_distance(distance)
    n_quadruplets = classes.quadruplets()

    def execute(request: Request) -> Answer:
        if not (force_visitors() or n_quadruplets.any()):  # exactly 0, without rounding errors
            none = torch.zeros_like(request.a) if request.gradient else None
            return Answer(request.a.new_zeros(request.a.shape[0]), n_quadruplets, none)
        walk = Walk(request, closeness, relation, buffers=_BLOCK_BUFFERS)
        pairs = _Pairs.of(classes, request, distance, margin2, symmetric=closeness.symmetric)
        per_row, space = walk.a.new_zeros(walk.a.shape[0], dtype=sum_dtype(walk.a)), Workspace()
        for tile in walk.blocks():
            space.clear()
            per_k = classes.n_second_negatives(tile.rows).to(walk.a.dtype)
            anchors, wanted = Anchors.of(tile.block), request.gradient
            terms = hinges(tile.closeness, anchors, margin, space, weight=per_k, gradient=wanted)
            per_row[tile.rows] += terms.loss
            first.add(0, terms.active.sum())
            push = pairs.push(tile.rows, tile.closeness, tile.block.hidden)
            if terms.force is not None:
                if request.weight is not None:
                    terms.force.mul_(request.weight[tile.rows, None])
                pairs.add_gradient(walk, tile, terms.force - push)
        loss, count, pull = pairs.finish_sums()
        per_row.index_add_(0, pairs.anchor, loss)
        first.add(n_quadruplets.sum(), 0)
        second.add(n_quadruplets.sum(), count.sum().long())
        if walk.gradient is not None:
            pairs.add_positive_gradient(walk, distance, pull)
        return walk.answer(torch.where(n_quadruplets > 0, per_row, 0), n_quadruplets)

    return execute


@dataclass(eq=False)
class _Pairs:
    """The positive pairs of a batch, and the sums of their second terms."""

    symmetric: bool  # a pair is as far apart from either end
    anchor: Tensor
    positive: Tensor
    d: Tensor
    first_force: Tensor  # kept for observers
    all_pairs: "_Thresholds"
    by_class: "_Thresholds"
    classes: Classes

    @classmethod
    def of(
        cls,
        classes: Classes,
        request: Request,
        distance: Distance,
        margin: float,
        *,
        symmetric: bool,
    ) -> "_Pairs":
        a, (anchor, positive) = request.a, classes.positive_pairs()
        d = a.new_zeros(len(anchor))
        for chunk in _chunks(len(anchor), a, request.limits):
            d[chunk] = between_rows(a[anchor[chunk]], a[positive[chunk]], distance)
        weight = None if request.weight is None else request.weight[anchor]
        threshold, segment = d + margin, classes.of_row[anchor]
        one_segment = torch.zeros_like(segment), torch.full_like(classes.size[:1], len(d))
        by_class = segment, classes.size * (classes.size - 1)
        return cls(
            symmetric,
            anchor,
            positive,
            d,
            torch.zeros_like(d),
            _Thresholds(threshold, *one_segment, weight),
            _Thresholds(threshold, *by_class, weight),
            classes,
        )

    def within(self, rows: slice) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The pairs whose anchor is among these rows, and their places in a block of these rows."""
        here = ((self.anchor >= rows.start) & (self.anchor < rows.stop)).nonzero()[:, 0]
        return here, (self.anchor[here] - rows.start, self.positive[here])

    def push(self, rows: slice, d: Tensor, hidden: Tensor | None) -> Tensor:
        """(b, n) the push on a block of negative pairs by the positive pairs of other classes.

        A pair (k, l) is compared with all positive pairs except those of the classes of k and l.
        Where (l, k) are as far apart, the two classes contribute equally over all ordered pairs,
        so twice the contribution of k gives the same sums and gradient. Observers are shown the
        force of each pair as it is.
        """
        one_segment = torch.zeros(1, 1, dtype=torch.long, device=d.device)
        of_row = self.classes.of_row
        push = self.all_pairs.add(d, one_segment, hidden)
        own_class = self.by_class.add(d, of_row[rows, None], hidden)
        if self.symmetric and not force_visitors():
            return push.sub_(own_class, alpha=2)
        of_columns = self.by_class.push if self.symmetric else self.by_class.add
        return push - own_class - of_columns(d, of_row[None, :], hidden)

    def add_gradient(self, walk: Walk, tile: Tile, force: Tensor) -> None:
        """Add the gradient of the forces on a block.

        Observers see each positive pair once, at the end, with the force of both terms.
        """
        assert walk.gradient is not None
        if force_visitors():
            here, where = self.within(tile.rows)
            self.first_force[here] = force[where]
            others = force.index_put(where, force.new_zeros(()))
            show(walk.request, tile, others, walk.closeness.distance_sign)
        walk.closeness.backward(force, tile, walk.gradient)

    def add_positive_gradient(self, walk: Walk, distance: Distance, force: Tensor) -> None:
        """Add the gradient of the forces that the second terms exert on the positive pairs."""
        assert walk.gradient is not None
        both = force + self.first_force
        show_listed(walk.request, walk.relation, self.anchor, self.positive, self.d, both)
        a = walk.request.a  # as they are: `between_rows` prepares them by itself
        for chunk in _chunks(len(self.anchor), a, walk.request.limits):
            ends = self.anchor[chunk], self.positive[chunk]
            _pull(a, walk.gradient.da, *ends, distance, force[chunk])

    def finish_sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """For each positive pair: the sum of its second terms, the active ones, and its pull."""
        count, distances = self.all_pairs.finish_sums()
        in_class, distances_in_class = self.by_class.finish_sums()
        times = 2 if self.symmetric else 1  # else both classes were added
        count, distances = count - times * in_class, distances - times * distances_in_class
        loss = self.all_pairs.threshold.to(distances.dtype) * count - distances
        weight = self.all_pairs.weight
        return loss, count, (count if weight is None else count * weight).to(self.d.dtype)


class _Thresholds:
    """Sorted thresholds of positive pairs, in segments, and the negative pairs below each.

    Args:
        threshold: (p,) the distance below which a negative pair violates the margin.
        segment: (p,) the segment of each positive pair; size: (s,) their lengths.
        weight: (p,) the weight of each pair in the gradient; None: all 1.
    """

    def __init__(
        self, threshold: Tensor, segment: Tensor, size: Tensor, weight: Tensor | None
    ) -> None:
        order = threshold.argsort(stable=True)
        self.order = order[segment[order].argsort(stable=True)]
        self.threshold, self.weight = threshold, weight
        self.table, self.segment = threshold[self.order], segment[self.order]
        self.stop = size.cumsum(0)
        self.start = self.stop - size
        self.longest = int(size.max()) if len(size) else 0
        ones = torch.ones_like(threshold) if weight is None else weight
        until = ones[self.order].to(sum_dtype(threshold)).cumsum(0)
        self.until = torch.cat([until.new_zeros(1), until])  # weight before each place
        # One bucket for each place: one more than thresholds in each segment.
        self.count = torch.zeros(len(self.table) + len(size), dtype=torch.int64, device=size.device)
        self.sum = torch.zeros_like(self.count, dtype=sum_dtype(threshold))

    def add(self, d: Tensor, segment: Tensor, hidden: Tensor | None) -> Tensor:
        """(b, n) the weight of the pairs in a segment that push each pair; adds it to the sums."""
        place = self._place(d, segment, hidden)
        bucket = (place + segment).flatten()
        self.count += torch.bincount(bucket, minlength=len(self.count))
        self.sum += torch.bincount(bucket, d.flatten().to(sum_dtype(d)), len(self.sum))
        return self._beyond(place, segment).to(d.dtype)

    def push(self, d: Tensor, segment: Tensor, hidden: Tensor | None) -> Tensor:
        """The same, without adding to the sums."""
        return self._beyond(self._place(d, segment, hidden), segment).to(d.dtype)

    def finish_sums(self) -> tuple[Tensor, Tensor]:
        """For each positive pair, the number of pairs below its threshold, and their sum."""
        bucket = torch.arange(len(self.table), device=self.table.device) + self.segment
        before = (self.start + torch.arange(len(self.start), device=bucket.device))[self.segment]
        found = []
        for kept in (self.count, self.sum):
            until = torch.cat([kept.new_zeros(1), kept.cumsum(0)])
            within = until[bucket + 1] - until[before]
            found.append(torch.empty_like(within).scatter_(0, self.order, within))
        return found[0], found[1]

    def _place(self, d: Tensor, segment: Tensor, hidden: Tensor | None) -> Tensor:
        stop = self.stop[segment]
        place = look_up(self.table, d, self.start[segment], stop, self.longest)
        return place if hidden is None else torch.where(hidden, stop.to(place.dtype), place)

    def _beyond(self, place: Tensor, segment: Tensor) -> Tensor:
        whole = self.until[self.stop[segment]]
        return whole - self.until.index_select(0, place.flatten()).view(place.shape)


def hardest_quadruplets(labels: Tensor, relation: Relation, distance: Distance) -> Picker:
    """For each anchor: itself, its farthest positive, its nearest negative, and a pair of others.

    The others are the closest pair of two different classes that are not the anchor's.
    """
    classes = Classes.of(labels).of_row

    def pick(a: Tensor, b: Tensor | None, limits: Limits) -> Iterator[Tensor]:
        kept = []
        closeness, a, b = order_preserving(distance, a, b)
        for tile in walk(closeness, relation, a, b, limits):
            d, anchors = tile.closeness, Anchors.of(tile.block)
            near = anchors.extreme(d, farthest=True)
            d_one, one = anchors.mask_non_negatives(d).min(1)
            d.masked_fill_(classes[one][:, None] == classes, torch.inf)  # leaves third classes
            d_two, two = d.min(1)
            valid = (anchors.count > 0) & (d_two != torch.inf)
            kept.append((near, one, two, d_one, d_two, valid))
        if not kept:
            return
        positive, one, two, d_one, d_two, valid = map(torch.cat, zip(*kept, strict=True))
        anchor = torch.arange(a.shape[0], device=a.device)
        second = _nearest_two(classes, one, two, d_one, d_two)
        yield torch.stack([anchor, positive, one, *second], 1)[valid]

    return pick


def _nearest_two(
    classes: Tensor, one: Tensor, two: Tensor, d_one: Tensor, d_two: Tensor
) -> tuple[Tensor, Tensor]:
    """(n,), (n,) the closest pair of two classes other than the row's own.

    This is the closest pair of the batch for every row of a third class.
    """
    k = int(d_one.argmin())
    first, second = torch.full_like(one, k), one[k].expand_as(one).clone()
    for of_pair in (classes[k], classes[one[k]]):
        partner = torch.where(classes[one] == of_pair, two, one)
        d = torch.where(classes[one] == of_pair, d_two, d_one)
        best = d.masked_fill(classes == of_pair, torch.inf).argmin()
        here = classes == of_pair
        first[here], second[here] = best, partner[best]
    return first, second


def _chunks(n: int, a: Tensor, limits: Limits) -> Iterator[slice]:
    return spans(n, block(limits, a.device, a.element_size(), _BUFFERS, a.shape[1]))


def _pull(
    a: Tensor, da: Tensor, first: Tensor, second: Tensor, distance: Distance, force: Tensor
) -> None:
    """Add to `da` the gradient of sum(force * distance) of listed pairs."""
    x, y = a[first].requires_grad_(), a[second].requires_grad_()
    with torch.enable_grad():
        apart = between_rows(x, y, distance)
    for index, gradient in zip(
        (first, second), torch.autograd.grad(apart, (x, y), force), strict=True
    ):
        add_rows(da, index, gradient)
