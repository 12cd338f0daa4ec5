"""Losses that are a sum over pairs: one visit to each tile."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor

from nearfar.engine.closeness import Closeness, Tile
from nearfar.engine.pair_sets import Masked
from nearfar.engine.relation import Relation
from nearfar.engine.slices import part
from nearfar.engine.step import Answer, Executor, Request
from nearfar.engine.walk import Walk

# Closeness -> the loss of each pair and its derivative, in new memory.
Term = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(eq=False)
class PairSum:
    """A loss that is a sum over pairs, with one term for positives and one for negatives.

    Attributes:
        positive: the term of positive pairs.
        negative: the term of negative pairs.
        positive_weight: the weight of a positive pair, relative to a negative one.
        counts: (n,) how much each row counts in the mean, or the sum of that; None: all 1.
    """

    positive: Term
    negative: Term
    positive_weight: float | Tensor = 1.0
    counts: Tensor | float | None = None

    def of(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """(r, c) losses and forces. If there are few positives, they are computed from a list."""
        block, closeness = tile.block, tile.closeness
        loss, force = self.negative(closeness)
        if isinstance(block.positives, Masked):
            near, pull = self._positive(closeness)
            similar = block.positives.mask()
            loss, force = torch.where(similar, near, loss), torch.where(similar, pull, force)
        elif block.positives is not None:
            i, j = block.positives.indices()
            loss[i, j], force[i, j] = self._positive(closeness[i, j])
        if block.selves is not None:
            block.selves.fill(loss, 0)
            block.selves.fill(force, 0)
        return loss, force

    def _positive(self, closeness: Tensor) -> tuple[Tensor, Tensor]:
        loss, force = self.positive(closeness)
        if isinstance(self.positive_weight, float) and self.positive_weight == 1:
            return loss, force
        return loss * self.positive_weight, force * self.positive_weight


_BUFFERS = 10


def pair_loss(rule: PairSum, closeness: Closeness, relation: Relation) -> Executor:
    """Visit each tile once; for a batch with itself, only the upper triangle."""

    def execute(request: Request) -> Answer:
        return _visit(rule, Walk(request, closeness, relation, buffers=_BUFFERS))

    return execute


def overlap_loss(
    rule: PairSum, closeness: Closeness, relation: Relation, *, mean: bool
) -> Executor:
    """A rule over positives farther away than the nearest negative, and the reverse.

    With `mean`, it is the mean over each kind, which needs one more pass to count them.
    """

    def execute(request: Request) -> Answer:
        walk = Walk(request, closeness, relation, buffers=_BUFFERS)
        overlap = _Overlap.of(walk)
        within = replace(
            rule,
            positive=_masked(rule.positive, overlap.has_positive),
            negative=_masked(rule.negative, overlap.has_negative),
        )
        if mean:
            positives, negatives = overlap.count(walk)
            within = replace(within, positive_weight=negatives / positives, counts=negatives)
        return _visit(within, walk)

    return execute


def _visit(rule: PairSum, walk: Walk) -> Answer:
    request, per_row = walk.request, walk.a.new_zeros(walk.a.shape[0])
    forces = None if request.bias is None else walk.a.new_zeros(())
    for place in walk.places():
        tile = walk.tile(place)
        if request.bias is not None:
            tile.closeness.add_(request.bias)
        loss, force = rule.of(tile)
        part(per_row, tile.rows).add_(loss.sum(1))
        if tile.mirrored:
            part(per_row, tile.columns).add_(loss.sum(0))
        if not request.gradient:
            continue
        if request.weight is not None:
            weight = request.weight[tile.rows, None]
            force *= weight + request.weight[tile.columns] if tile.mirrored else weight
        elif tile.mirrored:
            force *= 2
        if forces is not None:
            forces += force.sum()
        walk.pull(tile, force)
    return walk.answer(per_row, rule.counts, forces=forces)


@dataclass(eq=False)
class _Overlap:
    """Where the distances of positives and of negatives overlap.

    Attributes:
        start: the distance of the nearest negative; inf without negatives.
        stop: the distance of the farthest positive; -inf without positives.
    """

    start: Tensor
    stop: Tensor

    @classmethod
    def of(cls, walk: Walk) -> "_Overlap":
        start, stop = walk.a.new_full((), inf), walk.a.new_full((), -inf)
        for tile in map(walk.tile, walk.places()):
            d = tile.closeness
            start = torch.minimum(start, d.masked_fill(~tile.negative, inf).min())
            stop = torch.maximum(stop, d.masked_fill(~tile.positive, -inf).max())
        return cls(start, stop)

    def has_positive(self, d: Tensor) -> Tensor:
        return d > self.start

    def has_negative(self, d: Tensor) -> Tensor:
        return d < self.stop

    def count(self, walk: Walk) -> tuple[Tensor, Tensor]:
        """The numbers of positives and negatives in the overlap, at least 1."""
        count = torch.zeros(2, dtype=torch.int64, device=walk.a.device)
        for tile in map(walk.tile, walk.places()):
            d, times = tile.closeness, 2 if tile.mirrored else 1
            positives = (tile.positive & self.has_positive(d)).sum()
            negatives = (tile.negative & self.has_negative(d)).sum()
            count += times * torch.stack([positives, negatives])
        positives, negatives = count.clamp(min=1).to(walk.a.dtype)
        return positives, negatives


def _masked(term: Term, where: Callable[[Tensor], Tensor]) -> Term:
    """A term that is 0, like its derivative, where `where` is false; NaN stays NaN."""

    def within(d: Tensor) -> tuple[Tensor, Tensor]:
        (loss, force), outside = term(d), ~(where(d) | d.isnan())
        return loss.masked_fill_(outside, 0), force.masked_fill_(outside, 0)

    return within
