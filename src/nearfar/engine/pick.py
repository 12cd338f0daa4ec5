"""Which rows to compare: the hardest, or those that chance picks, found block by block.

Every picker walks over blocks of rows against all columns, keeps some indices of each block and
drops it. Where several are equally near, the first is picked.
"""

from collections.abc import Iterator
from math import inf

import torch
from torch import Tensor

from nearfar.distance import Distance, unit
from nearfar.engine.budget import Limits
from nearfar.engine.closeness import Closeness, Euclidean, by_distance
from nearfar.engine.hinge import Anchors, beaten
from nearfar.engine.listed import Picker
from nearfar.engine.stream import row_blocks
from nearfar.relation import Block, Relation


def in_order_of(distance: Distance) -> Closeness:
    """What puts pairs in the order of a distance, at the least cost: no root is taken."""
    return by_distance("sqeuclidean" if distance == "euclidean" else distance)


def walk(
    closeness: Closeness, relation: Relation, a: Tensor, b: Tensor | None, limits: Limits
) -> Iterator[tuple[slice, Tensor, Block]]:
    """Blocks of distances between rows and all columns: which rows, how far, who is who.

    The distances are the caller's to change.
    """
    a, b = closeness.prepare(a, b)
    columns = a if b is None else b
    for rows, tile, who in row_blocks(closeness, relation, a, columns, limits):
        yield rows, tile.values, who


def hardest(closeness: Closeness, relation: Relation, *, easy_positive: bool = False) -> Picker:
    """For each anchor the nearest negative, and the farthest or nearest positive."""

    def pick(a: Tensor, b: Tensor | None, limits: Limits) -> Iterator[Tensor]:
        for rows, d, who in walk(closeness, relation, a, b, limits):
            anchors = Anchors.of(d, who, relation, rows)
            if not anchors.most:
                continue
            near = anchors.extreme(d, farthest=not easy_positive)
            nearest = anchors.hide(d).argmin(1)
            anchor = torch.arange(rows.start, rows.stop, device=d.device)
            both = (anchors.count > 0) & (anchors.n_negatives > 0)
            yield torch.stack([anchor, near, nearest], 1)[both]

    return pick


def semihard(closeness: Closeness, relation: Relation) -> Picker:
    """For each anchor and positive the nearest negative that is farther than the positive.

    Where none is farther, the farthest negative.
    """

    def pick(a: Tensor, b: Tensor | None, limits: Limits) -> Iterator[Tensor]:
        for rows, d, who in walk(closeness, relation, a, b, limits):
            anchors = Anchors.of(d, who, relation, rows)
            if not anchors.most:
                continue
            chosen = _first_beyond(d, anchors)
            none = chosen == d.shape[1]
            if none.any():
                farthest = d.masked_fill_(d == inf, -inf).argmax(1)
                chosen = torch.where(none, farthest[anchors.row], chosen)
            yield _compared(rows, anchors, chosen)

    return pick


def by_distance_weight(
    relation: Relation, seed: int, cutoff: float, nonzero_loss_cutoff: float
) -> Picker:
    """For each anchor and positive a negative drawn evenly over the distances there are."""

    def pick(a: Tensor, b: Tensor | None, limits: Limits) -> Iterator[Tensor]:
        # A generator of its own, so that every walk over the same rows draws the same.
        chance = torch.Generator().manual_seed(seed)
        a, b = unit(a), None if b is None else unit(b)
        for rows, d, who in walk(Euclidean(False), relation, a, b, limits):
            anchors = Anchors.of(d, who, relation, rows)
            if anchors.most:
                negative = who.masks()[1]
                weight = distance_weight(d, negative, a.shape[1], cutoff, nonzero_loss_cutoff)
                chosen = draw(weight, anchors.count, chance)[anchors.row, anchors.slot]
                yield _compared(rows, anchors, chosen)

    return pick


def distance_weight(
    d: Tensor, negative: Tensor, dim: int, cutoff: float, nonzero_loss_cutoff: float
) -> Tensor:
    """(b, m) by what weight each negative is drawn, float64.

    The inverse of the density of distances between random points of the sphere, so that all
    distances come equally often; constant below `cutoff`, where its variance would explode, and 0
    from `nonzero_loss_cutoff` on, where nothing costs. Where that leaves nobody, all negatives
    weigh the same.
    """
    d = d.double()
    some = negative & (d < nonzero_loss_cutoff)
    some = torch.where(some.any(1, keepdim=True), some, negative)
    d = d.clamp(cutoff, nonzero_loss_cutoff)
    log_weight = (2.0 - dim) * d.log() - (dim - 3) / 2 * (1 - d.square() / 4).log()
    log_weight = log_weight.masked_fill(~some, -inf)
    top = log_weight.amax(1, keepdim=True).masked_fill(~some.any(1, keepdim=True), 0)
    return (log_weight - top).exp()


def draw(weight: Tensor, count: Tensor, chance: torch.Generator) -> Tensor:
    """(b, most) columns, `count` a row, drawn with replacement by their weights; the others any."""
    most = int(count.max()) if len(count) else 0
    drawn = torch.rand(int(count.sum()), generator=chance, dtype=torch.float64).to(weight.device)
    wanted = torch.arange(most, device=weight.device) < count[:, None]
    share = torch.zeros(wanted.shape, dtype=torch.float64, device=weight.device)
    share[wanted] = drawn
    until = weight.cumsum(1)
    # The last column that weighs anything, at most: a share may round up to the whole.
    last = torch.searchsorted(until, until[:, -1:].contiguous()).clamp(max=until.shape[1] - 1)
    return torch.searchsorted(until, share * until[:, -1:], right=True).minimum(last)


def _first_beyond(d: Tensor, anchors: Anchors) -> Tensor:
    """For each positive the nearest negative that is farther away; the number of columns: none.

    The positives cut an anchor's negatives into shells; the nearest of each shell, and then the
    nearest of all shells beyond a positive, are what is asked. Overwrites the distances of those
    who are no negatives by inf.
    """
    most, columns = anchors.most, d.shape[1]
    ordered, order = anchors.table(d, inf).sort(1)
    far = anchors.hide(d)
    shell = beaten(ordered, far, strict=True).long()
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
