"""Every triplet of a batch, its negative measured from the anchor or the positive.

Whichever is nearer to the negative counts, so a triplet takes three distances. A block of anchors
is measured against all columns, and so are the positives of its rows. For each pair of an anchor
and a positive, two rows of these tiles give the distances of all its triplets: O(n^2 p) time for p
positives per row, and two products more than without the swap. Where the rows of a class follow
each other, a block has few positives that are not its own rows, so rows are sorted by class first.
"""

from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nearfar.engine.anchors import Anchors
from nearfar.engine.closeness import Closeness, Tile
from nearfar.engine.listed_tuples import Tally
from nearfar.engine.products import Gradient
from nearfar.engine.relation import Block, Relation
from nearfar.engine.slices import add_rows, spans
from nearfar.engine.step import Answer, Executor, Request
from nearfar.engine.walk import Walk
from nearfar.reduction import sum_dtype

# Copies of a block held at the same time: the distances and forces of anchors and of positives, and
# what the triplets of some pairs take.
_BUFFERS = 16


def every_swapped(
    closeness: Closeness,
    relation: Relation,
    margin: float,
    smooth: bool,
    tally: Tally,
) -> Executor:
    """All triplets of each anchor; `tally` counts them, and those with a non-zero loss."""

    def execute(request: Request) -> Answer:
        order, sorted_request, sorted_relation = _by_class(request, relation)
        walk = Walk(sorted_request, closeness, sorted_relation, buffers=_BUFFERS)
        sums = _Sums(walk, margin, smooth)
        for tile in walk.blocks():
            sums.add(tile)
        tally.add(sums.valid.sum(), sums.active.sum())
        answer = walk.answer(sums.loss, sums.valid if request.kept is None else sums.kept)
        return _in_order(answer, sums.of_columns, order, whole=request.b is None)

    return execute


def _by_class(request: Request, relation: Relation) -> tuple[Tensor, Request, Relation]:
    """The rows as anchors sorted by class, against columns that stay as they are."""
    labels = relation.row_labels
    assert labels is not None
    order = torch.arange(relation.n, device=relation.device)
    if labels.ndim == 1:
        order = labels.argsort(stable=True)
    weight = None if request.weight is None else request.weight[order]
    rows = replace(request, a=request.a[order], b=request.columns, weight=weight, finish=None)
    own = None if relation.own is None else relation.own[order]
    by_class = replace(relation, row_labels=labels[order], declared=own, symmetric=False)
    return order, rows, replace(by_class, first=None)


def _in_order(answer: Answer, of_columns: Tensor, order: Tensor, *, whole: bool) -> Answer:
    """The answer in the order of the batch; `whole`: the columns are the rows."""
    place = order.argsort()
    assert isinstance(answer.counts, Tensor)
    per_row, counts, da, db = answer.per_row[place], answer.counts[place], answer.da, answer.db
    if da is None or db is None:
        return Answer(per_row, counts)
    da, db = da[place], db.add_(of_columns)
    return Answer(per_row, counts, da.add_(db)) if whole else Answer(per_row, counts, da, db)


@dataclass(eq=False)
class _Positives:
    """Some columns as positives, with the distances and forces between them and all columns.

    Attributes:
        index: (c,) int64, which columns.
        rows: (c, d) these columns.
        tile: their distances to all columns.
        force: (c, m) the derivative of the loss with respect to these; None: not wanted.
    """

    index: Tensor
    rows: Tensor
    tile: Tile
    force: Tensor | None

    @classmethod
    def of(cls, walk: Walk, index: Tensor) -> "_Positives":
        rows, columns = walk.columns[index], walk.columns
        bound, precision = walk.request.bound, walk.request.precision
        d, repaired = walk.closeness.measure(rows, columns, bound, precision=precision)
        places = slice(0, d.shape[0]), slice(0, d.shape[1])
        block = Block((d.shape[0], d.shape[1]), None, None, d.device)
        force = None if walk.gradient is None else torch.zeros_like(d)
        return cls(index, rows, Tile(*places, block, d, repaired), force)

    def pull(self, walk: Walk, of_columns: Tensor) -> None:
        """Add the gradient of the forces to that of all columns."""
        if self.force is not None:
            precision = walk.request.precision
            gradient = Gradient(self.rows, walk.columns, precision=precision)
            walk.closeness.backward(self.force, self.tile, gradient)
            da, db = gradient.whole()
            assert da is not None
            assert db is not None
            add_rows(of_columns.add_(db), self.index, da)


