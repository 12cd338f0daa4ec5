"""Losses of triplets and quadruplets on a GPU, by kernels that keep no tile.

A program owns some rows and walks over all columns, and nothing is added in an order that could
change. No value is read on the host.
"""

from dataclasses import dataclass, replace
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

# What is kept of each positive of each anchor, in so many numbers, takes this share of the budget.
_SHARE, _PLANES = 4, 4


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
    grid = compared.grid("nearest", own, compared.columns)
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
    work = _Work(request, closeness, relation, "softplus_and_slope" if smooth else "hinge")
    for base in work.bases:
        work.set_thresholds(base, margin)
        work.push(base)
        work.pull(base)
    return work.answer(valid, smooth, tally)


@dataclass(eq=False)
class FirstTerms:
    """The first terms of the quadruplets of each anchor.

    Attributes:
        loss: (n,) float64, the sums of those that count.
        number: (n,) int64, how many count; without a range, how many are not 0.
        da, db: the gradients of rows and columns; None: not wanted, or the columns are the rows.
    """

    loss: Tensor
    number: Tensor
    da: Tensor | None
    db: Tensor | None


def first_terms(
    request: Request, closeness: Closeness, relation: Relation, margin: float
) -> FirstTerms:
    """All triplets, each once for each column of a class that is neither of its two."""
    work = _Work(request, closeness, relation, "hinge")
    of_rows, labels = work.classes.of_rows, work.compared.columns.labels
    thirds = of_rows.size, of_rows.size if request.b is None else _runs(labels, labels).size
    for base in work.bases:
        work.set_thresholds(base, margin)
        work.push(base, thirds)
        work.pull(base)
    return FirstTerms(*work.in_order())


def semihard(
    request: Request,
    closeness: Closeness,
    relation: Relation,
    margin: float,
    smooth: bool,
    tally: Tally,
) -> Answer:
    """For each anchor and positive the triplet with the nearest negative beyond the positive."""
    valid = relation.n_positives() * (relation.n_negatives() > 0)
    work = _Work(request, closeness, relation, "softplus_and_slope" if smooth else "hinge")
    far = torch.empty_like(work.anchors.threshold)
    places = torch.empty_like(far, dtype=torch.int32)
    for base in work.bases:
        work.set_thresholds(base, 0.0)
        work.find_beyond(base, margin, far, places)
        work.push_chosen(base, places)
        work.pull(base)
    return work.answer(valid, smooth, tally)


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
        by_class = replace(relation, row_labels=labels, column_labels=others, declared=own)
        self.relation = replace(by_class, first=None)
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


# The rows that programs own and the others, where the classes of the former are among the latter,
# and what is known of each as anchors; None: they are none.
_Sides = tuple[Side, Side, Run, Anchors | None, Anchors | None]


