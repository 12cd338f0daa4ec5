"""The executors of losses made of log-sum-exps over rows, columns or both.

Every such loss is a function of three numbers an anchor: the log-sum-exp of its negatives, that of
its positives, and the sum of its positives. Where a block of rows can hold all columns, one visit
collects them and applies the forces (6 N^2 d of work). Otherwise, and where columns are anchors
too, a first pass collects and a second applies (8 N^2 d; 4 N^2 d on the upper triangle of a batch
against itself).
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from nearfar.engine.budget import block as block_rows
from nearfar.engine.budget import spans
from nearfar.engine.budget import tile as tile_shape
from nearfar.engine.closeness import Product
from nearfar.engine.elementwise import tiles
from nearfar.engine.step import Answer, Executor, Request
from nearfar.observe import show_forces, someone_watches_forces
from nearfar.relation import Block, Relation

# (negatives, positives, sum of positives, number of positives) -> loss; all (n,).
Combine = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class SoftmaxRule:
    """A loss of the log-sum-exps of an anchor's negatives and positives.

    Attributes:
        combine: what the loss makes of them; plain torch.
        every_positive: whether `combine` uses the log-sum-exp of the positives; where there is one
            positive an anchor, their sum is all there is to know.
        needs_negatives: whether an anchor without negatives is left out.
    """

    combine: Combine
    every_positive: bool = False
    needs_negatives: bool = False

    def rows(self, closeness: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """The same as a `rows` rule, for the dense and the streaming executor."""
        count = positive.sum(1)
        valid = self.valid(count, negative.sum(1))
        of_negatives = closeness.masked_fill(~negative, -inf).logsumexp(1)
        of_positives = closeness.masked_fill(~positive, -inf).logsumexp(1)
        total = torch.where(positive, closeness, 0).sum(1)
        return self.loss(of_negatives, of_positives, total, count, valid), valid

    def valid(self, positives: Tensor, negatives: Tensor) -> Tensor:
        """Which anchors have something to compare."""
        valid = positives > 0
        return valid & (negatives > 0) if self.needs_negatives else valid

    def loss(
        self, negatives: Tensor, positives: Tensor, total: Tensor, count: Tensor, valid: Tensor
    ) -> Tensor:
        """The losses, 0 where not valid."""
        # Values that no gradient turns into NaN stand in where there is nothing to compare.
        negatives = torch.where(valid, negatives, 0)
        positives = torch.where(valid, positives, 0)
        return torch.where(valid, self.combine(negatives, positives, total, count.clamp(min=1)), 0)


class _LogSum:
    """A running log-sum-exp: the largest term so far, and the sum relative to it."""

    def __init__(self, n: int, like: Tensor) -> None:
        self.top, self.total = like.new_full((n,), -inf), like.new_zeros(n)

    def add(self, at: slice, z: Tensor, dim: int) -> None:
        old = self.top[at]
        top = torch.maximum(old, z.amax(dim))
        base = torch.where(top == -inf, 0, top)
        terms = (z - base.unsqueeze(dim)).exp_().sum(dim)
        self.total[at] = self.total[at] * (old - base).exp() + terms
        self.top[at] = top

    def value(self) -> Tensor:
        return self.top + self.total.log()


class _Anchors:
    """What is known of each anchor, and, once `settle` has run, how hard it pulls and pushes."""

    def __init__(self, rule: SoftmaxRule, n: int, like: Tensor) -> None:
        self.rule = rule
        self.negatives = _LogSum(n, like)
        self.positives = _LogSum(n, like) if rule.every_positive else None
        self.total = like.new_zeros(n)

    def add(self, at: slice, z: Tensor, block: Block, dim: int) -> None:
        """Take in the tile `z`, in which the anchors `at` lie along the other dimension."""
        self.negatives.add(at, block.without_hidden(z), dim)
        if block.similar is not None:
            if self.positives is not None:
                self.positives.add(at, z.masked_fill(~block.similar, -inf), dim)
            self.total[at] += torch.where(block.similar, z, 0).sum(dim)

    def settle(
        self, n_positives: Tensor, n_negatives: Tensor, weight: Tensor | None, gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """The losses and their validity; keeps the derivatives by the three numbers."""
        negatives = self.negatives.value()
        positives = negatives if self.positives is None else self.positives.value()
        valid = self.rule.valid(n_positives, n_negatives)
        numbers = (negatives, positives.clone(), self.total)
        for number in numbers:
            number.requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            loss = self.rule.loss(*numbers, n_positives, valid)
            total = (loss if weight is None else loss * weight).sum()
        if gradient:
            by = torch.autograd.grad(total, numbers, materialize_grads=True)
            self.by_negatives, self.by_positives, self.by_total = by
            # exp(-inf - 0) is 0; exp(-inf - -inf) would be NaN.
            self.of_negatives = torch.where(negatives == -inf, 0, negatives).detach()
            self.of_positives = torch.where(positives == -inf, 0, positives).detach()
        return loss.detach(), valid

    def force(self, at: slice, z: Tensor, visible: Tensor, block: Block, dim: int) -> Tensor:
        """The forces that the anchors `at` exert in the tile `z`."""
        force = (visible - self.of_negatives[at].unsqueeze(dim)).exp_()
        force *= self.by_negatives[at].unsqueeze(dim)
        if block.similar is not None:
            pull = self.by_total[at].unsqueeze(dim)
            if self.positives is not None:
                share = (z - self.of_positives[at].unsqueeze(dim)).exp_()
                pull = share * self.by_positives[at].unsqueeze(dim) + pull
            force = torch.where(block.similar, pull, force)
        return force


_BUFFERS = 6


def softmax(rule: SoftmaxRule, relation: Relation, *, both: bool = False) -> Executor:
    """The executor of a rule for every row, or, with `both`, for every row and every column.

    With `both`, the loss of row i is the mean of what it costs as a row and as a column.
    """

    def execute(request: Request) -> Answer:
        a, b = request.a, request.columns
        mirrored = relation.symmetric and not someone_watches_forces()
        size = block_rows(request.limits, a.device, a.element_size(), _BUFFERS, len(b))
        if both or mirrored or size < min(len(a), 64):
            return _two_passes(rule, relation, request, both, mirrored)
        return _one_visit(rule, relation, request, size)

    return execute


def _one_visit(rule: SoftmaxRule, relation: Relation, request: Request, size: int) -> Answer:
    a, b = request.a, request.columns
    closeness, everyone = Product(), slice(0, len(b))
    counts = relation.n_positives(), relation.n_negatives()
    per_row, valid = a.new_zeros(len(a)), torch.zeros(len(a), dtype=torch.bool, device=a.device)
    da = torch.zeros_like(a) if request.gradient else None
    db = torch.zeros_like(b) if request.gradient else None
    for rows in spans(len(a), size):
        z = closeness.tile(a[rows], b)
        block = relation.block(rows, everyone)
        anchors, here = _Anchors(rule, rows.stop - rows.start, a), slice(None)
        anchors.add(here, z, block, 1)
        weight = None if request.weight is None else request.weight[rows]
        n_positives, n_negatives = (count[rows] for count in counts)
        per_row[rows], valid[rows] = anchors.settle(
            n_positives, n_negatives, weight, request.gradient
        )
        if da is not None and db is not None:
            force = anchors.force(here, z, block.without_hidden(z), block, 1)
            show_forces(rows, everyone, z, force)
            closeness.pull_back(force, z, a[rows], b, da[rows], db)
    return Answer(per_row, valid, da, db)


def _two_passes(
    rule: SoftmaxRule, relation: Relation, request: Request, both: bool, mirrored: bool
) -> Answer:
    a, b = request.a, request.columns
    closeness = Product()
    shape = tile_shape(request.limits, a.device, a.element_size(), _BUFFERS)
    visits = tiles(len(a), len(b), shape, mirrored)
    as_rows = _Anchors(rule, len(a), a)
    as_columns = _Anchors(rule, len(b), a) if both else as_rows
    for rows, columns, twice in visits:
        z, block = closeness.tile(a[rows], b[columns]), relation.block(rows, columns)
        as_rows.add(rows, z, block, 1)
        if both or twice:
            as_columns.add(columns, z, block, 0)
    counts = relation.n_positives(), relation.n_negatives()
    weight = request.weight
    per_row, valid = as_rows.settle(*counts, weight, request.gradient)
    if both:
        back, _ = as_columns.settle(*counts, weight, request.gradient)
        per_row = (per_row + back) / 2
    if not request.gradient:
        return Answer(per_row, valid)
    da, db = torch.zeros_like(a), torch.zeros_like(b)
    for rows, columns, twice in visits:
        z, block = closeness.tile(a[rows], b[columns]), relation.block(rows, columns)
        visible = block.without_hidden(z)
        force = as_rows.force(rows, z, visible, block, 1)
        if both or twice:
            force += as_columns.force(columns, z, visible, block, 0)
        if both:
            force /= 2
        show_forces(rows, columns, z, force)
        closeness.pull_back(force, z, a[rows], b[columns], da[rows], db[columns])
    return Answer(per_row, valid, da, db)
