"""The executor of losses that set an anchor's positives against the log-sum-exp of its negatives.

Positives are few and are taken one by one; negatives are everyone else, and only their sum counts.
One visit to each tile (6 N^2 d of work): the tiles of a strip of rows are kept until its sums are
known.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from math import inf

import torch
from torch import Tensor

from nearfar.engine.budget import strip_shape, wide_tile
from nearfar.engine.closeness import Closeness, Tile, add_rows
from nearfar.engine.products import Gradient, whole
from nearfar.engine.step import Answer, Executor, Request, show
from nearfar.parts import joined, part, spans
from nearfar.relation import Block, Relation

# (b,) log-sum-exp of the negatives of each anchor, (k,) closeness of all positive pairs, (k,) the
# anchor of each -> (b,) losses, and their derivatives by the first two.
Settle = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(eq=False)
class Contest:
    """A loss of an anchor's positives and of the log-sum-exp of its negatives.

    Attributes:
        exponent: closeness of negatives -> what is summed the exponentials of; overwrites nothing.
        slope: closeness of negatives -> the derivative of the exponent.
        settle: what the loss makes of the sum and the positives.
        counts: (n,) numbers of positives and of negatives -> how much each anchor counts.
        scale: by which an exponent is at most larger than its closeness.
    """

    exponent: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor | float]
    settle: Settle
    counts: Callable[[Tensor, Tensor], Tensor]
    scale: float = 1.0

    def rows(self, closeness: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """The same as a `rows` rule, for the dense and the streaming executor."""
        anchor, other = positive.nonzero(as_tuple=True)
        # 0 stands in where nothing is summed, which no gradient turns into NaN.
        some = negative.any(1)
        terms = self.exponent(closeness).masked_fill(~negative, -inf)
        far = terms.masked_fill(~some[:, None], 0).logsumexp(1).where(some, -inf)
        loss = self.settle(far, closeness[anchor, other], anchor)[0]
        return loss, self.counts(positive.sum(1), negative.sum(1))


def log_sum(terms: Tensor, anchor: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The log-sum-exp of each anchor's terms, and the share of each term in its sum.

    Args:
        terms: (k,), of all anchors.
        anchor: (k,) int64, whose each is.
        n: the number of anchors.

    Returns:
        (n,) sums, -inf without terms; (k,) shares, the derivatives of the sums.

    >>> log_sum(torch.tensor([0.0, 0.0, 5.0]), torch.tensor([0, 0, 2]), 3)
    (tensor([0.6931,   -inf, 5.0000]), tensor([0.5000, 0.5000, 1.0000]))
    """
    fixed = terms.detach()
    # The smallest finite number where there are none: -inf - -inf would be NaN.
    lowest = torch.finfo(terms.dtype).min
    top = fixed.new_full((n,), lowest).scatter_reduce(0, anchor, fixed, "amax")
    # index_select takes half the time of top[anchor], which shows in a small batch.
    powers = (terms - top.index_select(0, anchor)).exp()
    total = sum_of(powers, anchor, n)
    return top + total.log(), powers / total.index_select(0, anchor)


def sum_of(terms: Tensor, anchor: Tensor, n: int) -> Tensor:
    """(n,) the sum of each anchor's terms (k,)."""
    if terms.requires_grad:
        return terms.new_zeros(n).index_add(0, anchor, terms)
    total = terms.new_zeros(n)
    add_rows(total, anchor, terms)
    return total


# Floats a pair of a strip: closeness, exponent, and room; and what a positive takes besides: its
# place in 64 bits, and its share and pull while they are worked out.
_KEPT, _KEPT_A_POSITIVE = 4, 12
_BUFFERS = 8
_LARGE = 2**20  # pairs of a relation, from which on it is asked how many of them are positive


