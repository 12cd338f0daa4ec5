"""Selecting which rows to compare, the hardest or at random, block by block.

Each picker goes through blocks of rows against all columns and keeps only the selected indices. Of
several equally near rows, the first is selected.
"""

from collections.abc import Iterator
from math import inf, log2
from typing import get_args

import torch
from torch import Tensor

from nearfar.distance import Distance, EuclideanDistance, unit
from nearfar.engine.anchors import Anchors, above
from nearfar.engine.budget import Limits, block
from nearfar.engine.closeness import (
    Closeness,
    CosineDistance,
    Euclidean,
    Tile,
    by_distance,
    prepared,
    squares_of_directions,
)
from nearfar.engine.listed_tuples import Picker
from nearfar.engine.precision import Precision
from nearfar.engine.products import products
from nearfar.engine.relation import Relation
from nearfar.engine.slices import spans
from nearfar.engine.step import Request
from nearfar.engine.walk import Measure, blocks
from nearfar.inputs import between, readable
from nearfar.reduction import sum_dtype

# Copies of a block held at the same time: distances, lists of positives, and the nearest rows.
_BUFFERS = 12
# The same for a list of all triplets of some positive pairs: masks and indices.
_LISTING = 32


def order_preserving(
    distance: Distance, a: Tensor, b: Tensor | None, precision: Precision
) -> tuple[Closeness, Tensor, Tensor | None]:
    """The cheapest closeness that orders pairs like a distance, and the rows for it.

    For the Euclidean distance it takes no square root, and scales rows by a power of two if their
    squares over- or underflow.
    """
    if distance in ("euclidean", "sqeuclidean"):
        # What float16 holds can be squared; but scaled, it may not hold the rows.
        scaled = (a, b) if precision == "float16" else _scaled_to_square(a, b)
        return Euclidean(squared=True), *scaled
    return by_distance(distance), a, b


