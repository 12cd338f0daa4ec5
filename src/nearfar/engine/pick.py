"""Which rows to compare: the hardest, or those that chance picks, found block by block.

Every picker walks over blocks of rows against all columns, keeps some indices of each block and
drops it. Where several are equally near, the first is picked.
"""

from collections.abc import Iterator
from math import inf, log2

import torch
from torch import Tensor

from nearfar.distance import Distance, unit
from nearfar.engine.anchors import Anchors, above
from nearfar.engine.budget import Limits
from nearfar.engine.closeness import Closeness, CosineDistance, Euclidean, Tile, by_distance
from nearfar.engine.listed import Picker
from nearfar.engine.products import products
from nearfar.engine.relation import Relation
from nearfar.engine.walk import blocks
from nearfar.reduction import sum_dtype

# Copies of a block that live at once: the distances, and lists of positives and of who is nearest.
_BUFFERS = 12


def in_order_of(
    distance: Distance, a: Tensor, b: Tensor | None
) -> tuple[Closeness, Tensor, Tensor | None]:
    """What puts pairs in the order of a distance, at the least cost, and the rows for it.

    No root is taken, and rows whose squares would leave the dtype come times a power of two.
    """
    if distance == "cosine":
        return by_distance(distance), a, b
    return Euclidean(squared=True), *_moderate(a, b)