class _Sums:
    """The sums over all triplets of each anchor, and the gradient of the columns as positives."""

    def __init__(self, walk: Walk, margin: float, smooth: bool) -> None:
        self.walk, self.margin, self.smooth = walk, margin, smooth
        n = walk.a.shape[0]
        self.loss = walk.a.new_zeros(n, dtype=sum_dtype(walk.a))
        counts = torch.zeros(3, n, dtype=torch.int64, device=walk.a.device)
        self.valid, self.active, self.kept = counts
        self.of_columns = torch.zeros_like(walk.columns)

    def add(self, tile: Tile) -> None:
        """Add all triplets of a block of anchors."""
        anchors, size = Anchors.of(tile.block), tile.closeness.shape[0]
        self.valid[tile.rows] = anchors.count * anchors.n_negatives
        if not anchors.most:
            return
        force = None if self.walk.gradient is None else torch.zeros_like(tile.closeness)
        columns, place = torch.unique(anchors.column, return_inverse=True)
        for at in spans(len(columns), size):
            positives = _Positives.of(self.walk, columns[at])
            (pairs,) = ((place >= at.start) & (place < at.stop)).nonzero(as_tuple=True)
            for some in spans(len(pairs), size):
                pair = pairs[some]
                where = anchors.row[pair], anchors.column[pair], place[pair] - at.start
                self._add_pairs(tile, positives, force, *where)
            positives.pull(self.walk, self.of_columns)
        if force is not None:
            self.walk.pull(tile, force)

    def _add_pairs(
        self,
        tile: Tile,
        positives: _Positives,
        force: Tensor | None,
        row: Tensor,
        column: Tensor,
        place: Tensor,
    ) -> None:
        """Add the triplets of some pairs of an anchor and a positive.

        Args:
            tile: the block of anchors.
            positives: among them those of the pairs.
            force: (b, m) the forces of the anchors, which change; None: not wanted.
            row: (k,) the row of each anchor in the block.
            column: (k,) the column of each positive.
            place: (k,) its place among `positives`.
        """
        assert tile.block.hidden is not None
        to_anchor, to_positive = tile.closeness[row], positives.tile.closeness[place]
        threshold = tile.closeness[row, column] + self.margin
        violation = threshold[:, None] - torch.minimum(to_anchor, to_positive)
        hidden, anchor = tile.block.hidden[row], row + tile.rows.start
        violation.masked_fill_(hidden, -inf)
        loss = -logsigmoid(-violation) if self.smooth else violation.relu()
        kept = self.walk.request.kept
        outside = None if kept is None else kept.outside(loss).logical_or_(hidden)
        if outside is not None:
            loss.masked_fill_(outside, 0)
            self.kept.index_add_(0, anchor, (~outside).sum(1))
        add_rows(self.loss, anchor, loss.sum(1, dtype=self.loss.dtype))
        self.active.index_add_(0, anchor, (loss > 0).sum(1))
        if force is None or positives.force is None:
            return
        slope = violation.sigmoid_() if self.smooth else violation.gt(0).to(loss.dtype)
        if outside is not None:
            slope.masked_fill_(outside, 0)
        if self.walk.request.weight is not None:
            slope *= self.walk.request.weight[anchor, None]
        force[row, column] = slope.sum(1)
        # Each of two equal distances has half of the force.
        of_positive = to_anchor.sub_(to_positive).sign_().add_(1).div_(2).mul_(slope)
        add_rows(positives.force, place, of_positive, -1)
        add_rows(force, row, slope.sub_(of_positive), -1)