def _scaled_to_square(a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows and columns times a power of two such that their squares neither overflow nor vanish."""
    given = [t for t in (a, b) if t is not None and t.numel()]
    if not given:
        return a, b
    exponent = round(log2(torch.finfo(a.dtype).max) / 2) - 14  # sums of 2^28 squares are finite
    largest = torch.stack([t.abs().amax() for t in given]).amax()
    if readable(a) and 2.0**-exponent < largest.item() < 2.0**exponent:
        return a, b
    highest = round(log2(torch.finfo(a.dtype).max)) - 1
    by = torch.ldexp(
        torch.ones_like(largest), (exponent - largest.frexp().exponent).clamp(max=highest)
    )
    return a * by, None if b is None else b * by


def walk(
    closeness: Closeness,
    relation: Relation,
    a: Tensor,
    b: Tensor | None,
    limits: Limits,
    precision: Precision,
) -> Iterator[Tile]:
    """Blocks of rows against all columns."""
    a, b = prepared(closeness, a, b, precision)
    where = closeness, relation, a, a if b is None else b, limits
    yield from blocks(*where, buffers=_BUFFERS, precision=precision)


def hardest(distance: Distance, relation: Relation, *, easy_positive: bool = False) -> Picker:
    """For each anchor the farthest or nearest positive, and the nearest negative."""

    def extremes(d: Tensor, anchors: Anchors) -> Tensor:
        positive = anchors.extreme(d, farthest=not easy_positive)
        return torch.stack([positive, anchors.mask_non_negatives(d).argmin(1)], 1)

    def pick(a: Tensor, b: Tensor | None, limits: Limits, precision: Precision) -> Iterator[Tensor]:
        closeness, a, b = order_preserving(distance, a, b, precision)
        a, b = prepared(closeness, a, b, precision)
        columns = a if b is None else b
        ranking: Measure = closeness
        share = 0.0  # of the digits nothing cancels
        if distance in get_args(EuclideanDistance):
            ranking = _Ranking(columns, distance == "cosine", precision)
            share = CosineDistance.CANCELS if distance == "cosine" else Euclidean.CANCELS
        where = ranking, relation, a, columns, limits
        for tile in blocks(*where, buffers=_BUFFERS, precision=precision):
            anchors = Anchors.of(tile.block)
            if not anchors.most:
                continue
            picked = extremes(tile.closeness, anchors)
            both = (anchors.count > 0) & (anchors.n_negatives > 0)
            cancels = _cancels(a[tile.rows], columns[picked], share)
            (again,) = (both & cancels).nonzero(as_tuple=True)
            if len(again):
                some = a[tile.rows][again]
                d, _ = closeness.measure(some, columns, precision=precision)
                picked[again] = extremes(d, anchors.some(again))
            rows = tile.rows
            del tile  # its memory is free while the picks are used
            anchor = torch.arange(rows.start, rows.stop, device=a.device)
            yield torch.cat([anchor[:, None], picked], 1)[both]

    def on_gpu(request: Request) -> Tensor:
        from nearfar.engine.gpu import tuples  # loads Triton

        return tuples.hardest(request, by_distance(distance), relation, easy_positive=easy_positive)

    return Picker(pick, on_gpu)


class _Ranking:
    """The part of |a - b|^2 / 2 that ranks the columns of a row: |b|^2 / 2 - ab, unrepaired."""

    def __init__(self, columns: Tensor, cosine: bool, precision: Precision) -> None:
        if not cosine:
            self._half = columns.square().sum(1).div_(2)
        elif precision == "float32":  # all have length 1
            self._half = columns.new_zeros(1)
        else:
            self._half = squares_of_directions(columns).div_(2)

    def measure(
        self, a: Tensor, b: Tensor, bound: float = 1.0, *, precision: Precision = "float32"
    ) -> tuple[Tensor, None]:
        return products(-a, b, precision=precision).add_(self._half), None


def semihard(distance: Distance, relation: Relation) -> Picker:
    """For each anchor and positive, the nearest negative farther than the positive.

    If none is farther, the farthest negative.
    """

    def pick(a: Tensor, b: Tensor | None, limits: Limits, precision: Precision) -> Iterator[Tensor]:
        closeness, a, b = order_preserving(distance, a, b, precision)
        for tile in walk(closeness, relation, a, b, limits, precision):
            d, anchors = tile.closeness, Anchors.of(tile.block)
            if not anchors.most:
                continue
            chosen = _first_beyond(d, anchors)
            none = chosen == d.shape[1]
            if none.any():
                farthest = d.masked_fill_(d == inf, -inf).argmax(1)
                chosen = torch.where(none, farthest[anchors.row], chosen)
            yield _triplets(tile.rows, anchors, chosen)

    return Picker(pick)


def by_distance_weight(
    relation: Relation, seed: int, cutoff: float, nonzero_loss_cutoff: float
) -> Picker:
    """For each anchor and positive, a negative drawn so that all distances are equally likely."""
    before = rows_before(relation)

    def pick(a: Tensor, b: Tensor | None, limits: Limits, precision: Precision) -> Iterator[Tensor]:
        # A new generator, so that every pass over the same rows draws the same negatives.
        chance = torch.Generator().manual_seed(seed)
        if before is not None:
            _skip(chance, int(before.n_positives().sum()))
        a, b = unit(a), None if b is None else unit(b)
        for tile in walk(Euclidean(True), relation, a, b, limits, precision):
            anchors = Anchors.of(tile.block)
            if anchors.most:
                squares = anchors.mask_non_negatives(tile.closeness)
                weight = distance_weight(squares, a.shape[1], cutoff, nonzero_loss_cutoff)
                chosen = draw(weight, anchors.count, chance)[anchors.row, anchors.slot]
                yield _triplets(tile.rows, anchors, chosen)

    return Picker(pick)


def distance_weight(squares: Tensor, dim: int, cutoff: float, nonzero_loss_cutoff: float) -> Tensor:
    """(b, m) the sampling weight of each negative; overwrites the squared distances.

    The inverse of the density of distances between random points on the sphere, which makes all
    distances equally likely. It is constant below `cutoff`, where its variance would explode, and 0
    from `nonzero_loss_cutoff` on, where losses are 0. If that leaves no negative, all negatives
    have the same weight. Columns that are not negatives are at inf and have weight 0.
    """
    near = squares < nonzero_loss_cutoff**2
    none_near = ~near.any(1, keepdim=True)
    # At distances 0 and 2 the density may be 0, and the weight infinite: there it is so large that
    # it outweighs all others.
    limits = torch.finfo(squares.dtype)
    low, high = max(cutoff**2, limits.tiny), min(nonzero_loss_cutoff**2, 4 * (1 - limits.eps))
    q = squares.clamp(low, high)
    log_weight = (q / -4).log1p_().mul_((3 - dim) / 2).add_(q.log_(), alpha=(2 - dim) / 2)
    log_weight = log_weight.masked_fill_(~near, -inf)
    top = log_weight.amax(1, keepdim=True).masked_fill_(none_near, 0)
    return torch.where(none_near, (squares != inf).to(q.dtype), log_weight.sub_(top).exp_())


def draw(weight: Tensor, count: Tensor, chance: torch.Generator) -> Tensor:
    """(b, most) columns drawn with replacement by weight; the first `count` of a row are valid."""
    most = int(count.max()) if len(count) else 0
    drawn = torch.rand(int(count.sum()), generator=chance, dtype=torch.float64)
    wanted = torch.arange(most, device=weight.device) < count[:, None]
    share = torch.zeros(wanted.shape, dtype=sum_dtype(weight), device=weight.device)
    share[wanted] = drawn.to(share)
    until = weight.cumsum(1, dtype=share.dtype)
    # At most the last column with a weight above 0: a share may round up to the whole.
    last = torch.searchsorted(until, until[:, -1:].contiguous()).clamp(max=until.shape[1] - 1)
    return torch.searchsorted(until, share * until[:, -1:], right=True).minimum(last)


def _cancels(a: Tensor, picked: Tensor, share: float) -> Tensor:
    """(b,) whether a row (b, d) is so close to one of its picks (b, k, d) that digits cancel.

    The pick may then be wrong, and is repeated with accurate distances.
    """
    sizes = a.square().sum(1)[:, None] + picked.square().sum(2)
    return ((a[:, None] - picked).square().sum(2) < share * sizes).any(1)


def _first_beyond(d: Tensor, anchors: Anchors) -> Tensor:
    """For each positive the nearest negative that is farther away; the number of columns if none.

    The distances of an anchor's positives divide its negatives into shells. This finds the nearest
    negative of each shell, then of all shells beyond each positive. Overwrites `d` by inf wherever
    there is no negative.
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


def _triplets(rows: slice, anchors: Anchors, chosen: Tensor) -> Tensor:
    """(t, 3) anchor, positive and chosen negative, for anchors that have a negative."""
    triplets = torch.stack([anchors.row + rows.start, anchors.column, chosen], 1)
    return triplets[anchors.n_negatives[anchors.row] > 0]


def every(relation: Relation) -> Picker:
    """Every triplet: each positive of an anchor with each of its negatives."""

    def pick(a: Tensor, b: Tensor | None, limits: Limits, precision: Precision) -> Iterator[Tensor]:
        step = block(limits, a.device, a.element_size(), _LISTING, relation.m)
        for rows in spans(relation.n, step):
            here = relation.block(rows, slice(0, relation.m))
            anchors, negative = Anchors.of(here), here.masks()[1]
            for some in spans(len(anchors.row), step):
                row, column = anchors.row[some], anchors.column[some]
                yield triplets_of_pairs(rows, row, column, negative[row])

    return Picker(pick)


def triplets_of_pairs(rows: slice, row: Tensor, column: Tensor, negative: Tensor) -> Tensor:
    """(t, 3) the triplets of some pairs of an anchor and a positive.

    Args:
        rows: of the block.
        row: (k,) the row of each anchor in the block.
        column: (k,) its positive.
        negative: (k, m) bool, its negatives.
    """
    pair, chosen = negative.nonzero(as_tuple=True)
    return torch.stack([row[pair] + rows.start, column[pair], chosen], 1)


def at_random(relation: Relation, k: int, seed: int) -> Picker:
    """For each anchor k positives and negatives, drawn evenly and with replacement."""
    before = rows_before(relation)

    def pick(a: Tensor, b: Tensor | None, limits: Limits, precision: Precision) -> Iterator[Tensor]:
        # A new generator, so that every pass over the same rows draws the same triplets.
        chance = torch.Generator().manual_seed(seed)
        if before is not None:
            both = (before.n_positives() > 0) & (before.n_negatives() > 0)
            _skip(chance, int(both.sum()) * k * 2)
        step = block(limits, a.device, a.element_size(), _BUFFERS, relation.m)
        for rows in spans(relation.n, step):
            anchors = Anchors.of(relation.block(rows, slice(0, relation.m)))
            (row,) = ((anchors.count > 0) & (anchors.n_negatives > 0)).nonzero(as_tuple=True)
            if not len(row):
                continue
            drawn = torch.rand(len(row), k, 2, generator=chance, dtype=torch.float64)
            share = drawn.to(a.device, sum_dtype(a)).unbind(2)
            n_negatives = anchors.n_negatives[row, None]
            positive = anchors.first[row, None] + _of(share[0], anchors.count[row, None])
            negative = anchors.nth_negative(row[:, None], _of(share[1], n_negatives))
            anchor = (row + rows.start)[:, None].expand_as(negative)
            yield torch.stack([anchor, anchors.column[positive], negative], 2).flatten(0, 1)

    return Picker(pick)


def rows_before(relation: Relation) -> Relation | None:
    """The relation of the rows of processes before this one; None: there are none.

    What is drawn for them is skipped, so that several processes draw what one would.
    """
    labels, n = relation.column_labels, relation.first
    if not n or labels is None:
        return None
    own = torch.arange(n, device=relation.device)
    return Relation(n, relation.m, relation.device, labels[:n], labels, own, first=0)


def _skip(chance: torch.Generator, numbers: int) -> None:
    """Draw numbers that nobody takes."""
    for at in spans(numbers, 2**20):
        torch.rand(at.stop - at.start, generator=chance, dtype=torch.float64)


def _of(share: Tensor, count: Tensor) -> Tensor:
    """A whole number from 0 to count - 1 from a share of 0 to 1."""
    return (share * count).long().minimum(count - 1)


def check_cutoffs(cutoff: float, nonzero_loss_cutoff: float) -> None:
    """Refuse cutoffs that are no distances of unit rows, or in the wrong order."""
    between("cutoff", cutoff, 0, 2, ", a distance of rows of length 1")
    between("nonzero_loss_cutoff", nonzero_loss_cutoff, cutoff, 2)


def seed(generator: torch.Generator | None) -> int:
    """Draw a seed from a generator, for one whose draws can be repeated."""
    check_generator(generator)
    device = None if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=device))


def check_generator(generator: object) -> None:
    """Refuse what is no generator."""
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(
            f"generator must be a torch.Generator, got {generator!r}. For a seed pass "
            "torch.Generator().manual_seed(seed)."
        )
