"""Every quadruplet of a batch, without listing one.

A quadruplet is a positive pair (i, j), a negative k and a second negative l, of three classes. The
first term is a triplet, counted once for each l. The second compares a positive pair with a pair
(k, l) of two other classes: with all negative pairs of the batch, minus those with a row in the
class of (i, j). To sum over both, each negative distance is looked up in the sorted thresholds
(d + margin) of all positive pairs, and of those of a class: n^4 terms take O(n^2 log n) time.

With a reference, j, k and l are its rows. The pairs (k, l) are then those of the reference with
itself, which is visited by itself.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from nearfar.distance import Distance, between_rows
from nearfar.engine import gpu
from nearfar.engine.anchors import Anchors, look_up
from nearfar.engine.budget import Limits, Workspace, block
from nearfar.engine.closeness import Closeness, Tile, by_distance
from nearfar.engine.listed_tuples import Picker, Tally, show_listed
from nearfar.engine.observe import force_visitors
from nearfar.engine.pick import order_preserving, walk
from nearfar.engine.precision import Precision
from nearfar.engine.relation import Relation
from nearfar.engine.slices import add_rows, spans
from nearfar.engine.step import Answer, Executor, Request
from nearfar.engine.walk import Walk, show
from nearfar.losses.every_triplet import hinges
from nearfar.losses.hinge_range import Part, in_range, parts_of, thresholds
from nearfar.reduction import Between, sum_dtype

if TYPE_CHECKING:
    from nearfar.engine.gpu.quadruplets import Segments

# Which of the two terms of a quadruplet count.
Terms = Literal["both", "first", "second"]

# Copies of the rows of a pair held at the same time.
_BUFFERS = 6
# Copies of a block of pairs held at the same time.
_BLOCK_BUFFERS = 12


@dataclass(eq=False)
class Classes:
    """The classes of a batch and of the columns it is compared with, numbered.

    Attributes:
        of_row: (n,) int64, from 0 to c - 1.
        of_column: (m,) int64, likewise.
        size: (c,) int64, the number of columns of each.
        own: (n,) int64, the column that is the row itself, -1 for none; None: none is.
    """

    of_row: Tensor
    of_column: Tensor
    size: Tensor
    own: Tensor | None

    @classmethod
    def of(cls, relation: Relation) -> "Classes":
        rows, columns = relation.row_labels, relation.column_labels
        assert rows is not None
        assert columns is not None
        if relation.symmetric:
            _, of_row, size = torch.unique(rows, return_inverse=True, return_counts=True)
            return cls(of_row, of_row, size, relation.own)
        known, number = torch.unique(torch.cat([rows, columns]), return_inverse=True)
        of_row, of_column = number.split([len(rows), len(columns)])
        size = torch.bincount(of_column, minlength=len(known))
        return cls(of_row, of_column, size, relation.own)

    @cached_property
    def pairs(self) -> Tensor:
        """(c,) int64, the ordered pairs of columns of two classes other than each class."""
        others = len(self.of_column) - self.size
        return others.square() - (self.size.square().sum() - self.size.square())

    def n_second_negatives(self, rows: slice) -> Tensor:
        """(b, m) how many second negatives l there are for an anchor and a negative k."""
        in_class = self.size[self.of_row[rows], None] + self.size[self.of_column]
        return len(self.of_column) - in_class

    def positive_pairs(self) -> tuple[Tensor, Tensor]:
        """(p,) and (p,), each row with the columns of its class."""
        rows = self.of_row.argsort(stable=True)
        same = self.of_column is self.of_row
        columns = rows if same else self.of_column.argsort(stable=True)
        size = self.size[self.of_row[rows]]
        first = rows.repeat_interleave(size)
        start = (self.size.cumsum(0) - self.size)[self.of_row[first]]
        run = torch.arange(len(first), device=rows.device)
        second = columns[start + run - (size.cumsum(0) - size).repeat_interleave(size)]
        if self.own is None:
            return first, second
        another = second != self.own[first]
        return first[another], second[another]


def every_quadruplet(
    classes: Classes,
    relation: Relation,
    distance: Distance,
    margins: tuple[float, float],
    terms: Terms,
    first: Tally,
    second: Tally,
) -> Executor:
    """All quadruplets of each anchor.

    Args:
        classes: of the rows and columns.
        relation: which pairs are similar.
        distance: by which they are compared.
        margins: of the first and of the second term.
        terms: which of the two count. Only where it is one may the mean be over some quadruplets.
        first: is told how many quadruplets there are, and how many have a non-zero first term.
        second: likewise for the second term.
    """
    n_quadruplets = classes.pairs[classes.of_row] * relation.n_positives()

    def execute(request: Request) -> Answer:
        if not (force_visitors() or n_quadruplets.any()):  # exactly 0, without rounding errors
            ends = (t if request.gradient else None for t in (request.a, request.b))
            da, db = (None if t is None else torch.zeros_like(t) for t in ends)
            return Answer(request.a.new_zeros(request.a.shape[0]), n_quadruplets, da, db)
        # The last pulls on the positives are known at the end, so no row is finished before.
        request = replace(request, finish=None)
        walk = Walk(request, by_distance(distance), relation, buffers=_BLOCK_BUFFERS)
        pairs = None if terms == "first" else _Pairs.of(walk, classes, distance, margins[1])
        sums = _Sums(walk, classes, n_quadruplets, pairs)
        on_gpu = gpu.takes_every_tuple(request, walk.closeness, relation)
        add = sums.add_by_kernels if on_gpu else sums.add_by_blocks
        add(None if terms == "second" else margins[0])
        first.add(n_quadruplets.sum(), sums.active)
        if pairs is not None:
            second.add(n_quadruplets.sum(), sums.add_pairs(pairs))
        return sums.answer()

    return execute


class _Sums:
    """The sums of the terms of each anchor, and their gradient.

    Args:
        walk: over the rows and columns.
        classes: of both.
        n_quadruplets: (n,) of each anchor.
        pairs: the positive pairs, for the second terms; None: only the first ones count.
    """

    def __init__(
        self, walk: Walk, classes: Classes, n_quadruplets: Tensor, pairs: "_Pairs | None"
    ) -> None:
        self.walk, self.classes, self.pairs = walk, classes, pairs
        self.n_quadruplets, self.kept = n_quadruplets, walk.request.kept
        self.loss = walk.a.new_zeros(walk.a.shape[0], dtype=sum_dtype(walk.a))
        self.counts, self.space = torch.zeros_like(n_quadruplets), Workspace()
        self.active: Tensor | int = 0
        self.of_columns: Tensor | None = None

    def add_by_blocks(self, margin: float | None) -> None:
        """Add the first terms at this margin, if they count, and compare the pairs (k, l).

        In a batch compared with itself, its negatives are pairs (k, l), too.
        """
        if margin is not None or self.walk.request.b is None:
            for tile in self.walk.blocks():
                self._add(tile, margin)
        if self.pairs is not None and self.walk.request.b is not None:
            self._push_columns(self.pairs)

    def _add(self, tile: Tile, margin: float | None) -> None:
        self.space.clear()
        force = None if margin is None else self._add_first(tile, margin)
        if self.pairs is not None and self.walk.request.b is None:
            push = self.pairs.push(tile.rows, tile.closeness, tile.block.hidden)
            force = push.neg_() if force is None else force - push
        if self.walk.gradient is None or force is None:
            return
        if force_visitors():
            self._show(tile, force)
        self.walk.closeness.backward(force, tile, self.walk.gradient)

    def add_by_kernels(self, margin: float | None) -> None:
        """The same on a GPU."""
        from nearfar.engine.gpu import tuples  # loads Triton

        walk = self.walk
        if margin is not None:
            found = tuples.first_terms(walk.request, walk.closeness, walk.relation, margin)
            self.loss += found.loss
            if self.kept is not None:
                self.counts += found.number
            self.active = found.number.sum()
            if walk.gradient is not None and found.da is not None:
                walk.gradient.da.add_(found.da)
                if found.db is not None:
                    walk.gradient.db.add_(found.db)
        if self.pairs is not None:
            pushed = self.pairs.push_by_kernel(walk.request, walk.closeness)
            if pushed is not None and walk.gradient is not None:
                of_rows = walk.request.b is None
                (walk.gradient.da if of_rows else walk.gradient.db).add_(pushed)

    def _add_first(self, tile: Tile, margin: float) -> Tensor | None:
        """Add the first terms; returns their forces."""
        rows, weight = tile.rows, self.walk.request.weight
        sums = hinges(
            tile.closeness,
            Anchors.of(tile.block),
            margin,
            self.kept,
            self.space,
            weight=self.classes.n_second_negatives(rows).to(self.walk.a.dtype),
            valid=self.n_quadruplets[rows],
            gradient=self.walk.gradient is not None,
        )
        self.loss[rows] += sums.loss
        if self.kept is not None:
            self.counts[rows] += sums.counts
        self.active = self.active + sums.active.sum()
        if sums.force is not None and weight is not None:
            sums.force.mul_(weight[rows, None])
        return sums.force

    def _show(self, tile: Tile, force: Tensor) -> None:
        """Show the forces; those on a positive pair at the end, with those of its second terms."""
        if self.pairs is not None:
            here, where = self.pairs.within(tile.rows)
            self.pairs.first_force[here] = force[where]
            force = force.index_put(where, force.new_zeros(()))
        show(self.walk.request, tile, force, self.walk.closeness.distance_sign)

    def add_pairs(self, pairs: "_Pairs") -> Tensor:
        """Add the second terms; returns how many of them are non-zero."""
        walk = self.walk
        loss, counts, active, pull = pairs.finish_sums(self.kept)
        add_rows(self.loss, pairs.anchor, loss)
        if self.kept is not None:
            self.counts.index_add_(0, pairs.anchor, counts)
        if walk.gradient is not None:
            ends = pairs.anchor, pairs.positive
            show_listed(walk.request, walk.relation, *ends, pairs.d, pull + pairs.first_force)
            of_columns = walk.gradient.da if walk.request.b is None else walk.gradient.db
            for at in _chunks(len(pull), walk.a, walk.request.limits):
                some = pairs.anchor[at], pairs.positive[at]
                _pull(pairs, (walk.gradient.da, of_columns), some, pull[at])
        return active.sum()

    def _push_columns(self, pairs: "_Pairs") -> None:
        """Visit the pairs (k, l) of a reference. No row exerts their forces: they are not shown."""
        among, relation = pairs.among(self.walk.request)
        walk = Walk(among, by_distance(pairs.distance), relation, buffers=_BLOCK_BUFFERS)
        for tile in walk.blocks():
            push = pairs.push(tile.rows, tile.closeness, tile.block.hidden)
            if walk.gradient is not None:
                walk.closeness.backward(push.neg_(), tile, walk.gradient)
        if walk.gradient is not None:
            self.of_columns, _ = walk.gradient.whole()

    def answer(self) -> Answer:
        counts = self.n_quadruplets if self.kept is None else self.counts
        answer = self.walk.answer(torch.where(self.n_quadruplets > 0, self.loss, 0), counts)
        if self.of_columns is not None and answer.db is not None:
            answer.db.add_(self.of_columns)
        return answer


@dataclass(eq=False)
class _Pairs:
    """The positive pairs, and the sums of their second terms.

    Attributes:
        anchor: (p,) int64, the row of each pair.
        positive: (p,) int64, its column.
        d: (p,) its distance.
        first_force: (p,) the force of its first terms, kept for observers.
        parts: the sums over second terms that count, each with the thresholds of all pairs, and of
            those of a class.
        classes: of the rows and columns.
        distance: between rows.
        rows: (n, d) as `between` takes them.
        columns: (m, d) likewise.
        between: (k, d) rows and (k, d) columns -> (k,) their distances.
        symmetric: whether a pair is as far apart from either end.
    """

    anchor: Tensor
    positive: Tensor
    d: Tensor
    first_force: Tensor
    parts: "list[tuple[Part, _Thresholds, _Thresholds]]"
    classes: Classes
    distance: Distance
    rows: Tensor
    columns: Tensor
    between: Callable[[Tensor, Tensor], Tensor]
    symmetric: bool

    @classmethod
    def of(cls, walk: Walk, classes: Classes, distance: Distance, margin: float) -> "_Pairs":
        request, (anchor, positive) = walk.request, classes.positive_pairs()
        a, b = request.aligned(walk.closeness)
        columns, between = a if b is None else b, partial(between_rows, distance=distance)
        if request.precision != "float32":  # of unit rows that are no longer of length 1
            between = partial(walk.closeness.between, precision=request.precision)
        d = a.new_zeros(len(anchor))
        for chunk in _chunks(len(anchor), a, request.limits):
            d[chunk] = between(a[anchor[chunk]], columns[positive[chunk]])
        weight = None if request.weight is None else request.weight[anchor]
        segment = classes.of_row[anchor]
        one_segment = torch.zeros_like(segment), torch.full_like(classes.size[:1], len(d))
        by_class = segment, torch.bincount(segment, minlength=len(classes.size))
        parts, several = [], parts_of(margin, request.kept)
        # What is left after a subtraction may be far smaller than the sums.
        wide = d.dtype if len(several) == 1 else sum_dtype(d)
        for part in several:
            threshold = thresholds(d.to(wide, copy=True), part)
            of_all = _Thresholds(threshold, *one_segment, weight)
            parts.append((part, of_all, _Thresholds(threshold, *by_class, weight)))
        none = torch.zeros_like(d)
        how = distance, a, columns, between, walk.closeness.symmetric
        return cls(anchor, positive, d, none, parts, classes, *how)

    def within(self, rows: slice) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The pairs whose anchor is among these rows, and their places in a block of these rows."""
        here = ((self.anchor >= rows.start) & (self.anchor < rows.stop)).nonzero()[:, 0]
        return here, (self.anchor[here] - rows.start, self.positive[here])

    def among(self, request: Request) -> tuple[Request, Relation]:
        """The columns with themselves, by the numbers of their classes."""
        of_column = self.classes.of_column
        m = len(of_column)
        relation = Relation(m, m, of_column.device, of_column, of_column, symmetric=True)
        return replace(request, a=request.columns, b=None, weight=None), relation

    def push_by_kernel(self, request: Request, closeness: Closeness) -> Tensor | None:
        """Compare all negative pairs with the thresholds; returns the gradient of the columns."""
        from nearfar.engine.gpu import quadruplets  # loads Triton

        total: Tensor | None = None
        among, relation = self.among(request)
        for part, all_pairs, by_class in self.parts:
            tables = all_pairs.segments(), by_class.segments()
            *found, pushed = quadruplets.push_pairs(among, closeness, relation, *tables)
            for table, below in zip((all_pairs, by_class), found, strict=True):
                table.count, table.sum, table.unit = below.count, below.sum, below.unit
            if pushed is not None:
                total = pushed if total is None else total.add_(pushed, alpha=part.sign)
        return total

    def push(self, rows: slice, d: Tensor, hidden: Tensor | None) -> Tensor:
        """(b, m) the push on a block of negative pairs by the positive pairs of other classes.

        A pair (k, l) is compared with all positive pairs except those of the classes of k and l.
        Where (l, k) are as far apart, the two classes contribute equally over all ordered pairs,
        so twice the contribution of k gives the same sums and gradient. Observers are shown the
        force of each pair as it is.
        """
        total = None
        for part, all_pairs, by_class in self.parts:
            one_segment = torch.zeros(1, 1, dtype=torch.long, device=d.device)
            push = all_pairs.add(d, one_segment, hidden)
            own_class = by_class.add(d, self.classes.of_column[rows, None], hidden)
            if self.symmetric and not force_visitors():
                push.sub_(own_class, alpha=2)
            else:
                add = by_class.push if self.symmetric else by_class.add
                push = push - own_class - add(d, self.classes.of_column[None, :], hidden)
            total = push if total is None else total.add_(push, alpha=part.sign)
        assert total is not None
        return total

    def finish_sums(self, kept: Between | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The sums over the second terms of each positive pair.

        Returns:
            (p,) the sum of those that count.
            (p,) int64, how many count; only with `kept`.
            (p,) int64, how many of them are not 0.
            (p,) the derivative of the sum by the distance of the pair, in the gradient's weights.
        """
        (loss, counts, active), *rest = (self._finished(*part, kept) for part in self.parts)
        for less, fewer, fewer_active in rest:
            loss, counts, active = loss - less, counts - fewer, active - fewer_active
        weight = self.parts[0][1].weight
        pull = (active if weight is None else active * weight).to(self.d.dtype)
        return in_range(loss, counts, kept), counts, active, pull

    def _finished(
        self, part: Part, all_pairs: "_Thresholds", by_class: "_Thresholds", kept: Between | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The sum, the number that counts, and the number of those that are not 0, of one part."""
        active, distances = all_pairs.finish_sums()
        in_class, distances_in_class = by_class.finish_sums()
        times = 2 if self.symmetric else 1  # else both classes were added
        active, distances = active - times * in_class, distances - times * distances_in_class
        loss = all_pairs.threshold.to(distances.dtype) * active - distances
        if part.start:
            loss += part.start * active.to(loss.dtype)
        every = part.every and kept is not None
        counts = self.classes.pairs[self.classes.of_row[self.anchor]] if every else active
        return loss, counts, active


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
        self.unit: Tensor | None = None  # of the sums, where they are whole numbers

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
        for total in (self.count, self.sum):
            until = torch.cat([total.new_zeros(1), total.cumsum(0)])
            within = until[bucket + 1] - until[before]
            found.append(torch.empty_like(within).scatter_(0, self.order, within))
        count, values = found
        return count, values if self.unit is None else values * self.unit

    def segments(self) -> "Segments":
        """The tables as a kernel takes them."""
        from nearfar.engine.gpu.quadruplets import Segments  # loads Triton

        until = None if self.weight is None else self.until
        return Segments(self.table, until, self.start, self.stop, self.longest)

    def _place(self, d: Tensor, segment: Tensor, hidden: Tensor | None) -> Tensor:
        stop = self.stop[segment]
        place = look_up(self.table, d, self.start[segment], stop, self.longest)
        return place if hidden is None else torch.where(hidden, stop.to(place.dtype), place)

    def _beyond(self, place: Tensor, segment: Tensor) -> Tensor:
        whole = self.until[self.stop[segment]]
        return whole - self.until.index_select(0, place.flatten()).view(place.shape)


def hardest_quadruplets(classes: Classes, relation: Relation, distance: Distance) -> Picker:
    """For each anchor: itself, its farthest positive, its nearest negative, and a pair of others.

    The others are the closest pair of two different classes that are not the anchor's.
    """
    of_column = classes.of_column
    m, enough = len(of_column), int((classes.size > 0).sum()) > 2
    among = Relation(m, m, of_column.device, of_column, of_column, symmetric=True)

    def pick(a: Tensor, b: Tensor | None, limits: Limits, precision: Precision) -> Iterator[Tensor]:
        if not enough:
            return
        closeness, a, b = order_preserving(distance, a, b, precision)
        hardest, nearest = [], []
        for tile in walk(closeness, relation, a, b, limits, precision):
            d, anchors = tile.closeness, Anchors.of(tile.block)
            positive = anchors.extreme(d, farthest=True)
            two = _two_nearest(d, anchors, of_column)
            hardest.append((positive, two[0], anchors.count > 0))
            nearest.append(two)
        if b is not None:
            tiles = walk(closeness, among, b, None, limits, precision)
            nearest = [
                _two_nearest(tile.closeness, Anchors.of(tile.block), of_column) for tile in tiles
            ]
        if not hardest:
            return
        positive, negative, valid = map(torch.cat, zip(*hardest, strict=True))
        second = _closest_pairs(classes, *map(torch.cat, zip(*nearest, strict=True)))
        anchor = torch.arange(a.shape[0], device=a.device)
        yield torch.stack([anchor, positive, negative, *second], 1)[valid]

    def on_gpu(request: Request) -> Tensor:
        from nearfar.engine.gpu import tuples  # loads Triton

        closeness, columns = by_distance(distance), replace(request, a=request.columns, b=None)
        if not enough:
            return of_column.new_zeros(0, 5)
        picked = tuples.hardest(request, closeness, relation, easy_positive=False)
        second = _closest_pairs(classes, *tuples.two_nearest(columns, closeness, among))
        return torch.cat([picked, torch.stack(second, 1)], 1)[picked[:, 1] >= 0]

    return Picker(pick, on_gpu)


def _two_nearest(
    d: Tensor, anchors: Anchors, classes: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The nearest negative of each row and the nearest of a third class, and their distances.

    Overwrites the distances.
    """
    d_one, one = anchors.mask_non_negatives(d).min(1)
    d.masked_fill_(classes[one][:, None] == classes, torch.inf)  # leaves third classes
    d_two, two = d.min(1)
    return one, two, d_one, d_two


def _closest_pairs(
    classes: Classes, one: Tensor, two: Tensor, d_one: Tensor, d_two: Tensor
) -> tuple[Tensor, Tensor]:
    """(n,), (n,) the closest pair of columns of two classes other than the row's own.

    This is the closest pair of all for every row of a third class.

    Args:
        classes: of the rows and columns.
        one: (m,) of each column, the nearest column of another class.
        two: (m,) the nearest of a third class.
        d_one: (m,) the distance of the first.
        d_two: (m,) that of the second.
    """
    of_column = classes.of_column
    k = int(d_one.argmin())
    first, second = torch.full_like(classes.of_row, k), one[k].expand_as(classes.of_row).clone()
    for of_pair in (of_column[k], of_column[one[k]]):
        partner = torch.where(of_column[one] == of_pair, two, one)
        d = torch.where(of_column[one] == of_pair, d_two, d_one)
        best = d.masked_fill(of_column == of_pair, torch.inf).argmin()
        here = classes.of_row == of_pair
        first[here], second[here] = best, partner[best]
    return first, second


def _chunks(n: int, a: Tensor, limits: Limits) -> Iterator[slice]:
    return spans(n, block(limits, a.device, a.element_size(), _BUFFERS, a.shape[1]))


def _pull(
    pairs: _Pairs, to: tuple[Tensor, Tensor], index: tuple[Tensor, Tensor], force: Tensor
) -> None:
    """Add to `to` the gradient of sum(force * distance) of listed pairs of rows and columns."""
    ends = pairs.rows, pairs.columns
    x, y = (t[i].requires_grad_() for t, i in zip(ends, index, strict=True))
    with torch.enable_grad():
        apart = pairs.between(x, y)
    found = torch.autograd.grad(apart, (x, y), force)
    for of_rows, i, gradient in zip(to, index, found, strict=True):
        add_rows(of_rows, i, gradient)