class _Work:
    """Sums over triplets, for some positives of each anchor after the others.

    Args:
        request: what is asked.
        closeness: by which rows are compared.
        relation: by class ids.
        term: of `kernels/terms.py`, the loss of a violation of the margin.

    Attributes:
        anchors: the positives of the anchors, `slots` at a time.
        bases: the first slot of each time. Where classes are smaller, there is nothing to do.
        loss: (n,) float64, the sums of the losses that count, sorted by class.
        number: (n,) int64, how many count; without a range, how many are not 0.
    """

    def __init__(
        self, request: Request, closeness: Closeness, relation: Relation, term: str
    ) -> None:
        self.classes = classes = _ByClass(request, relation)
        self.compared = compared = Comparison(classes.request, closeness, classes.relation)
        new, n, m = compared.rows.operand.new_zeros, relation.n, relation.m
        self.slots = _slots(request, n, m)
        self.bases = range(0, m, self.slots)
        planes = new(2, self.slots, n, dtype=torch.float32)
        weight = classes.request.weight
        weight = torch.ones_like(planes[0, 0]) if weight is None else weight.to(planes.dtype)
        self.anchors = Anchors(classes.of_rows, planes[0], planes[1], weight)
        rows, columns, both = compared.rows, compared.columns, compared.mirrored
        of_columns = self.anchors if both else None
        self.sides: list[_Sides] = [(rows, columns, classes.of_rows, self.anchors, of_columns)]
        if request.gradient and not both:
            self.sides.append((columns, rows, classes.of_columns, None, self.anchors))
        self.names = classes.columns.to(torch.int32)
        self.most = classes.of_rows.size.amax()
        self.loss, self.number = new(n, dtype=torch.float64), new(n, dtype=torch.int64)
        self.gradients = [
            new(own.count, compared.d, dtype=torch.float32) if request.gradient else None
            for own, *_ in self.sides
        ]
        # A hinge is active where its slope is not 0, which are counted anyway.
        kept = None if term == "hinge" and request.kept == ACTIVE else request.kept
        self.range = (0.0, 0.0) if kept is None else (kept.low, kept.high)
        self.settings: dict[str, Any] = {"term": kernel(term), "KEPT": kept is not None}

    def set_thresholds(self, base: int, margin: float) -> None:
        """Measure the positives."""
        compared = self.compared
        grid = compared.whole_grid("nearest", compared.rows)
        sides = compared.rows, compared.columns
        compared.launch(kernels.set_thresholds, grid, *sides, self.anchors, *self._at(base), margin)

    def push(self, base: int, thirds: tuple[Tensor | None, Tensor | None] = (None, None)) -> None:
        """Compare all negatives with the thresholds; see `kernels.push`.

        Args:
            base: the first slot.
            thirds: how many columns are of the class of each row, and of each column, where a
                triplet counts once for each column of a third class.
        """
        for (own, other, _, of_own, of_other), out in zip(self.sides, self.gradients, strict=True):
            self.compared.launch(
                kernels.push,
                self._grid(own),
                *(own, other, of_own, of_other),
                *(thirds if of_own is not None else thirds[::-1]),
                *(self.most, self.loss, self.number, out, *self._at(base), *self.range),
                **self.settings,
                FLIPPED=of_own is None,
            )

    def find_beyond(self, base: int, margin: float, far: Tensor, places: Tensor) -> None:
        """Choose the nearest negative beyond each positive; see `kernels.beyond`."""
        compared = self.compared
        compared.launch(
            kernels.beyond,
            compared.whole_grid("nearest", compared.rows),
            *(compared.rows, compared.columns, self.anchors, self.names, far, places),
            *(self.most, self.loss, self.number, *self._at(base), margin, *self.range),
            **self.settings,
        )

    def push_chosen(self, base: int, places: Tensor) -> None:
        """The gradient of the chosen negatives."""
        for (own, other, _, *of), out in zip(self.sides, self.gradients, strict=True):
            if out is not None:
                sides = own, other, *of
                rest = self.names, places, self.most, out, *self._at(base)
                flipped = of[0] is None
                self.compared.launch(
                    kernels.push_chosen, self._grid(own), *sides, *rest, FLIPPED=flipped
                )

    def pull(self, base: int) -> None:
        """The gradient of the positives."""
        for (own, other, run, *of), out in zip(self.sides, self.gradients, strict=True):
            if out is not None:
                sides = own, other, run, *of
                rest = self.most, out, *self._at(base)
                flipped = of[0] is None
                self.compared.launch(kernels.pull, self._grid(own), *sides, *rest, FLIPPED=flipped)

    def in_order(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Losses, numbers and the gradients of both sides, in the order of the batch."""
        back, columns_back = self.classes.rows.argsort(), self.classes.columns.argsort()
        da, db = (*self.gradients, None)[:2]
        of_rows = None if da is None else da[back]
        of_columns = None if db is None else db[columns_back]
        return self.loss[back], self.number[back], of_rows, of_columns

    def answer(self, valid: Tensor, smooth: bool, tally: Tally) -> Answer:
        """What the step is told; `valid` (n,) is how many triplets there are."""
        loss, number, da, db = self.in_order()
        tally.add(valid.sum(), (valid if smooth else number).sum())
        counts = valid if self.compared.request.kept is None else number
        return Answer(loss.where(valid > 0, 0), counts, da, db)

    def _at(self, base: int) -> tuple[int, int, int, int]:
        return self.compared.d, self.compared.words, base, self.slots

    def _grid(self, own: Side) -> Grid:
        return self.compared.whole_grid("push", own, self.compared.width // self.compared.chunk)


def _slots(request: Request, n: int, m: int) -> int:
    """How many positives of each anchor are taken at a time, so that none is read on the host."""
    entries = budget_of(request.limits, request.a.device) // (_SHARE * _PLANES * 4)
    return min(m, max(1, entries // n))
