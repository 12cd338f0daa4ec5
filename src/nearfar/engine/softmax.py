"""The executors of losses made of log-sum-exps over rows, columns or both.

Every such loss is a function of two numbers an anchor: a log-sum-exp, of its negatives or of
everyone but itself, and the sum of its positives. Where a block of rows can hold all columns, one
visit collects them and applies the forces (6 N^2 d of work). Otherwise, and where columns are
anchors too, a first pass collects and a second applies: 8 N^2 d, and 4 N^2 d on the upper triangle
of a batch against itself, less a fourth of that for every tile which the budget lets the first pass
keep for the second.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import TypeVar

import torch
from torch import Tensor

from nearfar.engine.budget import kept_elements, low_tile, strip_shape, triangle_tile
from nearfar.engine.budget import tile as tile_shape
from nearfar.engine.elementwise import tiles
from nearfar.engine.observe import force_visitors
from nearfar.engine.pair_sets import Marks
from nearfar.engine.places import exact
from nearfar.engine.products import Gradient, products, whole
from nearfar.engine.relation import Block, Relation
from nearfar.engine.slices import joined, part, spans
from nearfar.engine.step import Answer, Executor, Request, show


@dataclass(eq=False)
class LogSum:
    """(n,) log-sum-exps, kept in two parts so that a difference of two large ones is exact.

    Attributes:
        top: a number near the log-sum-exp.
        rest: what is left of it; None: nothing.
    """

    top: Tensor
    rest: Tensor | None = None

    def above(self, other: Tensor) -> Tensor:
        """This minus the other."""
        short = self.top - other
        return short if self.rest is None else short + self.rest


# A loss and its derivatives by the two numbers.
Parts = tuple[Tensor, Tensor, Tensor]
# (log-sum-exp, sum of positives, number of positives), all (n,) -> loss, derivatives.
Combine = Callable[[LogSum, Tensor, Tensor | float], Parts]


@dataclass(eq=False)
class SoftmaxRule:
    """A loss of an anchor's log-sum-exp and its positives.

    Attributes:
        combine: what the loss makes of them, and its derivatives.
        everyone: whether the log-sum-exp is over positives too.
        needs_negatives: whether an anchor without negatives is left out.
    """

    combine: Combine
    everyone: bool = False
    needs_negatives: bool = False

    def rows(self, closeness: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """The same as a `rows` rule, for the dense and the streaming executor."""
        count, valid = positive.sum(1), self._valid(positive.sum(1), negative.sum(1))
        taken = positive | negative if self.everyone else negative
        # 0 stands in where there is nothing to compare, which no gradient turns into NaN.
        logs = closeness.masked_fill(~taken, -inf).logsumexp(1).where(valid, 0)
        total = torch.where(positive, closeness, 0).sum(1)
        loss = self.combine(LogSum(logs), total, count.clamp(min=1))[0]
        return loss, valid

    def counts(self, relation: Relation) -> tuple[Tensor | None, Tensor | float]:
        """Which anchors have something to compare (None: all), and their numbers of positives."""
        if relation.one_positive and not self.needs_negatives:
            return None, 1.0
        count = relation.n_positives()
        negatives = relation.n_negatives() if self.needs_negatives else count
        return self._valid(count, negatives), count.clamp(min=1).to(exact(count))

    def _valid(self, positives: Tensor, negatives: Tensor) -> Tensor:
        valid = positives > 0
        return valid & (negatives > 0) if self.needs_negatives else valid


# Logits that lie within this of 0 have an exponential, and sums of millions of these, that are
# normal numbers of the dtype: such are summed as they come.
SAFE = {torch.float32: 40.0, torch.float64: 300.0}


def _terms(z: Tensor, block: Block, rule: SoftmaxRule, bounded: bool, to: Tensor) -> Tensor:
    """What the log-sum-exps take in, put into `to`: the logits or, if bounded, their exp."""
    if bounded:
        terms, nothing = torch.exp(z, out=to), 0.0
    else:
        terms, nothing = to if to is z else to.copy_(z), -inf
    for marks in (block.selves, None if rule.everyone else block.positives):
        if marks is not None:
            marks.fill(terms, nothing)
    return terms


class _Running:
    """A running log-sum-exp of each anchor, in as many digits as the device has.

    Bounded logits are summed as they are, others relative to the largest so far.
    """

    def __init__(self, n: int, like: Tensor, bounded: bool) -> None:
        self.total = like.new_zeros(n, dtype=exact(like))
        self.top = None if bounded else like.new_full((n,), -inf)

    def add(self, at: slice, terms: Tensor, dim: int) -> None:
        if self.top is None or not terms.shape[dim]:
            part(self.total, at).add_(terms.sum(dim))  # += would copy the sum back onto itself
            return
        old = self.top[at]
        top = torch.maximum(old, terms.amax(dim))
        base = _finite(top)
        fresh = (terms - base.unsqueeze(dim)).exp_().sum(dim)
        self.total[at] = self.total[at] * (old - base).exp() + fresh
        self.top[at] = top

    def value(self) -> LogSum:
        rest = self.total.log()
        return LogSum(rest) if self.top is None else LogSum(self.top, rest)

    def settle(self, by: Tensor, dtype: torch.dtype) -> None:
        """Keep what turns terms into forces: `by`, the derivative by the value, over the sum."""
        # Nothing was summed where the sum is 0; by is 0 there.
        self.factor = (by / (self.total + torch.finfo(dtype).tiny)).to(dtype)
        self.base = None if self.top is None else _finite(self.top)


def _finite(logs: Tensor) -> Tensor:
    """The smallest number for -inf, where nothing was summed: -inf - -inf would be NaN."""
    return logs.clamp(min=torch.finfo(logs.dtype).min)


class _Anchors:
    """What is known of each anchor, and, once `settle` has run, how hard it pulls and pushes."""

    def __init__(self, rule: SoftmaxRule, n: int, like: Tensor, bounded: bool) -> None:
        self.rule, self.dtype = rule, like.dtype
        self.logs, self.total = _Running(n, like, bounded), like.new_zeros(n, dtype=exact(like))

    def settle(
        self, valid: Tensor | None, count: Tensor | float, weight: Tensor | float | None
    ) -> Tensor:
        """The losses; from here on it is known what each term weighs in their weighted sum."""
        loss, by_logs, by_total = self.rule.combine(self.logs.value(), self.total, count)
        if valid is not None:
            loss, by_logs, by_total = (part.where(valid, 0) for part in (loss, by_logs, by_total))
        if weight is not None:
            by_logs, by_total = by_logs * weight, by_total * weight
        self.logs.settle(by_logs, self.dtype)
        self.by_total = by_total.to(self.dtype)
        return loss


@dataclass(eq=False)
class _Side:
    """The anchors along one dimension of a tile: which of them, and along which they sum."""

    anchors: _Anchors
    at: slice
    dim: int

    def add_positives(self, taken: Tensor, positives: Marks) -> None:
        positives.add_sums(taken, part(self.anchors.total, self.at), self.dim)

    def add(self, terms: Tensor) -> None:
        self.anchors.logs.add(self.at, terms, self.dim)

    def along(self, values: Tensor) -> Tensor:
        """Values of all anchors, as a tile can be multiplied with them."""
        return part(values, self.at).unsqueeze(self.dim)

    def pull(self) -> Tensor:
        return part(self.anchors.by_total, self.at)


def _collect(
    z: Tensor, block: Block, rule: SoftmaxRule, bounded: bool, to: Tensor, *sides: _Side
) -> Tensor:
    """Add a tile of logits to the sums of the anchors on its sides; their terms go into `to`."""
    if block.positives is not None:
        taken = block.positives.take(z)
        for side in sides:
            side.add_positives(taken, block.positives)
    terms = _terms(z, block, rule, bounded, to)
    for side in sides:
        side.add(terms)
    return terms


def _forces(terms: Tensor, block: Block, *sides: _Side) -> Tensor:
    """What the anchors on the sides of a tile exert in it together. Overwrites the terms."""
    factors = [side.along(side.anchors.logs.factor) for side in sides]
    bases = [side.anchors.logs.base for side in sides]
    if bases[0] is None:
        force = terms.mul_(factors[0] if len(sides) == 1 else factors[0] + factors[1])
    else:
        force, *rest = (
            (terms - side.along(base)).exp_().mul_(factor)
            for side, base, factor in zip(sides, bases, factors, strict=True)
            if base is not None
        )
        for more in rest:
            force.add_(more)
    if block.positives is not None:
        block.positives.add(force, sides[0].pull(), sides[1].pull() if len(sides) == 2 else None)
    return force


_BUFFERS = 8
_FEWEST_ROWS = 64  # fewer at a time are slower than to compute all products twice


def softmax(rule: SoftmaxRule, relation: Relation, *, both: bool = False) -> Executor:
    """The executor of a rule for every row, or, with `both`, for every row and every column.

    With `both`, the loss of row i is the mean of what it costs as a row and as a column.
    """

    def execute(request: Request) -> Answer:
        a, b = request.a, request.columns
        bounded = request.bound <= SAFE.get(a.dtype, 0)
        mirrored = relation.symmetric and not force_visitors()
        limits, device, itemsize = request.limits, a.device, a.element_size()
        shape = low_tile(limits, device, itemsize, _BUFFERS)
        shape = strip_shape(shape, limits, device, itemsize, b.shape[0])
        if both or mirrored or shape[0] < min(max(a.shape[0], 1), _FEWEST_ROWS):
            return _two_passes(rule, relation, request, both, mirrored, bounded)
        return _one_visit(rule, relation, request, shape, bounded)

    return execute


def _one_visit(
    rule: SoftmaxRule, relation: Relation, request: Request, shape: tuple[int, int], bounded: bool
) -> Answer:
    """Row by row: all tiles of a strip of rows are kept until its sums are known."""
    a, b = request.a, request.columns
    valid, count = rule.counts(relation)
    gradient = Gradient(a, b, request.finish) if request.gradient else None
    # One buffer for all strips; a batch that is one strip is done sooner in place.
    room = a.new_empty(shape[0] * b.shape[0]) if a.shape[0] > shape[0] else None

    def taken(rows: slice, columns: slice, side: _Side) -> tuple[slice, Block, Tensor, Tensor]:
        n, block, seen = rows.stop - rows.start, relation.block(rows, columns), force_visitors()
        to = None if room is None else room[n * columns.start : n * columns.stop].view(n, -1)
        given = None if seen else to  # who watches sees the logits too
        z = products(part(a, rows), part(b, columns), request.bound, out=given)
        terms = _collect(z, block, rule, bounded, _place(z) if to is None else to, side)
        return columns, block, z if seen else terms, terms

    def losses(rows: slice) -> Tensor:
        anchors = _Anchors(rule, rows.stop - rows.start, a, bounded)
        side = _Side(anchors, slice(0, rows.stop - rows.start), 1)
        strip = [taken(rows, columns, side) for columns in spans(b.shape[0], shape[1])]
        loss = anchors.settle(
            None if valid is None else part(valid, rows),
            part(count, rows) if isinstance(count, Tensor) else count,
            None if request.weight is None else part(request.weight, rows),
        )
        if gradient is not None:
            for columns, block, z, terms in strip:
                force = _forces(terms, block, side)
                show(request, rows, columns, block, z, force, -1)
                gradient.add(force, rows, columns, even=block.positives is None)
        return loss

    per_row = joined([losses(rows) for rows in spans(a.shape[0], shape[0])], a)
    return Answer(per_row, valid, *whole(gradient))


def _two_passes(
    rule: SoftmaxRule,
    relation: Relation,
    request: Request,
    both: bool,
    mirrored: bool,
    bounded: bool,
) -> Answer:
    """One pass over the tiles for the sums, and one, with the products taken again, for forces."""
    a, b = request.a, request.columns
    room = request.limits, a.device, a.element_size(), _BUFFERS
    shape = triangle_tile(*room, a.shape[1]) if mirrored else tile_shape(*room)
    visits = tiles(a.shape[0], b.shape[0], shape, mirrored)
    # Where the columns are anchors too, they come after the rows; mirrored, they are the rows.
    anchors = _Anchors(rule, a.shape[0] + (b.shape[0] if both else 0), a, bounded)
    first = a.shape[0] if both else 0
    left = kept_elements(request.limits, a.device, a.element_size(), shape)
    kept: list[tuple[Tensor, Block, Tensor]] = []
    for rows, columns, twice in visits:
        z = products(part(a, rows), part(b, columns), request.bound)
        block = relation.block(rows, columns)
        sides = _sides(anchors, rows, columns, first, both or twice)
        terms = _collect(z, block, rule, bounded, _place(z), *sides)
        left -= terms.numel()
        if left >= 0 and request.gradient:
            kept.append((z, block, terms))
    valid, count = rule.counts(relation)
    if both:  # a row's loss is the mean of both, so each direction weighs half
        weight = 0.5 if request.weight is None else request.weight / 2
        of_both = anchors.settle(_twice(valid), _twice(count), _twice(weight))
        per_row = of_both.view(2, first).mean(0)
    else:
        per_row = anchors.settle(valid, count, request.weight)
    if not request.gradient:
        return Answer(per_row, valid)
    gradient = Gradient(a, b, request.finish)
    kept.reverse()
    for rows, columns, twice in visits:
        if kept:
            z, block, terms = kept.pop()
        else:
            z = products(part(a, rows), part(b, columns), request.bound)
            block = relation.block(rows, columns)
            terms = _terms(z, block, rule, bounded, _place(z))
        sides = _sides(anchors, rows, columns, first, both or twice)
        force = _forces(terms, block, *sides)
        show(request, rows, columns, block, z, force, -1)
        gradient.add(force, rows, columns, even=block.positives is None)
    return Answer(per_row, valid, *whole(gradient))


def _place(z: Tensor) -> Tensor:
    """Where the terms go: in place of the logits, unless someone wants to see these too."""
    return torch.empty_like(z) if force_visitors() else z


def _sides(anchors: _Anchors, rows: slice, columns: slice, first: int, both: bool) -> list[_Side]:
    sides = [_Side(anchors, rows, 1)]
    if both:
        sides.append(_Side(anchors, slice(first + columns.start, first + columns.stop), 0))
    return sides


_Some = TypeVar("_Some", Tensor | None, Tensor | float)


def _twice(of_rows: _Some) -> _Some:
    """What holds for the rows, for the columns after them too."""
    return torch.cat([of_rows, of_rows]) if isinstance(of_rows, Tensor) else of_rows
