"""The executors of losses made of log-sum-exps over rows, columns or both.

Every such loss is a function of two numbers an anchor: a log-sum-exp, of its negatives or of
everyone but itself, and the sum of its positives. Where a block of rows can hold all columns, one
visit collects them and applies the forces (6 N^2 d of work). Otherwise, and where columns are
anchors too, a first pass collects and a second applies (8 N^2 d; 4 N^2 d on the upper triangle of a
batch against itself).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import inf

import torch
from torch import Tensor

from nearfar.engine.budget import block as block_rows
from nearfar.engine.budget import spans
from nearfar.engine.budget import tile as tile_shape
from nearfar.engine.closeness import pull_back
from nearfar.engine.elementwise import tiles
from nearfar.engine.step import Answer, Executor, Request, show
from nearfar.observe import force_visitors
from nearfar.relation import Block, Relation


@dataclass(frozen=True, eq=False)
class LogSum:
    """(n,) log-sum-exps, kept in two parts so that a difference of two large ones is exact.

    Attributes:
        top: a number near the log-sum-exp.
        rest: what is left of it.
    """

    top: Tensor
    rest: Tensor

    def above(self, other: Tensor) -> Tensor:
        """This minus the other."""
        return (self.top - other) + self.rest


# A loss and its derivatives by the two numbers.
Parts = tuple[Tensor, Tensor, Tensor]
# (log-sum-exp, sum of positives, number of positives), all (n,) -> loss, derivatives.
Combine = Callable[[LogSum, Tensor, Tensor], Parts]


@dataclass(frozen=True, eq=False)
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
        loss = self.combine(LogSum(logs, torch.zeros_like(logs)), total, count.clamp(min=1))[0]
        return loss, valid

    def counts(self, relation: Relation) -> tuple[Tensor | None, Tensor]:
        """Which anchors have something to compare (None: all), and their numbers of positives."""
        if relation.one_positive and not self.needs_negatives:
            return None, torch.ones((), device=relation.device)
        count = relation.n_positives()
        negatives = relation.n_negatives() if self.needs_negatives else count
        return self._valid(count, negatives), count.clamp(min=1).double()

    def _valid(self, positives: Tensor, negatives: Tensor) -> Tensor:
        valid = positives > 0
        return valid & (negatives > 0) if self.needs_negatives else valid


# Logits that lie within this of 0, less the largest they can be, have an exp that is a normal
# number of the dtype: such are summed as they come.
_SAFE = {torch.float32: 40.0, torch.float64: 300.0}


class _Tile:
    """A tile's products and what the log-sum-exps take in: logits, or, if bounded, their exp."""

    def __init__(self, z: Tensor, block: Block, rule: SoftmaxRule, bound: float | None) -> None:
        self.z, self.block = z, block
        self.terms, nothing = (z, -inf) if bound is None else ((z - bound).exp_(), 0.0)
        hidden = block.itself if rule.everyone else block.hidden
        if hidden is not None:
            self.terms = self.terms.masked_fill(hidden, nothing)

    @cached_property
    def positives(self) -> Tensor | None:
        """The products of positive pairs, 0 elsewhere; None where the tile has none."""
        return None if self.block.similar is None else self.z.where(self.block.similar, 0)


class _Running:
    """A running log-sum-exp of each anchor.

    Bounded logits are summed relative to the bound, others relative to the largest so far.
    """

    def __init__(self, n: int, like: Tensor, bound: float | None) -> None:
        self.total, self.bound = like.new_zeros(n), bound
        self.top = like.new_full((n,), -inf if bound is None else bound)

    def add(self, at: slice, terms: Tensor, dim: int) -> None:
        if self.bound is not None or not terms.shape[dim]:
            self.total[at].add_(terms.sum(dim))  # += would copy the sum back onto itself
            return
        old = self.top[at]
        top = torch.maximum(old, terms.amax(dim))
        base = _finite(top)
        fresh = (terms - base.unsqueeze(dim)).exp_().sum(dim)
        self.total[at] = self.total[at] * (old - base).exp() + fresh
        self.top[at] = top

    def value(self) -> LogSum:
        return LogSum(self.top, self.total.log())

    def settle(self, by: Tensor) -> None:
        """Keep what turns terms into forces: `by`, the derivative by the value, over the sum."""
        self.factor = by / self.total.masked_fill(self.total == 0, 1)
        self.base = self.top if self.bound is not None else _finite(self.top)


def _finite(logs: Tensor) -> Tensor:
    """0 for -inf, where nothing was summed: exp(-inf - 0) is 0, exp(-inf - -inf) would be NaN."""
    return logs.masked_fill(logs == -inf, 0)


class _Anchors:
    """What is known of each anchor, and, once `settle` has run, how hard it pulls and pushes."""

    def __init__(self, rule: SoftmaxRule, n: int, like: Tensor, bound: float | None) -> None:
        self.rule, self.bound = rule, bound
        self.logs, self.total = _Running(n, like, bound), like.new_zeros(n)

    def add(self, at: slice, tile: _Tile, dim: int) -> None:
        """Take in a tile, in which the anchors `at` lie along the other dimension."""
        self.logs.add(at, tile.terms, dim)
        if tile.positives is not None:
            self.total[at].add_(tile.positives.sum(dim))

    def settle(self, valid: Tensor | None, count: Tensor, weight: Tensor | None) -> Tensor:
        """The losses; from here on it is known what each term weighs in their weighted sum."""
        loss, by_logs, by_total = self.rule.combine(
            self.logs.value(), self.total, count.to(self.total.dtype)
        )
        if valid is not None:
            loss, by_logs, by_total = (part.where(valid, 0) for part in (loss, by_logs, by_total))
        if weight is not None:
            by_logs, by_total = by_logs * weight, by_total * weight
        self.logs.settle(by_logs)
        self.by_total = by_total
        return loss


