"""Losses of triplets and quadruplets on a GPU, by kernels that keep no tile.

A program owns some rows and walks over all columns, and nothing is added in an order that could
change. No value is read on the host.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nearfar.engine.budget import budget_of
from nearfar.engine.closeness import Closeness
from nearfar.engine.gpu.comparison import Comparison, Grid
from nearfar.engine.gpu.kernels import tuples as kernels
from nearfar.engine.gpu.kernels.tile import Side
from nearfar.engine.gpu.kernels.tuples import Anchors, Run
from nearfar.engine.gpu.language import kernel
from nearfar.engine.listed_tuples import Tally
from nearfar.engine.relation import Relation
from nearfar.engine.step import Answer, Request
from nearfar.reduction import ACTIVE

# The thresholds of all anchors, and the pulls on their positives, take this share of the budget.
_SHARE = 4


def hardest(
    request: Request, closeness: Closeness, relation: Relation, *, easy_positive: bool
) -> Tensor:
    """(n, 3) each anchor, its farthest or nearest positive, and its nearest negative; -1: none."""
    compared = Comparison(request, closeness, relation)
    positive, (negative, _) = _extremes(compared, positives=True, farthest=not easy_positive)
    anchor = torch.arange(relation.n, device=relation.device)
    return torch.stack([anchor, positive, negative], 1)


def two_nearest(
    request: Request, closeness: Closeness, relation: Relation
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(n,) the nearest negative of each row, the nearest of a third class, and their distances."""
    compared = Comparison(request, closeness, relation)
    assert relation.column_labels is not None
    _, (one, d_one) = _extremes(compared)
    _, (two, d_two) = _extremes(compared, relation.column_labels[one.clamp(min=0)])
    return one, two, d_one, d_two