def _moderate(a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows and columns times one power of two that puts the largest entry well into the dtype."""
    given = [t for t in (a, b) if t is not None and t.numel()]
    if not given:
        return a, b
    wanted = round(log2(torch.finfo(a.dtype).max) / 2) - 14  # sums of 2^28 squares are finite
    largest = torch.stack([t.abs().amax() for t in given]).amax()
    if a.is_cpu and 2.0**-wanted < largest.item() < 2.0**wanted:
        return a, b
    highest = round(log2(torch.finfo(a.dtype).max)) - 1
    by = torch.ldexp(
        torch.ones_like(largest), (wanted - largest.frexp().exponent).clamp(max=highest)
    )
    return a * by, None if b is None else b * by


def walk(
    closeness: Closeness, relation: Relation, a: Tensor, b: Tensor | None, limits: Limits
) -> Iterator[Tile]:
    """Blocks of rows against all columns."""
    a, b = closeness.prepare(a, b)
    yield from blocks(closeness, relation, a, a if b is None else b, limits, buffers=_BUFFERS)


def hardest(distance: Distance, relation: Relation, *, easy_positive: bool = False) -> Picker:
    """For each anchor the nearest negative, and the farthest or nearest positive."""

    def ends(d: Tensor, anchors: Anchors) -> Tensor:
        positive = anchors.extreme(d, farthest=not easy_positive)
        return torch.stack([positive, anchors.mask_non_negatives(d).argmin(1)], 1)

    def pick(a: Tensor, b: Tensor | None, limits: Limits) -> Iterator[Tensor]:
        closeness, a, b = in_order_of(distance, a, b)
        a, b = closeness.prepare(a, b)
        columns = a if b is None else b
        share = CosineDistance.CANCELS if distance == "cosine" else Euclidean.CANCELS
        ranking = _Ranking(columns, unit=distance == "cosine")
        for tile in blocks(ranking, relation, a, columns, limits, buffers=_BUFFERS):
            anchors = Anchors.of(tile.block)
            if not anchors.most:
                continue
            picked = ends(tile.closeness, anchors)
            both = (anchors.count > 0) & (anchors.n_negatives > 0)
            cancels = _cancels(a[tile.rows], columns[picked], share)
            (again,) = (both & cancels).nonzero(as_tuple=True)
            if len(again):
                d, _ = closeness.measure(a[tile.rows][again], columns)
                picked[again] = ends(d, anchors.some(again))
            anchor = torch.arange(tile.rows.start, tile.rows.stop, device=a.device)
            yield torch.cat([anchor[:, None], picked], 1)[both]

    return pick


class _Ranking:
    """Of |a - b|^2 / 2 the part that ranks the columns of a row, |b|^2 / 2 - ab, unrepaired."""

    def __init__(self, columns: Tensor, *, unit: bool) -> None:
        self._half = columns.new_zeros(1) if unit else columns.square().sum(1).div_(2)

    def measure(self, a: Tensor, b: Tensor, bound: float = 1.0) -> tuple[Tensor, None]:
        return products(-a, b).add_(self._half), None


def semihard(distance: Distance, relation: Relation) -> Picker:
    """For each anchor and positive the nearest negative that is farther than the positive.

    Where none is farther, the farthest negative.
    """

    def pick(a: Tensor, b: Tensor | None, limits: Limits) -> Iterator[Tensor]:
        closeness, a, b = in_order_of(distance, a, b)
        for tile in walk(closeness, relation, a, b, limits):
            d, anchors = tile.closeness, Anchors.of(tile.block)
            if not anchors.most:
                continue
            chosen = _first_beyond(d, anchors)
            none = chosen == d.shape[1]
            if none.any():
                farthest = d.masked_fill_(d == inf, -inf).argmax(1)
                chosen = torch.where(none, farthest[anchors.row], chosen)
            yield _compared(tile.rows, anchors, chosen)

    return pick


def by_distance_weight(
    relation: Relation, seed: int, cutoff: float, nonzero_loss_cutoff: float
) -> Picker:
    """For each anchor and positive a negative drawn evenly over the distances there are."""

    def pick(a: Tensor, b: Tensor | None, limits: Limits) -> Iterator[Tensor]:
        # A generator of its own, so that every walk over the same rows draws the same.
        chance = torch.Generator().manual_seed(seed)
        a, b = unit(a), None if b is None else unit(b)
        for tile in walk(Euclidean(True), relation, a, b, limits):
            anchors = Anchors.of(tile.block)
            if anchors.most:
                squares = anchors.mask_non_negatives(tile.closeness)
                weight = distance_weight(squares, a.shape[1], cutoff, nonzero_loss_cutoff)
                chosen = draw(weight, anchors.count, chance)[anchors.row, anchors.slot]
                yield _compared(tile.rows, anchors, chosen)

    return pick


def distance_weight(squares: Tensor, dim: int, cutoff: float, nonzero_loss_cutoff: float) -> Tensor:
    """(b, m) by what weight each negative is drawn; overwrites the squared distances.

    The inverse of the density of distances between random points of the sphere, so that all
    distances come equally often; constant below `cutoff`, where its variance would explode, and 0
    from `nonzero_loss_cutoff` on, where nothing costs. Where that leaves nobody, all negatives
    weigh the same. Who is no negative stands at inf, and weighs nothing.
    """
    near = squares < nonzero_loss_cutoff**2
    alone = ~near.any(1, keepdim=True)
    q = squares.clamp(cutoff**2, nonzero_loss_cutoff**2)
    log_weight = (q / -4).log1p_().mul_((3 - dim) / 2).add_(q.log_(), alpha=(2 - dim) / 2)
    log_weight = log_weight.masked_fill_(~near, -inf)
    top = log_weight.amax(1, keepdim=True).masked_fill_(alone, 0)
    return torch.where(alone, (squares != inf).to(q.dtype), log_weight.sub_(top).exp_())


def draw(weight: Tensor, count: Tensor, chance: torch.Generator) -> Tensor:
    """(b, most) columns, `count` a row, drawn with replacement by their weights; the others any."""
    most = int(count.max()) if len(count) else 0
    drawn = torch.rand(int(count.sum()), generator=chance, dtype=torch.float64)
    wanted = torch.arange(most, device=weight.device) < count[:, None]
    share = torch.zeros(wanted.shape, dtype=sum_dtype(weight), device=weight.device)
    share[wanted] = drawn.to(share)
    until = weight.cumsum(1, dtype=share.dtype)
    # The last column that weighs anything, at most: a share may round up to the whole.
    last = torch.searchsorted(until, until[:, -1:].contiguous()).clamp(max=until.shape[1] - 1)
    return torch.searchsorted(until, share * until[:, -1:], right=True).minimum(last)


def _cancels(a: Tensor, picked: Tensor, share: float) -> Tensor:
    """(b,) whether a row (b, d) is so close to one of its picks (b, k, d) that digits cancel.

    What is picked without those digits need not be the closest.
    """
    sizes = a.square().sum(1)[:, None] + picked.square().sum(2)
    return ((a[:, None] - picked).square().sum(2) < share * sizes).any(1)


def _first_beyond(d: Tensor, anchors: Anchors) -> Tensor:
    """For each positive the nearest negative that is farther away; the number of columns: none.

    The positives cut an anchor's negatives into shells; the nearest of each shell, and then the
    nearest of all shells beyond a positive, are what is asked. Overwrites the distances of those
    who are no negatives by inf.
    """
    most, columns = anchors.most, d.shape[1]
    ordered, order = anchors.table(d, inf).sort(1)
    far = anchors.mask_non_negatives(d)
    shell = above(ordered, far).long()
    least = d.new_full((len(d), most + 1), inf).scatter_reduce_(1, shell, far, "amin")
    row, column = (far == least.gather(1, shell)).nonzero(as_tuple=True)
    first = torch.full_like(least, columns, dtype=torch.long)
    place = row * (most + 1) + shell[row, column]
    first.view(-1).scatter_reduce_(0, place, column, "amin")
    first.masked_fill_(least == inf, columns)
    # From the outermost shell inwards.
    outer = least.flip(1).cummin(1)
    beyond = first.flip(1).gather(1, outer.indices).flip(1)[:, 1:]
    by_slot = torch.empty_like(beyond).scatter_(1, order, beyond)
    return by_slot[anchors.row, anchors.slot]


def _compared(rows: slice, anchors: Anchors, chosen: Tensor) -> Tensor:
    """(t, 3) anchor, positive and chosen negative, where the anchor has a negative."""
    triplets = torch.stack([anchors.row + rows.start, anchors.column, chosen], 1)
    return triplets[anchors.n_negatives[anchors.row] > 0]