def contest(rule: Contest, closeness: Closeness, relation: Relation) -> Executor:
    """Visit each strip of rows once."""

    def execute(request: Request) -> Answer:
        a, b = closeness.prepare(request.a, request.b)
        columns = a if b is None else b
        losses, bound = [], request.bound * rule.scale
        gradient = Gradient(a, columns, request.finish) if request.gradient else None
        limits, device, itemsize, m = request.limits, a.device, a.element_size(), columns.shape[0]
        shape = wide_tile(limits, device, itemsize, _BUFFERS)
        shape = strip_shape(shape, limits, device, itemsize, m, _kept(relation))
        for rows in spans(a.shape[0] if m else 0, max(shape[0], 1)):
            strip = _Strip(rule, rows)
            for cols in spans(m, shape[1]):
                tile = closeness.tile(part(a, rows), part(columns, cols), bound)
                strip.add(cols, tile, relation.block(rows, cols))
            losses.append(strip.settle(part(a, rows), request.weight))
            if gradient is None:
                continue
            for piece in strip.parts:
                force, cols = strip.force(piece), piece.columns
                show(request, rows, cols, piece.block, piece.tile.values, force, closeness.toward)
                even = piece.block.positives is None
                closeness.pull_back(force, piece.tile, gradient, rows, cols, even=even)
        counts = rule.counts(relation.n_positives(), relation.n_negatives())
        per_row = joined(losses, a) if losses else a.new_zeros(a.shape[0])
        return Answer(per_row.masked_fill_(counts == 0, 0), counts, *whole(gradient))

    return execute


def _kept(relation: Relation) -> int:
    """How many floats a pair of a strip takes; of an accelerator, which asking would stall, few."""
    pairs = relation.n * relation.m
    if pairs < _LARGE or relation.device.type != "cpu":
        return _KEPT
    share = relation.n_positives().sum().item() / pairs
    return _KEPT + round(_KEPT_A_POSITIVE * share)


@dataclass(eq=False)
class _Part:
    """A tile of a strip.

    Attributes:
        terms: exponents of the negatives, -inf for others; later their exponentials, then forces.
        anchor, other: (k,), (k,) where its positives are.
        pull: (k,) the forces on these, once they are known.
    """

    columns: slice
    tile: Tile
    block: Block
    terms: Tensor
    anchor: Tensor
    other: Tensor
    pull: Tensor | None = None


class _Strip:
    """Some rows against all columns."""

    def __init__(self, rule: Contest, rows: slice) -> None:
        self.rule, self.rows = rule, rows
        self.parts: list[_Part] = []

    def add(self, columns: slice, tile: Tile, block: Block) -> None:
        terms = self.rule.exponent(tile.values)
        if block.positives is None:
            anchor = other = torch.zeros(0, dtype=torch.int64, device=terms.device)
        else:
            anchor, other = block.positives.indices()
            block.positives.fill(terms, -inf)
        if block.selves is not None:
            block.selves.fill(terms, -inf)
        self.parts.append(_Part(columns, tile, block, terms, anchor, other))

    def settle(self, rows: Tensor, weight: Tensor | None) -> Tensor:
        """(b,) the losses; from here on the forces are known."""
        lowest = torch.finfo(rows.dtype).min  # where there are none: -inf - -inf would be NaN
        top = reduce(torch.maximum, (p.terms.amax(1) for p in self.parts)).clamp_(min=lowest)
        powers = (p.terms.sub_(top[:, None]).exp_() for p in self.parts)
        total = reduce(torch.add, (p.sum(1) for p in powers))
        near = joined([p.tile.values[p.anchor, p.other] for p in self.parts], total)
        anchor = joined([p.anchor for p in self.parts], total)
        loss, by_far, by_near = self.rule.settle(top + total.log(), near, anchor)
        if weight is not None:
            by_far, by_near = by_far * weight[self.rows], by_near * weight[self.rows][anchor]
        # Nothing was summed where the sum is 0; by_far is 0 there.
        self.factor = by_far / (total + torch.finfo(total.dtype).tiny)
        for piece, pull in zip(self.parts, self._of_parts(by_near), strict=True):
            piece.pull = pull
        return loss

    def _of_parts(self, of_positives: Tensor) -> Sequence[Tensor]:
        if len(self.parts) == 1:
            return [of_positives]
        return of_positives.split_with_sizes([p.anchor.shape[0] for p in self.parts])

    def force(self, part: _Part) -> Tensor:
        slope = self.rule.slope(part.tile.values)
        factor = self.factor[:, None]
        if isinstance(slope, Tensor):
            force = part.terms.mul_(factor).mul_(slope)
        else:
            force = part.terms.mul_(factor * slope)
        if part.pull is not None:
            force[part.anchor, part.other] = part.pull
        return force
