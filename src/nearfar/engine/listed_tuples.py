"""Losses of listed tuples of rows.

A picker goes through blocks of the batch and yields tuples as indices. Their losses and gradients
are computed from the rows, one chunk of tuples at a time. Memory is linear in the batch, whatever
the number of tuples, and gradients are always added in the same order.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.linalg import vecdot

from nearfar.distance import Distance, length
from nearfar.engine import gpu
from nearfar.engine.budget import Limits, block
from nearfar.engine.closeness import (
    Closeness,
    Tile,
    by_distance,
    cosine_of_difference,
)
from nearfar.engine.observe import force_visitors
from nearfar.engine.precision import Precision
from nearfar.engine.relation import Relation
from nearfar.engine.slices import add_rows, spans
from nearfar.engine.step import Answer, Executor, Request
from nearfar.engine.walk import show
from nearfar.engine.where import kernels_run_on
from nearfar.reduction import Between


@dataclass(frozen=True)
class Picker:
    """Selects tuples, (t, k) int64 each. The anchor comes first and is a row; others are columns.

    Attributes:
        by_blocks: rows, columns (None: the rows themselves), limits, the precision of products ->
            tuples, in parts.
        on_gpu: a request -> tuples at once, -1 in the place of a row that an anchor does not have;
            None: it has no kernel.
    """

    by_blocks: Callable[[Tensor, Tensor | None, Limits, Precision], Iterator[Tensor]]
    on_gpu: Callable[[Request], Tensor] | None = None


# Copies of the rows of a tuple held at the same time: rows, differences, gradients.
_BUFFERS = 4


@dataclass(eq=False)
class Tally:
    """How many terms a loss has, and how many of them are non-zero.

    An executor fills it while it runs; the numbers stay on the device.
    """

    valid: Tensor | int = 0
    active: Tensor | int = 0

    def add(self, valid: Tensor | int, active: Tensor | int) -> None:
        self.valid, self.active = self.valid + valid, self.active + active


@dataclass(eq=False)
class TupleRule:
    """A loss on tuples.

    Attributes:
        pairs: the places in the tuple whose distances the loss takes.
        loss: (t,) distances of each pair -> (t,) losses, 0 or more, in plain torch.
    """

    pairs: Sequence[tuple[int, int]]
    loss: Callable[..., Tensor]

    @property
    def places(self) -> int:
        """How many rows a tuple has."""
        return 1 + max(map(max, self.pairs))


def listed(
    rule: TupleRule,
    pick: Picker,
    distance: Distance,
    relation: Relation,
    tally: Tally,
) -> Executor:
    """Select tuples, by a kernel or block by block, and add up their losses and gradients."""

    def execute(request: Request) -> Answer:
        a, b = request.aligned(by_distance(distance))
        columns, each = a if b is None else b, request.each_pair
        per_row, one_by_one = a.new_zeros(len(a)), [a.new_zeros(0)]
        counts, active = per_row.new_zeros(2, len(a), dtype=torch.int64)
        da = torch.zeros_like(a) if request.gradient else None
        db = torch.zeros_like(columns) if request.gradient and request.b is not None else None
        shown, measure = _Shown(), _measure(distance)
        with torch.no_grad():
            width = rule.places * a.shape[1]
            size = block(request.limits, a.device, a.element_size(), _BUFFERS, width)
            for at, found in _chunks(_found(pick, request, distance, relation), size):
                tuples, absent = _whole(found, request)
                anchor, weight = tuples[:, 0], request.weight
                if weight is not None:
                    weight = weight[at] if each else weight[anchor]
                rows = [a[anchor], *(columns[other] for other in tuples.T[1:])]
                loss, inside, pulls, between = _derived(
                    rule, measure, rows, weight, request, absent
                )
                if each:
                    one_by_one.append(loss)
                else:
                    add_rows(per_row, anchor, loss)
                counts.index_add_(0, anchor, inside)
                active.index_add_(0, anchor, (loss > 0).long())
                if da is None:
                    continue
                for ends, both in zip(rule.pairs, pulls, strict=True):
                    for place, (pull, by) in zip(ends, both, strict=True):
                        to = da if place == 0 or db is None else db
                        add_rows(to, tuples[:, place], pull, by)
                if force_visitors():
                    shown.add(rule, tuples, between, request.b is None)
        shown.show(request, relation)
        tally.add(counts.sum(), active.sum())
        losses = torch.cat(one_by_one) if each else per_row
        return Answer(losses, counts, da, db, each_pair=each)

    return execute


def given(tuples: Tensor) -> Picker:
    """Tuples (t, k) that the caller lists, in their order."""
    return Picker(lambda a, b, limits, precision: iter([tuples]))


def _found(
    pick: Picker, request: Request, distance: Distance, relation: Relation
) -> Iterator[Tensor]:
    """What a picker selects."""
    if (
        pick.on_gpu is not None
        and relation.m
        and gpu.takes(request, by_distance(distance), relation)
    ):
        return iter([pick.on_gpu(request)])
    return pick.by_blocks(request.a, request.b, request.limits, request.precision)


def _whole(found: Tensor, request: Request) -> tuple[Tensor, Tensor | None]:
    """Tuples of rows that there are, and (t,) bool, which are not to count; None: all count."""
    if not kernels_run_on(request.a.device):  # a picker without a kernel finds nothing incomplete
        return found, None
    return found.clamp(min=0), found.amin(1) < 0


def _chunks(found: Iterator[Tensor], size: int) -> Iterator[tuple[slice, Tensor]]:
    """The same tuples, at most `size` at a time, and which of all these are."""
    before = 0
    for tuples in _batched(found, size):
        for chunk in spans(len(tuples), size):
            yield slice(before + chunk.start, before + chunk.stop), tuples[chunk]
        before += len(tuples)


def _batched(found: Iterator[Tensor], size: int) -> Iterator[Tensor]:
    """The same tuples, at least `size` at a time: a block may have very few."""
    waiting: list[Tensor] = []
    for tuples in found:
        waiting.append(tuples)
        if sum(map(len, waiting)) >= size:
            yield torch.cat(waiting)
            waiting = []
    if waiting:
        yield torch.cat(waiting)


# The gradient of the rows at one end of pairs, as (t, d) and a factor.
End = tuple[Tensor, float]


class _Measured(Protocol):
    """The distances between listed rows.

    Attributes:
        d: (t,) the distances.
    """

    d: Tensor

    def pulls(self, force: Tensor) -> tuple[End, End]:
        """The gradient of sum(force * d) at either end; called once."""
        ...


# x (t, d), the first ends of pairs, and y (t, d).
_Measure = Callable[[Tensor, Tensor], _Measured]


@dataclass(eq=False)
class _Formula:
    """A distance whose gradient is a multiple of the difference.

    That of each pair is all that is kept, where `Closeness.between_backward` needs both rows again.

    Attributes:
        of: (t, d) x - y, x and y -> (t,) distances.
        slope: (t,) distances -> the factor that makes x - y the gradient by x.
    """

    of: Callable[[Tensor, Tensor, Tensor], Tensor]
    slope: Callable[[Tensor], Tensor | float]


class _ByFormula:
    def __init__(self, formula: _Formula, x: Tensor, y: Tensor) -> None:
        self._difference, self._slope = x - y, formula.slope
        self.d = formula.of(self._difference, x, y)

    def pulls(self, force: Tensor) -> tuple[End, End]:
        pull = self._difference.mul_((force * self._slope(self.d))[:, None])
        return (pull, 1), (pull, -1)


class _ByCloseness:
    """Any distance."""

    def __init__(self, closeness: Closeness, x: Tensor, y: Tensor) -> None:
        self._closeness, self._ends = closeness, (x, y)
        self.d = closeness.between(x, y)

    def pulls(self, force: Tensor) -> tuple[End, End]:
        x, y = (end.clone() for end in self._ends)  # which other pairs have too
        first, second = self._closeness.between_backward(force, x, y, self.d)
        return (first, 1), (second, 1)


def _square(difference: Tensor, x: Tensor, y: Tensor) -> Tensor:
    square: Tensor = vecdot(difference, difference)
    return square.clamp_(max=torch.finfo(x.dtype).max)


_FORMULAS: dict[Distance, _Formula] = {
    "euclidean": _Formula(
        lambda difference, x, y: length(difference),
        lambda d: d.reciprocal().masked_fill_(d == 0, 0),
    ),
    "sqeuclidean": _Formula(_square, lambda d: 2.0),
    "cosine": _Formula(cosine_of_difference, lambda d: 1.0),
}


def _measure(distance: Distance) -> _Measure:
    formula = _FORMULAS.get(distance)
    if formula is not None:
        return partial(_ByFormula, formula)
    return partial(_ByCloseness, by_distance(distance))


def _derived(
    rule: TupleRule,
    measure: _Measure,
    rows: list[Tensor],
    weight: Tensor | None,
    request: Request,
    absent: Tensor | None,
) -> tuple[Tensor, Tensor, list[tuple[End, End]], list[tuple[Tensor, Tensor]]]:
    """The losses of some tuples and their gradient; those that are `absent` do not count.

    Returns:
        (t,) losses, 0 for tuples that do not count.
        (t,) int64, 1 for tuples that count and 0 for others.
        For each pair of the rule, the gradients at both ends.
        For each pair, (t,) distances and (t,) forces.
    """
    apart = [measure(rows[i], rows[j]) for i, j in rule.pairs]
    distances = [one.d for one in apart]
    if not request.gradient:
        return *_counted(rule.loss(*distances), request.kept, absent), [], []
    with torch.enable_grad():
        each = rule.loss(*(d.requires_grad_() for d in distances))
        loss, inside = _counted(each, request.kept, absent)
        total = (loss if weight is None else loss * weight).sum()
        forces = torch.autograd.grad(total, distances, materialize_grads=True)
    for one in apart:
        one.d = one.d.detach()
    pulls = [one.pulls(force) for one, force in zip(apart, forces, strict=True)]
    found = [(one.d, f) for one, f in zip(apart, forces, strict=True)]
    return loss.detach(), inside, pulls, found


def _counted(loss: Tensor, kept: Between | None, absent: Tensor | None) -> tuple[Tensor, Tensor]:
    """Losses, 0 for those that do not count, and 1 for those that count."""
    if kept is None and absent is None:
        return loss, torch.ones_like(loss, dtype=torch.int64)
    outside = absent if kept is None else kept.outside(loss.detach())
    assert outside is not None
    if kept is not None and absent is not None:
        outside = outside | absent
    return loss.masked_fill(outside, 0), (~outside).long()


@dataclass(eq=False)
class _Shown:
    """The forces between listed pairs, kept for observers: anchor, other, distance, force."""

    parts: list[tuple[Tensor, ...]] = field(default_factory=list)

    def add(
        self,
        rule: TupleRule,
        tuples: Tensor,
        between: list[tuple[Tensor, Tensor]],
        symmetric: bool,
    ) -> None:
        for (i, j), (d, force) in zip(rule.pairs, between, strict=True):
            # With a reference, only the first row is an anchor, so it is shown with all forces.
            first = i if symmetric else 0
            self.parts.append((tuples[:, first], tuples[:, j], d, force))

    def show(self, request: Request, relation: Relation) -> None:
        no_rows = torch.zeros(0, dtype=torch.int64, device=request.a.device)
        no_values = request.a.new_zeros(0)
        parts = [*self.parts, (no_rows, no_rows, no_values, no_values)]
        anchor, other, d, force = map(torch.cat, zip(*parts, strict=True))
        show_listed(request, relation, anchor, other, d, force)


def show_listed(
    request: Request,
    relation: Relation,
    anchor: Tensor,
    other: Tensor,
    d: Tensor,
    force: Tensor,
    distance_sign: int = 1,
) -> None:
    """Show forces between listed pairs as tiles, which are 0 for all other pairs."""
    if not force_visitors():
        return
    columns = slice(0, relation.m)
    size = block(request.limits, d.device, d.element_size(), _BUFFERS, relation.m)
    for rows in spans(relation.n, size):
        here = (anchor >= rows.start) & (anchor < rows.stop)
        where = anchor[here] - rows.start, other[here]
        values = d.new_zeros(rows.stop - rows.start, relation.m)
        pull = torch.zeros_like(values)
        values[where] = d[here]
        pull.index_put_(where, force[here], accumulate=True)
        tile = Tile(rows, columns, relation.block(rows, columns), values)
        show(request, tile, pull, distance_sign)
