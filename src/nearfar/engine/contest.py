"""The executor of losses that set an anchor's positives against the log-sum-exp of its negatives.

Positives are few and are taken one by one; negatives are everyone else, and only their sum counts.
One visit to each tile (6 N^2 d of work): the tiles of a strip of rows are kept until its sums are
known. Where a batch meets itself, each pair is looked at for both its ends instead: a first pass
over the upper triangle collects the sums, a second applies the forces (4 N^2 d, less a fourth of
that for every tile which the budget lets the first pass keep for the second).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from math import inf

import torch
from torch import Tensor

from nearfar.engine.budget import (
    budget_of,
    kept_elements,
    strip_shape,
    triangle_tile,
    wide_tile,
)
from nearfar.engine.closeness import Closeness, Tile, add_rows
from nearfar.engine.elementwise import tiles
from nearfar.engine.observe import force_visitors
from nearfar.engine.places import exact
from nearfar.engine.products import Gradient, whole
from nearfar.engine.relation import Block, Relation
from nearfar.engine.slices import joined, part, spans
from nearfar.engine.softmax import SAFE
from nearfar.engine.step import Answer, Executor, Request, show

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


_BUFFERS = 8


def contest(rule: Contest, closeness: Closeness, relation: Relation) -> Executor:
    """Visit each pair of a batch with itself for both its ends, or else each strip of rows once."""

    def execute(request: Request) -> Answer:
        a, b = closeness.prepare(request.a, request.b)
        columns = a if b is None else b
        gradient = Gradient(a, columns, request.finish) if request.gradient else None
        field = _Field(rule, closeness, relation, request, a, columns, gradient)
        per_row = _by_pairs(field) if _pays(field) else _by_strips(field)
        counts = rule.counts(relation.n_positives(), relation.n_negatives())
        return Answer(per_row.masked_fill_(counts == 0, 0), counts, *whole(gradient))

    return execute


@dataclass(eq=False)
class _Piece:
    """A tile of the field.

    Attributes:
        terms: exponents of the negatives, -inf for others; later their exponentials, then forces.
        anchor, other: (k,), (k,) where its positives are.
    """

    rows: slice
    columns: slice
    tile: Tile
    block: Block
    terms: Tensor
    anchor: Tensor
    other: Tensor

    @property
    def near(self) -> Tensor:
        """(k,) how close its positives are."""
        return self.tile.values[self.anchor, self.other]

    def hide(self) -> None:
        """Leave out of the terms who is no negative."""
        for marks in (self.block.positives, self.block.selves):
            if marks is not None:
                marks.fill(self.terms, -inf)


@dataclass(eq=False)
class _Field:
    """Who meets whom: prepared rows and columns, and what is asked of them."""

    rule: Contest
    closeness: Closeness
    relation: Relation
    request: Request
    a: Tensor
    columns: Tensor
    gradient: Gradient | None

    def piece(self, rows: slice, columns: slice) -> _Piece:
        """A tile; its terms are yet of everyone."""
        bound = self.request.bound * self.rule.scale
        tile = self.closeness.tile(part(self.a, rows), part(self.columns, columns), bound)
        block = self.relation.block(rows, columns)
        if block.positives is None:
            anchor = other = torch.zeros(0, dtype=torch.int64, device=self.a.device)
        else:
            anchor, other = block.positives.indices()
        terms = self.rule.exponent(tile.values)
        return _Piece(rows, columns, tile, block, terms, anchor, other)

    def pull(self, piece: _Piece, factor: Tensor | float, pulls: Tensor) -> None:
        """Add the gradient of a piece, whose terms times `factor` are what its negatives weigh.

        Args:
            piece: overwritten.
            factor: a number, (r, 1) or (r, c).
            pulls: (k,) the forces on its positives.
        """
        assert self.gradient is not None
        slope, block, tile = self.rule.slope(piece.tile.values), piece.block, piece.tile
        if isinstance(slope, Tensor):
            force = piece.terms.mul_(factor).mul_(slope)
        else:
            force = piece.terms.mul_(factor * slope)
        force[piece.anchor, piece.other] = pulls
        rows, columns, toward = piece.rows, piece.columns, self.closeness.toward
        show(self.request, rows, columns, block, tile.values, force, toward)
        even = block.positives is None
        self.closeness.pull_back(force, tile, self.gradient, rows, columns, even=even)

    def settle(self, far: Tensor, near: Tensor, anchor: Tensor, at: slice) -> tuple[Tensor, ...]:
        """The losses of some anchors, and their derivatives; see `Settle`."""
        loss, by_far, by_near = self.rule.settle(far, near, anchor)
        if self.request.weight is not None:
            weight = part(self.request.weight, at)
            by_far, by_near = by_far * weight, by_near * weight[anchor]
        return loss, by_far, by_near


# Floats a pair of a strip: closeness, exponent, and room; and what a positive takes besides: its
# place in 64 bits, and its share and pull while they are worked out.
_KEPT, _KEPT_A_POSITIVE = 4, 12
_LARGE = 2**20  # pairs of a relation, from which on it is asked how many of them are positive


def _by_strips(field: _Field) -> Tensor:
    """(n,) the losses: row by row, the tiles of a strip of rows being kept until all are known."""
    a, m, limits = field.a, field.columns.shape[0], field.request.limits
    shape = wide_tile(limits, a.device, a.element_size(), _BUFFERS)
    kept = _kept(field.relation)
    shape = strip_shape(shape, limits, a.device, a.element_size(), m, kept)
    strips = spans(a.shape[0] if m else 0, max(shape[0], 1))
    losses = [_of_strip(field, rows, list(spans(m, shape[1]))) for rows in strips]
    return joined(losses, a) if losses else a.new_zeros(a.shape[0])


def _kept(relation: Relation) -> int:
    """How many floats a pair of a strip takes; of an accelerator, which asking would stall, few."""
    pairs = relation.n * relation.m
    if pairs < _LARGE or relation.device.type != "cpu":
        return _KEPT
    share = relation.n_positives().sum().item() / pairs
    return _KEPT + round(_KEPT_A_POSITIVE * share)


def _of_strip(field: _Field, rows: slice, columns: Sequence[slice]) -> Tensor:
    pieces = [field.piece(rows, at) for at in columns]
    for piece in pieces:
        piece.hide()
    lowest = torch.finfo(field.a.dtype).min  # where there are none: -inf - -inf would be NaN
    top = reduce(torch.maximum, (p.terms.amax(1) for p in pieces)).clamp_(min=lowest)
    powers = (p.terms.sub_(top[:, None]).exp_() for p in pieces)
    total = reduce(torch.add, (p.sum(1) for p in powers))
    near = joined([p.near for p in pieces], total)
    anchor = joined([p.anchor for p in pieces], total)
    loss, by_far, by_near = field.settle(top + total.log(), near, anchor, rows)
    if field.gradient is not None:
        # Nothing was summed where the sum is 0; by_far is 0 there.
        factor = (by_far / (total + torch.finfo(total.dtype).tiny))[:, None]
        counts = [p.anchor.shape[0] for p in pieces]
        pulls = [by_near] if len(pieces) == 1 else by_near.split_with_sizes(counts)
        for piece, pull in zip(pieces, pulls, strict=True):
            field.pull(piece, factor, pull)
    return loss


# Bytes that a positive takes while all are settled at once, of which there may be a budget's half;
# and from which height on tiles are so few that two visits cost no more steps than strips.
_A_POSITIVE, _FEWEST_ROWS = 128, 256


def _pays(field: _Field) -> bool:
    """Whether pairs are better looked at for both their ends."""
    a, limits = field.a, field.request.limits
    if not field.relation.symmetric or not a.is_cpu or force_visitors():
        return False
    high = _pair_shape(field)[0]
    if a.shape[0] <= high or (high < _FEWEST_ROWS and limits.tile is None):
        return False
    positives = int(field.relation.n_positives().sum())
    return positives * _A_POSITIVE <= budget_of(limits, a.device) // 2


def _pair_shape(field: _Field) -> tuple[int, int]:
    a = field.a
    return triangle_tile(field.request.limits, a.device, a.element_size(), _BUFFERS, a.shape[1])


def _by_pairs(field: _Field) -> Tensor:
    """(n,) the losses: one pass over the upper triangle for the sums, one for the forces."""
    a, n, shape = field.a, field.a.shape[0], _pair_shape(field)
    visits = tiles(n, n, shape, True)
    far = a.new_full((n,), -inf, dtype=exact(a))
    positives = _Positives(int(field.relation.n_positives().sum()), far)
    bases: list[float | None] = []
    kept: list[_Piece] = []
    room = kept_elements(field.request.limits, a.device, a.element_size(), shape, copies=2)
    for rows, columns, twice in visits:
        piece = field.piece(rows, columns)
        values, base = piece.near, _raise(piece)
        bases.append(base)
        for at, dim, anchor in _ends(piece, twice):
            torch.logaddexp(far[at], _log_sums(piece.terms, base, dim), out=far[at])
            positives.add(values, anchor, at.start)
        room -= piece.terms.numel()
        if room >= 0 and field.gradient is not None:
            kept.append(piece)
    everyone = slice(0, n)
    loss, by_far, by_near = field.settle(far, positives.near, positives.anchor, everyone)
    if field.gradient is None:
        return loss
    pulls = iter(by_near.to(a.dtype).split_with_sizes(positives.counts))
    kept.reverse()
    for (rows, columns, twice), base in zip(visits, bases, strict=True):
        if kept:
            piece = kept.pop()
        else:
            piece = field.piece(rows, columns)
            _raise(piece)
        ends = _ends(piece, twice)
        factor = _factor(piece, base, [(by_far[at], far[at], dim) for at, dim, _ in ends])
        field.pull(piece, factor, reduce(torch.add, [next(pulls) for _ in ends]))
    return loss


class _Positives:
    """How close all positives are, and to whom, as the tiles tell it.

    Their room is made at once: a small array that stays behind each tile breaks up the memory which
    the next would have used again.
    """

    def __init__(self, k: int, like: Tensor) -> None:
        self.near = like.new_empty(k)
        self.anchor = like.new_empty(k, dtype=torch.int64)
        self.counts: list[int] = []
        self._taken = 0

    def add(self, values: Tensor, anchor: Tensor, start: int) -> None:
        """Add positives (k,) of a tile whose first anchor is `start`."""
        here = slice(self._taken, self._taken + anchor.shape[0])
        self.near[here] = values
        torch.add(anchor, start, out=self.anchor[here])
        self.counts.append(anchor.shape[0])
        self._taken = here.stop


def _ends(piece: _Piece, twice: bool) -> list[tuple[slice, int, Tensor]]:
    """The anchors at the ends of the pairs, along which dimension they sum, whose positives are."""
    ends = [(piece.rows, 1, piece.anchor)]
    return [*ends, (piece.columns, 0, piece.other)] if twice else ends


def _raise(piece: _Piece) -> float | None:
    """Turn the terms into exponentials relative to a base; None: too far apart, they stay."""
    low = piece.terms.amin().item()
    piece.hide()
    high = piece.terms.amax().item()
    base = _base(low, high, SAFE.get(piece.terms.dtype, 0))
    if base:
        piece.terms.sub_(base)
    if base is not None:
        piece.terms.exp_()
    return base


def _base(low: float, high: float, safe: float) -> float | None:
    """What to take off exponents so that all lie within `safe` of 0; None: nothing does it."""
    if high == -inf or (-safe <= low and high <= safe):
        return 0.0
    # One less for the rounding, without which taking it off would cost digits.
    if not high - low <= 2 * safe - 1 or not abs(high) < 2**20:
        return None
    return float(round((low + high) / 2))


def _log_sums(terms: Tensor, base: float | None, dim: int) -> Tensor:
    """The log-sum-exps of the exponents along a dimension."""
    exactly = exact(terms)
    if base is not None:
        return terms.sum(dim).to(exactly).log_().add_(base)
    top = terms.amax(dim).clamp_(min=torch.finfo(terms.dtype).min)
    total = (terms - top.unsqueeze(dim)).exp_().sum(dim)
    return total.to(exactly).log_().add_(top)


def _factor(
    piece: _Piece, base: float | None, ends: Sequence[tuple[Tensor, Tensor, int]]
) -> Tensor | float:
    """What turns terms into what negatives weigh; exponents become that themselves.

    Args:
        piece: terms that are exponents are overwritten.
        base: of the terms, see `_raise`.
        ends: of the anchors at each end, the derivatives by their log-sum-exps, these, and the
            dimension along which they were summed.
    """
    dtype = piece.terms.dtype
    if base is not None:
        # No term of an anchor is above its sum; where it has none here, the base may be by far.
        most = 2 * SAFE[dtype]
        factors = [
            (by * (base - far).clamp(max=most).exp()).to(dtype).unsqueeze(dim)
            for by, far, dim in ends
        ]
        return factors[0] if len(factors) == 1 else factors[0] + factors[1]
    weights = []
    for by, far, dim in ends:
        near = far.to(dtype).clamp_(min=torch.finfo(dtype).min)
        share = (by * (near - far).clamp(max=1).exp()).to(dtype)
        weights.append((piece.terms - near.unsqueeze(dim)).exp_().mul_(share.unsqueeze(dim)))
    piece.terms = weights[0] if len(weights) == 1 else weights[0].add_(weights[1])
    return 1.0