def _extremes(
    compared: Comparison,
    avoided: Tensor | None = None,
    *,
    positives: bool = False,
    farthest: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The farthest or nearest positive, and the nearest negative, of each row.

    Args:
        compared: the rows.
        avoided: (n,) a class of which no negative is taken.
        positives: whether the first is wanted; else it is empty.
        farthest: which positive.

    Returns:
        (n,) int64, the positives, -1 for none.
        (n,) int64 and (n,), the negatives likewise, and their distances, inf for none.
    """
    own = compared.rows
    grid = compared.grid("collect", own, compared.columns)
    values = own.operand.new_empty(2, grid.parts, own.count, dtype=torch.float32)
    places = torch.full_like(values, -1, dtype=torch.int32)
    near = (values[0], places[0]) if positives else (None, None)
    compared.launch(
        kernels.extremes,
        grid,
        *(own, compared.columns, avoided, *near, values[1], places[1]),
        *(compared.d, compared.words, grid.split),
        FARTHEST=farthest,
    )
    best = values.argmax(1, keepdim=True)  # of equal ones the first part
    at = places.gather(1, best)[:, 0].long()
    return at[0], (at[1], -values[1].gather(0, best[1])[0])


@dataclass(eq=False)
class Triplets:
    """The triplets of each anchor.

    Attributes:
        loss: (n,) float64, the sums of the losses that count.
        number: (n,) int64, how many of them count; without a range, how many are not 0.
        da, db: the gradients of rows and columns; None: not wanted, or the columns are the rows.
    """

    loss: Tensor
    number: Tensor
    da: Tensor | None
    db: Tensor | None


def every_triplet(
    request: Request,
    closeness: Closeness,
    relation: Relation,
    margin: float,
    smooth: bool,
    tally: Tally,
) -> Answer:
    """All triplets of each anchor; `tally` counts them, and those with a loss that is not 0."""
    valid = relation.n_positives() * relation.n_negatives()
    term = "softplus_and_slope" if smooth else "hinge"
    sums = triplets(request, closeness, relation, margin, term)
    tally.add(valid.sum(), (valid if smooth else sums.number).sum())
    counts = valid if request.kept is None else sums.number
    return Answer(sums.loss.where(valid > 0, 0), counts, sums.da, sums.db)


def triplets(
    request: Request,
    closeness: Closeness,
    relation: Relation,
    margin: float,
    term: str,
    *,
    thirds: bool = False,
) -> Triplets:
    """The sums over all triplets of each anchor.

    Args:
        request: what is asked.
        closeness: by which rows are compared.
        relation: by class ids.
        margin: how much farther a negative must be than a positive.
        term: of `kernels/terms.py`, the loss of a violation of the margin.
        thirds: whether a triplet counts once for each column of a third class.
    """
    classes = _ByClass(request, relation)
    compared = Comparison(classes.request, closeness, classes.relation)
    work = _Work(compared, classes, margin, term, thirds)
    for base in range(0, relation.m, work.slots):
        work.take(base)
    back, columns_back = classes.rows.argsort(), classes.columns.argsort()
    da, db = work.gradients
    return Triplets(
        work.loss[back],
        work.number[back],
        None if da is None else da[back],
        None if db is None else db[columns_back],
    )


class _ByClass:
    """Rows and columns sorted by class.

    Attributes:
        rows: (n,) the rows in this order; columns: (m,) likewise.
        request, relation: of the sorted rows and columns.
        of_rows: where the columns of the class of each row are.
        of_columns: where the rows of the class of each column are.
    """

    def __init__(self, request: Request, relation: Relation) -> None:
        assert relation.row_labels is not None
        assert relation.column_labels is not None
        labels, self.rows = relation.row_labels.sort(stable=True)
        others, self.columns = labels, self.rows
        if request.b is not None:
            others, self.columns = relation.column_labels.sort(stable=True)
        own = relation.declared
        if own is not None:
            place = self.columns.argsort()[own.clamp(min=0)]
            own = place.where(own >= 0, -1)[self.rows]
        self.relation = replace(relation, row_labels=labels, column_labels=others, declared=own)
        self.request = replace(
            request,
            a=request.a[self.rows],
            b=None if request.b is None else request.b[self.columns],
            weight=None if request.weight is None else request.weight[self.rows],
        )
        self.of_rows = _runs(labels, others)
        self.of_columns = self.of_rows if request.b is None else _runs(others, labels)


def _runs(labels: Tensor, others: Tensor) -> Run:
    """Where each of some classes is among others, both ascending."""
    first = torch.searchsorted(others, labels)
    size = torch.searchsorted(others, labels, right=True) - first
    return Run(first.to(torch.int32), size.to(torch.int32))


class _Work:
    """Sums over all triplets, some positives of each anchor after the others; see `triplets`."""

    def __init__(
        self, compared: Comparison, classes: _ByClass, margin: float, term: str, thirds: bool
    ) -> None:
        request, new = compared.request, compared.rows.operand.new_zeros
        self.compared, self.classes, self.margin, self.term = compared, classes, margin, term
        n, m, d = compared.rows.count, compared.columns.count, compared.d
        entries = budget_of(request.limits, request.a.device) // (_SHARE * 2 * 4)
        self.slots = min(m, max(1, entries // max(n, 1)))
        planes = new(2, self.slots, n, dtype=torch.float32)
        weight = torch.ones_like(request.a[:, 0]) if request.weight is None else request.weight
        self.anchors = Anchors(classes.of_rows, planes[0], planes[1], weight.to(torch.float32))
        self.most = classes.of_rows.size.amax()
        self.loss, self.number = new(n, dtype=torch.float64), new(n, dtype=torch.int64)
        self.gradients: list[Tensor | None] = [None, None]
        if request.gradient:
            mirrored = compared.mirrored
            self.gradients = [
                new(n, d, dtype=torch.float32),
                None if mirrored else new(m, d, dtype=torch.float32),
            ]
        # A hinge is active where its slope is not 0, which are counted anyway.
        kept = None if term == "hinge" and request.kept == ACTIVE else request.kept
        self.range = (0.0, 0.0) if kept is None else (kept.low, kept.high)
        self.settings: dict[str, Any] = {"term": kernel(term), "KEPT": kept is not None}
        self.thirds = thirds

    @cached_property
    def _thirds(self) -> tuple[Tensor | None, Tensor | None]:
        """How many columns are of the class of each row, and of each column."""
        if not self.thirds:
            return None, None
        labels = self.compared.columns.labels
        return self.classes.of_rows.size, _runs(labels, labels).size

    def take(self, base: int) -> None:
        """Take the slots from `base` on."""
        compared, anchors = self.compared, self.anchors
        rows, columns = compared.rows, compared.columns
        common = compared.d, compared.words, base, self.slots
        grid = compared.whole_grid("collect", rows)
        compared.launch(kernels.set_thresholds, grid, rows, columns, anchors, *common, self.margin)
        da, db = self.gradients
        self._push(rows, columns, (anchors, anchors if compared.mirrored else None), da, common)
        if db is not None:
            self._push(columns, rows, (None, anchors), db, common)
        if da is not None:
            both = anchors, anchors if compared.mirrored else None
            self._pull(rows, columns, self.classes.of_rows, both, da, common)
        if db is not None:
            self._pull(columns, rows, self.classes.of_columns, (None, anchors), db, common)

    def _push(
        self,
        own: Side,
        other: Side,
        anchors: tuple[Anchors | None, Anchors | None],
        out: Tensor | None,
        common: tuple[int, ...],
    ) -> None:
        flipped = anchors[0] is None
        thirds = self._thirds[::-1] if flipped else self._thirds
        self.compared.launch(
            kernels.push,
            self._grid(own),
            *(own, other, *anchors, *thirds, self.most),
            *(self.loss, self.number, out, *common, *self.range),
            **self.settings,
            FLIPPED=flipped,
        )

    def _pull(
        self,
        own: Side,
        other: Side,
        run: Run,
        anchors: tuple[Anchors | None, Anchors | None],
        out: Tensor,
        common: tuple[int, ...],
    ) -> None:
        self.compared.launch(
            kernels.pull,
            self._grid(own),
            *(own, other, run, *anchors, self.most, out, *common),
            FLIPPED=anchors[0] is None,
        )

    def _grid(self, own: Side) -> Grid:
        return self.compared.whole_grid("pull", own, self.compared.width // self.compared.chunk)