def _forces(tile: _Tile, rows: _Anchors, i: slice, columns: _Anchors | None, j: slice) -> Tensor:
    """What the anchors on both sides of a tile exert in it together; None: the rows alone do."""
    similar = tile.block.similar
    if rows.bound is not None:
        factor, pull = rows.logs.factor[i, None], rows.by_total[i, None]
        if columns is not None:
            factor, pull = factor + columns.logs.factor[j], pull + columns.by_total[j]
        force = tile.terms.mul_(factor)
        return force if similar is None else force.add_(pull.where(similar, 0))
    force = (tile.terms - rows.logs.base[i, None]).exp_().mul_(rows.logs.factor[i, None])
    pull = rows.by_total[i, None]
    if columns is not None:
        back = (tile.terms - columns.logs.base[j]).exp_().mul_(columns.logs.factor[j])
        force, pull = force.add_(back), pull + columns.by_total[j]
    return force if similar is None else force.add_(pull.where(similar, 0))


_BUFFERS = 8


def softmax(rule: SoftmaxRule, relation: Relation, *, both: bool = False) -> Executor:
    """The executor of a rule for every row, or, with `both`, for every row and every column.

    With `both`, the loss of row i is the mean of what it costs as a row and as a column.
    """

    def execute(request: Request) -> Answer:
        a, b = request.a, request.columns
        bound = request.bound
        if bound is not None and bound > _SAFE.get(a.dtype, 0):
            bound = None
        mirrored = relation.symmetric and not force_visitors()
        size = block_rows(request.limits, a.device, a.element_size(), _BUFFERS, len(b))
        if both or mirrored or size < min(len(a), 64):
            return _two_passes(rule, relation, request, both, mirrored, bound)
        return _one_visit(rule, relation, request, size, bound)

    return execute


def _one_visit(
    rule: SoftmaxRule, relation: Relation, request: Request, size: int, bound: float | None
) -> Answer:
    a, b = request.a, request.columns
    everyone, here = slice(0, len(b)), slice(None)
    valid, count = rule.counts(relation)
    per_row = a.new_empty(len(a))
    da = torch.zeros_like(a) if request.gradient else None
    db = torch.zeros_like(b) if request.gradient else None
    for rows in spans(len(a), size):
        tile = _Tile(a[rows] @ b.T, relation.block(rows, everyone), rule, bound)
        anchors = _Anchors(rule, rows.stop - rows.start, a, bound)
        anchors.add(here, tile, 1)
        per_row[rows] = anchors.settle(
            None if valid is None else valid[rows],
            count[rows] if count.ndim else count,
            None if request.weight is None else request.weight[rows],
        )
        if da is not None and db is not None:
            force = _forces(tile, anchors, here, None, everyone)
            show(request, rows, everyone, tile.block, tile.z, force, -1)
            pull_back(force, a[rows], b, da[rows], db)
    return Answer(per_row, valid, da, db)


def _two_passes(
    rule: SoftmaxRule,
    relation: Relation,
    request: Request,
    both: bool,
    mirrored: bool,
    bound: float | None,
) -> Answer:
    a, b = request.a, request.columns
    shape = tile_shape(request.limits, a.device, a.element_size(), _BUFFERS)
    visits = tiles(len(a), len(b), shape, mirrored)

    def visit(rows: slice, columns: slice) -> _Tile:
        return _Tile(a[rows] @ b[columns].T, relation.block(rows, columns), rule, bound)

    as_rows = _Anchors(rule, len(a), a, bound)
    as_columns = _Anchors(rule, len(b), b, bound) if both else as_rows
    tile = None
    for rows, columns, twice in visits:
        tile = visit(rows, columns)
        as_rows.add(rows, tile, 1)
        if both or twice:
            as_columns.add(columns, tile, 0)
    valid, count = rule.counts(relation)
    weight = request.weight
    if both:  # a row's loss is the mean of both, so each direction weighs half
        weight = torch.full_like(as_rows.total, 0.5) if weight is None else weight / 2
    per_row = as_rows.settle(valid, count, weight)
    if both:
        per_row = (per_row + as_columns.settle(valid, count, weight)) / 2
    if not request.gradient:
        return Answer(per_row, valid)
    da, db = torch.zeros_like(a), torch.zeros_like(b)
    for rows, columns, twice in visits:
        if tile is None or len(visits) > 1:  # a single tile is still there
            tile = visit(rows, columns)
        force = _forces(tile, as_rows, rows, as_columns if both or twice else None, columns)
        show(request, rows, columns, tile.block, tile.z, force, -1)
        pull_back(force, a[rows], b[columns], da[rows], db[columns])
    return Answer(per_row, valid, da, db)
