"""Losses that are a sum over pairs: one visit to each tile."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from dis import get_instructions
from functools import lru_cache
from inspect import isfunction
from math import inf
from numbers import Real
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor

from nearfar.engine import gpu
from nearfar.engine.closeness import Closeness, Tile
from nearfar.engine.listed_pairs import answer_for_list, measure_list
from nearfar.engine.pair_sets import Masked
from nearfar.engine.relation import Relation
from nearfar.engine.segments import sum_of
from nearfar.engine.slices import part
from nearfar.engine.step import Answer, ByTiles, Executor, Request
from nearfar.engine.walk import Walk
from nearfar.inputs import readable
from nearfar.reduction import Between, sum_dtype

MeanOver = Literal["kinds", "pairs", "rows"]
# Closeness -> the loss of each pair and its derivative, in new memory.
Term = Callable[[Tensor], tuple[Tensor, Tensor]]
# Closeness and losses -> bool, the pairs that do not count.
Outside = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class PairKernel:
    """The terms of a sum over pairs as GPU kernels run them, for `PairRule`.

    Either term is a function of a distance or similarity and of `numbers`, a tuple. It returns the
    loss and its derivative, and consists of sums, products, quotients and comparisons alone, whose
    results count as 0 or 1. Such a function runs in torch and is compiled for a GPU as it stands.
    Define it once, at the top of a module: each new function is compiled anew.

    Args:
        positive: the term of similar pairs.
        negative: the term of dissimilar pairs.
        numbers: the numbers that both take.

    Raises:
        TypeError: a term that cannot be compiled; `numbers` that are none.

    >>> def near(d, numbers):
    ...     return d * d, 2 * d
    >>> def far(d, numbers):
    ...     shortfall = numbers[0] - d
    ...     shortfall = shortfall * (shortfall > 0)  # instead of max(0, shortfall)
    ...     return shortfall * shortfall, -2 * shortfall
    >>> kernel = PairKernel(near, far, numbers=(2.0,))
    >>> kernel.negative(torch.tensor([0.5, 3.0]), kernel.numbers)
    (tensor([2.2500, 0.0000]), tensor([-3.,  0.]))
    """

    positive: Callable[..., Any] | str  # or the name of a function in engine/gpu/kernels/terms.py
    negative: Callable[..., Any] | str
    numbers: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if torch.compiler.is_compiling():  # which could not look at the code of a function
            return
        for name, term in (("positive", self.positive), ("negative", self.negative)):
            if not isinstance(term, str):
                wrong = _what_is_wrong(term) if isfunction(term) else _not_one(term)
                if wrong:
                    raise TypeError(f"{name} {wrong}")
        if not isinstance(self.numbers, tuple) or not all(
            isinstance(number, Real) for number in self.numbers
        ):
            raise TypeError(f"numbers must be a tuple of numbers, got {self.numbers!r}.")


def _not_one(term: object) -> str:
    return (
        "must be a function written with def, which a kernel is compiled from; got "
        f"{'a lambda' if isfunction(term) else type(term).__name__}."
    )


@lru_cache  # losses of the library make their kernel anew in each call
def _what_is_wrong(term: FunctionType) -> str:
    """Why no kernel can be compiled from a term; empty if one can."""
    if term.__name__ == "<lambda>":
        return _not_one(term)
    if term.__closure__:
        return (
            f"uses {', '.join(term.__code__.co_freevars)} of the function around it, which a "
            "kernel cannot see: pass it in numbers."
        )
    other = list(term.__code__.co_names)
    for instruction in get_instructions(term):
        if instruction.argrepr.rstrip("=") in ("**", "//", "%"):
            other.append(instruction.argrepr)
        if "JUMP" in instruction.opname and "_IF_" in instruction.opname:
            other.append("a branch")
    if not other:
        return ""
    return (
        f"uses {', '.join(dict.fromkeys(other))}. A kernel is compiled from +, -, *, / and "
        "comparisons of the distance and numbers alone: write d * d for a square, and multiply by "
        "(d > 0), which is 0 or 1, in place of a branch."
    )


@dataclass(eq=False)
class PairSum:
    """A loss that is a sum over pairs, with one term for positives and one for negatives.

    Attributes:
        positive: the term of positive pairs.
        negative: the term of negative pairs.
        mean_over: what a mean is over: similar pairs and dissimilar ones, two means that are added
            ("kinds"); all "pairs"; or "rows", the sum of whose pairs is a loss.
        kernel: the terms as GPU kernels run them; None: they cannot.
    """

    positive: Term
    negative: Term
    mean_over: MeanOver = "kinds"
    kernel: PairKernel | None = None

    def of(self, tile: Tile, positive_weight: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
        """(r, c) losses and forces. If there are few positives, they are computed from a list."""
        block, closeness = tile.block, tile.closeness
        loss, force = self.negative(closeness)
        if isinstance(block.positives, Masked):
            near, pull = self._positive(closeness, positive_weight)
            similar = block.positives.mask()
            loss, force = torch.where(similar, near, loss), torch.where(similar, pull, force)
        elif block.positives is not None:
            i, j = block.positives.indices()
            loss[i, j], force[i, j] = self._positive(closeness[i, j], positive_weight)
        if block.selves is not None:
            block.selves.fill(loss, 0)
            block.selves.fill(force, 0)
        return loss, force

    def _positive(self, closeness: Tensor, weight: float | Tensor) -> tuple[Tensor, Tensor]:
        loss, force = self.positive(closeness)
        if isinstance(weight, float) and weight == 1:
            return loss, force
        return loss * weight, force * weight


# How much a positive pair counts beside a negative one, and how much each row (n,) counts in the
# mean, or the sum of that; None: each row counts 1.
Shares = tuple[float | Tensor, Tensor | float | None]

_BUFFERS = 10


def pair_loss(
    rule: PairSum, closeness: Closeness, relation: Relation, *, overlap: bool = False
) -> Executor:
    """Visit each tile once; for a batch with itself, only the upper triangle.

    If only some pairs count, one more visit counts them for the mean.

    Args:
        rule: the loss.
        closeness: how close rows are to columns.
        relation: which pairs are similar.
        overlap: whether only positives count that are farther away than the nearest negative, and
            the reverse.
    """

    def execute(request: Request) -> Answer:
        if relation.listed is not None:
            return over_list(rule, _terms(rule), closeness, relation, request, overlap=overlap)
        if rule.kernel is not None and gpu.takes(request, closeness, relation):
            from nearfar.engine.gpu import pair_sums as on_gpu  # loads Triton

            return on_gpu.run(rule, closeness, relation, request, overlap=overlap)
        walk = Walk(request, closeness, relation, buffers=_BUFFERS)
        if request.kept is not None and rule.mean_over == "rows":
            return _over_some_rows(rule, walk, request.kept)
        outside = _Overlap.of(walk).outside() if overlap else []
        if request.kept is not None:
            by_loss = request.kept.outside
            outside.append((lambda d, loss: by_loss(loss),) * 2)
        if not outside:
            return _visit(rule, walk, shares(rule, relation, request))
        some = SomePairs(rule, outside)
        return _visit(some.rule, walk, some.shares(walk))

    return execute if relation.listed is not None else ByTiles(execute)


# Weights (p,) and (q,) of listed pairs -> the forces on them, and the gradients of learned tensors.
Pull = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Sequence[Tensor | None]]]
# The closeness of listed pairs, similar and dissimilar -> their losses, and the forces.
Terms = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Pull]]


def _terms(rule: PairSum) -> Terms:
    def terms(near: Tensor, far: Tensor) -> tuple[Tensor, Tensor, Pull]:
        (loss_near, pull), (loss_far, push) = rule.positive(near), rule.negative(far)
        return loss_near, loss_far, lambda of_near, of_far: (pull * of_near, push * of_far, ())

    return terms


def over_list(
    rule: PairSum,
    terms: Terms,
    closeness: Closeness,
    relation: Relation,
    request: Request,
    *,
    overlap: bool = False,
) -> Answer:
    """Only listed pairs.

    Args:
        rule: what a mean is over.
        terms: the losses.
        closeness: how close rows are to columns.
        relation: which pairs are listed.
        request: what is asked.
        overlap: see `pair_loss`.
    """
    pairs, n = relation.listed, relation.n
    assert pairs is not None
    rows = pairs.positive[0], pairs.negative[0]
    measured = near, far = measure_list(closeness, pairs, request)
    *losses, pull = terms(near, far)
    outside = [torch.zeros_like(d, dtype=torch.bool) for d in measured]
    if overlap:
        nearest = far.amin() if len(far) else far.new_full((), inf)
        farthest = near.amax() if len(near) else near.new_full((), -inf)
        where = _Overlap.of_all(nearest, farthest, request)
        outside[0] |= near <= where.start
        outside[1] |= far >= where.stop
    if request.kept is not None:
        outside = [o | request.kept.outside(t) for o, t in zip(outside, losses, strict=True)]
    positive_weight, counts = _shares_of_list(rule, rows, outside, request, n)
    losses = [t.masked_fill(o, 0) for t, o in zip(losses, outside, strict=True)]
    losses[0] = losses[0] * positive_weight
    by, weights = request.weight, [torch.ones_like(d) for d in measured]
    if request.each_pair:
        per_row = torch.cat(losses)
        if by is not None:
            weights = list(by.split_with_sizes([len(near), len(far)]))
    else:
        wide = sum_dtype(near)
        of_rows = [sum_of(t.to(wide), at, n) for t, at in zip(losses, rows, strict=True)]
        per_row = of_rows[0] + of_rows[1]
        if by is not None:
            weights = [by[at] for at in rows]
    weights = [one.masked_fill(o, 0) for one, o in zip(weights, outside, strict=True)]
    weights[0] = weights[0] * positive_weight
    *forces, learned = pull(*weights) if request.gradient else (*measured, ())
    of_near, of_far = (
        force.masked_fill(o, 0).to(near.dtype) for force, o in zip(forces, outside, strict=True)
    )
    answer = answer_for_list(
        closeness, relation, request, measured, (of_near, of_far), per_row, counts
    )
    return replace(answer, learned=learned, each_pair=request.each_pair)


def _shares_of_list(
    rule: PairSum,
    rows: tuple[Tensor, Tensor],
    outside: list[Tensor],
    request: Request,
    n: int,
) -> Shares:
    if request.reduction != "mean":
        return 1.0, 1.0
    inside = [at[~o] for at, o in zip(rows, outside, strict=True)]
    positives, negatives = (torch.bincount(at, minlength=n) for at in inside)
    return shares_of(rule, positives, negatives, request)


def shares(rule: PairSum, relation: Relation, request: Request) -> Shares:
    """Those of all pairs."""
    if rule.mean_over == "rows":
        return 1.0, None
    if request.reduction != "mean":
        # Not None: then a loss would be taken to show by itself that a row is NaN, and a rule may
        # ignore a distance.
        return 1.0, 1.0
    if request.weight is None and request.together is None and readable(request.a):
        similar, dissimilar = relation.n_pairs()
        if rule.mean_over == "pairs":
            return 1.0, float(similar + dissimilar)
        return max(dissimilar, 1) / max(similar, 1), float(dissimilar)
    return shares_of(rule, relation.n_positives(), relation.n_negatives(), request)


def shares_of(rule: PairSum, positives: Tensor, negatives: Tensor, request: Request) -> Shares:
    """Those of pairs of which each row has so many (n,)."""
    if rule.mean_over == "pairs":
        return 1.0, positives + negatives
    weight, together = request.weight, request.together
    numbers = torch.stack([positives, negatives])
    sums = (numbers if weight is None else numbers * weight).sum(1).to(sum_dtype(request.a))
    sums = sums if together is None else together.total(sums)
    near, far = torch.where(sums > 0, sums, 1).unbind()
    return far / near, negatives


def _visit(rule: PairSum, walk: Walk, of_pairs: Shares) -> Answer:
    request, per_row = walk.request, walk.a.new_zeros(walk.a.shape[0])
    forces = None if request.bias is None else walk.a.new_zeros(())
    positive_weight, counts = of_pairs
    for place in walk.places(pulling=request.gradient):
        tile = walk.tile(place)
        if request.bias is not None:
            tile.closeness.add_(request.bias)
        loss, force = rule.of(tile, positive_weight)
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
    if request.dealt is not None:
        per_row = request.dealt.total(per_row)
    return walk.answer(per_row, counts, forces=forces)


def _over_some_rows(rule: PairSum, walk: Walk, kept: Between) -> Answer:
    """Only rows whose loss is kept, which is known once all their pairs were visited."""
    request, gradient = walk.request, walk.gradient
    walk.request, walk.gradient = replace(request, gradient=False), None
    outside = kept.outside(_visit(rule, walk, (1.0, None)).per_row)
    weight = (~outside).to(walk.a.dtype)
    weight = weight if request.weight is None else weight * request.weight
    walk.request, walk.gradient = replace(request, weight=weight), gradient
    answer = _visit(rule, walk, (1.0, None))
    return replace(answer, per_row=answer.per_row.masked_fill(outside, 0), counts=~outside)


class SomePairs:
    """A rule of which only some pairs count.

    Args:
        rule: the loss of all pairs.
        outside: which of the positives do not count, and which of the negatives; of each entry.

    Attributes:
        rule: the loss, 0 for pairs that do not count.
    """

    def __init__(self, rule: PairSum, outside: list[tuple[Outside, Outside]]) -> None:
        self._all = rule
        self._positive, self._negative = ([each[kind] for each in outside] for kind in (0, 1))
        near, far = _some(rule.positive, self._positive), _some(rule.negative, self._negative)
        self.rule = replace(rule, positive=near, negative=far)

    def shares(self, walk: Walk) -> Shares:
        """Those of the pairs that count, which are counted if a mean is wanted."""
        if walk.request.reduction != "mean":
            return 1.0, 1.0
        numbers = torch.zeros(2, walk.a.shape[0], dtype=torch.int64, device=walk.a.device)
        for place in walk.places():
            tile = walk.tile(place)
            near = tile.positive & self._inside(tile, self._all.positive, self._positive)
            far = tile.negative & self._inside(tile, self._all.negative, self._negative)
            inside = torch.stack([near, far])
            numbers[:, tile.rows] += inside.sum(2)
            if tile.mirrored:
                numbers[:, tile.columns] += inside.sum(1)
        dealt = walk.request.dealt
        near, far = (numbers if dealt is None else dealt.total(numbers)).unbind()
        return shares_of(self._all, near, far, walk.request)

    @staticmethod
    def _inside(tile: Tile, term: Term, outside: list[Outside]) -> Tensor:
        loss, _ = term(tile.closeness)
        return ~_any(outside, tile.closeness, loss)


def _some(term: Term, outside: list[Outside]) -> Term:
    """A term that is 0, like its derivative, for pairs that do not count."""

    def within(closeness: Tensor) -> tuple[Tensor, Tensor]:
        loss, force = term(closeness)
        left_out = _any(outside, closeness, loss)
        return loss.masked_fill_(left_out, 0), force.masked_fill_(left_out, 0)

    return within


def _any(outside: list[Outside], closeness: Tensor, loss: Tensor) -> Tensor:
    found = outside[0](closeness, loss)
    for other in outside[1:]:
        found |= other(closeness, loss)
    return found


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
        return cls.of_all(start, stop, walk.request)

    @classmethod
    def of_all(cls, start: Tensor, stop: Tensor, request: Request) -> "_Overlap":
        """That of the pairs of all processes, from that of this one's."""
        together = request.together or request.dealt
        if together is not None:
            start, stop = together.largest(torch.stack([-start, stop])).unbind()
            start = -start
        return cls(start, stop)

    def outside(self) -> list[tuple[Outside, Outside]]:
        """The positives and negatives beyond it; NaN is not."""
        return [(lambda d, loss: d <= self.start, lambda d, loss: d >= self.stop)]
