"""Losses over the pairs where the two kinds overlap: one walk to find them, one to pay for them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import inf

import torch
from torch import Tensor

from nearfar.engine.closeness import Closeness
from nearfar.engine.elementwise import PairRule, Term, Visit, elementwise, visits
from nearfar.engine.relation import Relation
from nearfar.engine.step import Answer, Executor, Request


def overlapping(rule: PairRule, closeness: Closeness, relation: Relation, mean: bool) -> Executor:
    """A rule over the similar pairs farther than the nearest dissimilar one, and the reverse.

    With `mean`, each kind is divided by how many of it there are, which takes one more walk.
    """

    def execute(request: Request) -> Answer:
        a, b = closeness.prepare(request.a, request.b)
        walk = partial(visits, closeness, relation, a, a if b is None else b, request)
        overlap = _find(walk(), a)
        within = replace(
            rule,
            positive=_masked(rule.positive, overlap.similar),
            negative=_masked(rule.negative, overlap.dissimilar),
        )
        if mean:
            near, far = _count(walk(), a, overlap)
            within = replace(within, positive_weight=1 / near, negative_weight=1 / far)
        return elementwise(within, closeness, relation)(request)

    return execute


@dataclass(eq=False)
class _Overlap:
    """Where the distances of similar and of dissimilar pairs overlap.

    Attributes:
        start: the distance of the nearest dissimilar pair; inf where there is none.
        stop: the distance of the farthest similar pair; -inf where there is none.
    """

    start: Tensor
    stop: Tensor

    def similar(self, d: Tensor) -> Tensor:
        return d > self.start

    def dissimilar(self, d: Tensor) -> Tensor:
        return d < self.stop


def _find(walk: Iterator[Visit], a: Tensor) -> _Overlap:
    start, stop = a.new_full((), inf), a.new_full((), -inf)
    for visit in walk:
        d, (positive, negative) = visit.tile.values, visit.block.masks()
        start = torch.minimum(start, d.masked_fill(~negative, inf).min())
        stop = torch.maximum(stop, d.masked_fill(~positive, -inf).max())
    return _Overlap(start, stop)


def _count(walk: Iterator[Visit], a: Tensor, overlap: _Overlap) -> tuple[Tensor, Tensor]:
    """How many pairs of each kind there are, at least 1."""
    near = far = torch.zeros((), dtype=torch.int64, device=a.device)
    for visit in walk:
        d, (positive, negative) = visit.tile.values, visit.block.masks()
        times = 2 if visit.twice else 1
        near = near + times * (positive & overlap.similar(d)).sum()
        far = far + times * (negative & overlap.dissimilar(d)).sum()
    return near.clamp(min=1).to(a.dtype), far.clamp(min=1).to(a.dtype)


def _masked(term: Term, where: Callable[[Tensor], Tensor]) -> Term:
    """A term and its derivative, 0 outside; NaN stays NaN."""

    def within(d: Tensor, weight: float | Tensor) -> tuple[Tensor, Tensor]:
        (loss, force), outside = term(d, weight), ~(where(d) | d.isnan())
        return loss.masked_fill_(outside, 0), force.masked_fill_(outside, 0)

    return within
