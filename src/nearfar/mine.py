"""Miners: select which rows of a batch or of a reference to compare, for use with any loss.

Miners work on blocks of rows, so no (n, m) matrix is ever held. They return int64 indices whatever
the dtype of the labels, and the same result for the same input and generator. Results have no
gradient.
"""

from collections.abc import Callable, Iterator
from math import inf

import torch
from torch import Tensor

from nearfar.distance import Distance, check_distance, unit
from nearfar.engine.budget import current_limits
from nearfar.engine.closeness import by_distance, sharpen
from nearfar.engine.pick import distance_weight, draw, semihard
from nearfar.engine.relation import Block, Relation
from nearfar.engine.walk import blocks
from nearfar.inputs import ArrayLike, between, lift, tensor
from nearfar.labels import listed_rows
from nearfar.losses.batch import as_batch
from nearfar.losses.batch_tuples import CUTOFF, NONZERO_LOSS_CUTOFF, seed
from nearfar.pairs import Found, FoundPairs
from nearfar.reference import Reference, check_reference

__all__ = [
    "Found",
    "FoundPairs",
    "distance_weighted_negatives",
    "hard_negatives",
    "hard_positives",
    "multi_similarity_pairs",
    "semihard_triplets",
]


def hard_negatives(
    x: ArrayLike,
    labels: ArrayLike | None,
    *,
    k: int = 1,
    distance: Distance = "euclidean",
    margin: float | None = None,
    relative_margin: float | None = None,
    score_range: tuple[float, float] | None = None,
    exclude: ArrayLike | None = None,
    reference: Reference | None = None,
) -> Found:
    r"""The k nearest negatives of each row, with guards against false negatives.

    A negative that is nearer than a known positive may be an unlabelled positive. With the score
    :math:`s = \cos` for "cosine" and :math:`s = -d` for the other distances, and :math:`s^+` the
    lowest score of the row's positives, the guards keep a negative only if

    .. math:: s \le s^+ - m, \qquad s \le s^+ - r\,|s^+|, \qquad low \le s \le high

    The absolute value makes the relative margin work for scores below 0. A row without positives
    has no :math:`s^+`; only the range applies to it.

    Args:
        x: (n, d) embeddings.
        labels: (n,) class ids, or (n, c) bool multi-labels; rows that share a label are similar.
            None: no two rows are similar except those listed in `exclude`.
        k: how many negatives.
        distance: "euclidean", "sqeuclidean", "cosine", "snr", "manhattan" or the p of a p-norm.
        margin: m, how much farther than the farthest positive a negative must be, in units of the
            distance.
        relative_margin: r, 0 or more, the same as a share of the positive's score.
        score_range: (low, high) scores to keep.
        exclude: (n, e) int64, further known positives, as rows of the reference or of the batch; -1
            for none.
        reference: rows to search instead of the other rows of the batch; without labels if
            `labels` is None, `Reference(x, None)`.

    Returns:
        `Found`, nearest first.

    Raises:
        TypeError: labels that are not class ids or bool multi-labels.
        ValueError: a shape, length, device or hyperparameter out of range.

    >>> x = torch.tensor([[0.0, 0], [0, 1], [0.5, 0], [2, 0], [5, 5]])
    >>> found = hard_negatives(x, [0, 0, 1, 1, 2], k=2)
    >>> found.indices[0], found.distances[0]
    (tensor([2, 3]), tensor([0.5000, 2.0000]))
    >>> hard_negatives(x, [0, 0, 1, 1, 2], margin=0.5).indices[0]  # not nearer than 1 + 0.5
    tensor([3])

    Source: the guards are those of `mine_hard_negatives` in sentence-transformers, which also uses
    the lowest positive score; Moreira et al., "NV-Retriever", 2024.
    """
    _at_least_one(k)
    if margin is not None:
        between("margin", margin, -inf, inf)
    if relative_margin is not None:
        between("relative_margin", relative_margin, 0, inf)
    low, high = _range(score_range)
    rows, columns, relation = _compare(x, labels, reference, distance)
    known = None
    if exclude is not None:
        known = listed_rows("exclude", exclude, len(rows), relation.m, rows.device)

    def in_block(where: slice, d: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        positive, negative = block.masks()
        if known is not None:
            also = _mark(known[where], d)
            if block.selves is not None:  # no row is its own positive
                also &= ~block.selves.mask()
            positive, negative = positive | also, negative & ~also
        score = 1 - d if distance == "cosine" else -d
        if not d.shape[1]:
            return _nearest(d, k)
        lowest = score.masked_fill(~positive, inf).amin(1, keepdim=True)
        if margin is not None:
            negative &= score <= lowest - margin
        if relative_margin is not None:
            limit = lowest - relative_margin * lowest.abs()
            negative &= (score <= limit) | (lowest == inf)
        if score_range is not None:
            negative &= (score >= low) & (score <= high)
        return _nearest(d.masked_fill(~negative, inf), k)

    return _for_each_row(in_block, rows, columns, relation, distance, k)


def hard_positives(
    x: ArrayLike,
    labels: ArrayLike,
    *,
    k: int = 1,
    distance: Distance = "euclidean",
    reference: Reference | None = None,
) -> Found:
    """The k farthest positives of each row.

    Args:
        x: (n, d) embeddings.
        labels: (n,) class ids, or (n, c) bool multi-labels; rows that share a label are similar.
        k: how many positives.
        distance: "euclidean", "sqeuclidean", "cosine", "snr", "manhattan" or the p of a p-norm.
        reference: rows to search instead of the other rows of the batch.

    Returns:
        `Found`, farthest first.

    Raises:
        TypeError: labels that are not class ids or bool multi-labels.
        ValueError: a shape, length, device or hyperparameter out of range.

    >>> x = torch.tensor([[0.0, 0], [0, 1], [0, 3], [2, 0]])
    >>> hard_positives(x, [0, 0, 0, 1], k=2).indices
    tensor([[ 2,  1],
            [ 2,  0],
            [ 0,  1],
            [-1, -1]])

    Source: Hermans, Beyer & Leibe, "In Defense of the Triplet Loss for Person Re-Identification",
    2017.
    """
    _at_least_one(k)
    rows, columns, relation = _compare(x, labels, reference, distance)

    def in_block(where: slice, d: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        far, index = _nearest((-d).masked_fill(~block.masks()[0], inf), k)
        return far.neg().masked_fill(index < 0, inf), index

    return _for_each_row(in_block, rows, columns, relation, distance, k)


def semihard_triplets(
    x: ArrayLike,
    labels: ArrayLike,
    *,
    distance: Distance = "euclidean",
    max: int | None = None,
    generator: torch.Generator | None = None,
    reference: Reference | None = None,
) -> Tensor:
    r"""For each anchor and positive, the nearest negative that is farther than the positive.

    If no negative is farther, the anchor's farthest negative is taken, as in
    `batch_triplet_loss(select="semihard")`.

    Args:
        x: (n, d) embeddings.
        labels: (n,) class ids, or (n, c) bool multi-labels; rows that share a label are similar.
        distance: "euclidean", "sqeuclidean", "cosine", "snr", "manhattan" or the p of a p-norm.
        max: how many triplets at most, drawn at random; None: all.
        generator: for the draw; None: torch's own.
        reference: rows to take positives and negatives from instead of the batch.

    Returns:
        (t, 3) int64, the anchor, positive and negative of each triplet, sorted by anchor and
        positive.

    Raises:
        TypeError: labels that are not class ids or bool multi-labels.
        ValueError: a shape, length, device or hyperparameter out of range.

    >>> x = torch.tensor([[0.0, 0], [0, 1], [0.5, 0], [1.5, 0]])
    >>> semihard_triplets(x, [0, 0, 1, 1])
    tensor([[0, 1, 3],
            [1, 0, 2],
            [2, 3, 1],
            [3, 2, 0]])

    Source: Schroff, Kalenichenko & Philbin, "FaceNet", CVPR 2015.
    """
    if max is not None:
        _at_least_one(max, "max")
    rows, columns, relation = _compare(x, labels, reference, distance)
    none = torch.zeros(0, 3, dtype=torch.int64, device=rows.device)
    pick = semihard(check_distance(distance), relation)
    found = pick(*_scaled(rows, columns, distance), current_limits())
    if max is None:
        return torch.cat([*found, none])
    # Keep the triplets with the highest random numbers so far, never more than `max`.
    random = torch.Generator().manual_seed(seed(generator))
    kept, keys = none, torch.zeros(0, dtype=torch.float64)
    for triplets in found:
        drawn = torch.rand(len(triplets), generator=random, dtype=torch.float64)
        kept, keys = torch.cat([kept, triplets]), torch.cat([keys, drawn])
        best = keys.topk(min(max, len(keys))).indices.sort().values
        kept, keys = kept[best.to(kept.device)], keys[best]
    return kept


def multi_similarity_pairs(
    x: ArrayLike,
    labels: ArrayLike,
    *,
    epsilon: float = 0.1,
    distance: Distance = "cosine",
    reference: Reference | None = None,
) -> FoundPairs:
    r"""The negatives nearer than an anchor's farthest positive, and the reverse, within epsilon.

    With :math:`s` the cosine, or the negated distance, the pairs with

    .. math:: s_{in} > \min_{p} s_{ip} - \epsilon, \qquad s_{ip} < \max_{n} s_{in} + \epsilon

    Anchors without a positive or without a negative have no pairs.

    Args:
        x: (n, d) embeddings.
        labels: (n,) class ids, or (n, c) bool multi-labels; rows that share a label are similar.
        epsilon: how far beyond the limit a pair may be and still be selected.
        distance: "cosine" (the paper's), "euclidean", "sqeuclidean", "snr", "manhattan" or the p of
            a p-norm.
        reference: rows to compare with instead of the other rows of the batch.

    Returns:
        `FoundPairs`, sorted by row. Their number depends on how much the classes overlap; it may
        be all pairs.

    Raises:
        TypeError: labels that are not class ids or bool multi-labels.
        ValueError: a shape, length, device or hyperparameter out of range.

    >>> x = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1], [-0.6, 0.8]])
    >>> found = multi_similarity_pairs(x, [0, 0, 1, 1], epsilon=0.3)
    >>> found.positive
    tensor([[1, 0],
            [2, 3]])
    >>> found.negative
    tensor([[1, 2],
            [2, 1]])

    Source: Wang et al., "Multi-Similarity Loss with General Pair Weighting for Deep Metric
    Learning", CVPR 2019, equations 11 and 12.
    """
    between("epsilon", epsilon, -inf, inf)
    rows, columns, relation = _compare(x, labels, reference, distance)
    positive: list[Tensor] = []
    negative: list[Tensor] = []
    for where, d, block in _distances(rows, columns, relation, distance):
        near, far = block.masks()
        if not d.shape[1]:
            continue
        farthest = d.masked_fill(~near, -inf).amax(1, keepdim=True)
        nearest = d.masked_fill(~far, inf).amin(1, keepdim=True)
        both = near.any(1, keepdim=True) & far.any(1, keepdim=True)
        for kept, mask in (
            (positive, near & both & (d > nearest - epsilon)),
            (negative, far & both & (d < farthest + epsilon)),
        ):
            kept.append(mask.nonzero() + torch.tensor([where.start, 0], device=d.device))
    none = torch.zeros(0, 2, dtype=torch.int64, device=rows.device)
    return FoundPairs(torch.cat([*positive, none]), torch.cat([*negative, none]))


def distance_weighted_negatives(
    x: ArrayLike,
    labels: ArrayLike,
    *,
    k: int = 1,
    cutoff: float = CUTOFF,
    nonzero_loss_cutoff: float = NONZERO_LOSS_CUTOFF,
    generator: torch.Generator | None = None,
    reference: Reference | None = None,
) -> Found:
    r"""k negatives of each row, drawn so that all distances are equally likely.

    Nearly all random unit vectors in D dimensions are :math:`\sqrt 2` apart. Each negative is
    therefore drawn, with replacement, with weight

    .. math:: \min(\lambda, 1 / q(d)), \qquad q(d) \propto d^{D-2} (1 - d^2 / 4)^{(D-3)/2}

    where d is the distance between the rows scaled to length 1.

    Args:
        x: (n, D) embeddings; only their directions count.
        labels: (n,) class ids, or (n, c) bool multi-labels; rows that share a label are similar.
        k: how many negatives.
        cutoff: smaller distances get the weight of this distance, which is lambda.
        nonzero_loss_cutoff: negatives at this distance or farther are drawn only if there are no
            others; then all have the same weight.
        generator: for the draw; None: torch's own.
        reference: rows to draw from instead of the other rows of the batch.

    Returns:
        `Found`, in the order they were drawn, with distances between unit rows.

    Raises:
        TypeError: labels that are not class ids or bool multi-labels.
        ValueError: a shape, length, device or hyperparameter out of range.

    >>> x = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1], [-1, 0.1]])
    >>> random = torch.Generator().manual_seed(0)
    >>> distance_weighted_negatives(x, [0, 0, 1, 1], k=3, generator=random).indices[1]
    tensor([2, 2, 2])

    Source: Wu, Manmatha, Smola & Krähenbühl, "Sampling Matters in Deep Embedding Learning", ICCV
    2017, section 4.
    """
    _at_least_one(k)
    between("cutoff", cutoff, 1e-3, 2)
    between("nonzero_loss_cutoff", nonzero_loss_cutoff, cutoff, 2)
    rows, columns, relation = _compare(x, labels, reference, "cosine")
    rows, columns = _scaled(rows, columns, "cosine")
    random = torch.Generator().manual_seed(seed(generator))
    every = torch.full((len(rows),), k, device=rows.device)

    def in_block(where: slice, d: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        negative = block.masks()[1]
        if not d.shape[1]:
            return _nearest(d, k)
        squares = d.masked_fill(~negative, inf)
        weight = distance_weight(squares, rows.shape[1], cutoff, nonzero_loss_cutoff)
        index = draw(weight, every[where], random)
        none = ~negative.any(1, keepdim=True)
        return d.gather(1, index).sqrt().masked_fill(none, inf), index.masked_fill(none, -1)

    return _for_each_row(in_block, rows, columns, relation, "sqeuclidean", k)


def _compare(
    x: ArrayLike,
    labels: ArrayLike | None,
    reference: Reference | None,
    distance: Distance,
) -> tuple[Tensor, Tensor | None, Relation]:
    """Rows and columns without gradient, and their relation."""
    check_distance(distance)
    if labels is None:
        labels, reference = _all_different(x, reference)
    rows, columns, relation = as_batch(x, labels, reference, "mean")  # no backward pass follows
    rows = lift("x", rows.detach())
    columns = None if columns is None else lift("reference.x", columns.detach())
    if columns is not None and columns.dtype != rows.dtype:
        common = torch.promote_types(rows.dtype, columns.dtype)
        rows, columns = rows.to(common), columns.to(common)
    return rows, columns, relation


def _all_different(x: ArrayLike, reference: Reference | None) -> tuple[Tensor, Reference | None]:
    """Distinct labels, for rows without labels."""
    items = tensor("x", x)
    n, device = len(items), items.device
    labels = torch.arange(n, device=device)
    if reference is None:
        return labels, None
    check_reference(reference)
    if reference.labels is not None:
        raise TypeError(
            "labels must be given if the reference has labels: pass both, or neither as in "
            "reference=nearfar.Reference(x, None)."
        )
    others = len(tensor("reference.x", reference.x))
    different = torch.arange(n, n + others, device=device)
    return labels, Reference(reference.x, different, reference.own)


def _scaled(
    rows: Tensor, columns: Tensor | None, distance: Distance
) -> tuple[Tensor, Tensor | None]:
    """Rows and columns at unit length for cosines, unchanged otherwise."""
    if distance != "cosine":
        return rows, columns
    return unit(rows), None if columns is None else unit(columns)


def _distances(
    rows: Tensor, columns: Tensor | None, relation: Relation, distance: Distance
) -> Iterator[tuple[slice, Tensor, Block]]:
    """Blocks of rows: the rows, their distances to all columns, and which pairs are similar."""
    closeness = by_distance(distance)
    a, b = closeness.prepare(*_scaled(rows, columns, distance))
    others = a if b is None else b
    for tile in blocks(closeness, relation, a, others, current_limits()):
        d, unscaled = tile.closeness, rows if columns is None else columns
        if distance == "cosine":
            sharpen(d, tile.repaired, rows[tile.rows], unscaled)
        yield tile.rows, d, tile.block


InBlock = Callable[[slice, Tensor, Block], tuple[Tensor, Tensor]]


def _for_each_row(
    in_block: InBlock,
    rows: Tensor,
    columns: Tensor | None,
    relation: Relation,
    distance: Distance,
    k: int,
) -> Found:
    """Collect the distances and indices found in each block."""
    distances = rows.new_full((len(rows), k), inf)
    indices = torch.full((len(rows), k), -1, device=rows.device)
    for where, d, block in _distances(rows, columns, relation, distance):
        distances[where], indices[where] = in_block(where, d, block)
    return Found(indices, distances)


def _nearest(d: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(b, k) the smallest distances and their columns; inf and -1 if there are fewer."""
    least = d.topk(min(k, d.shape[1]), largest=False)
    distances, indices = d.new_full((len(d), k), inf), least.indices.new_full((len(d), k), -1)
    distances[:, : d.shape[1]] = least.values
    indices[:, : d.shape[1]] = least.indices.masked_fill(least.values == inf, -1)
    return distances, indices


def _mark(known: Tensor, d: Tensor) -> Tensor:
    """(b, m) bool, true at the known columns of each row."""
    marks = torch.zeros(len(d), d.shape[1] + 1, dtype=torch.bool, device=d.device)
    marks.scatter_(1, torch.where(known < 0, d.shape[1], known), True)
    return marks[:, :-1]


def _range(score_range: tuple[float, float] | None) -> tuple[float, float]:
    if score_range is None:
        return -inf, inf
    try:
        low, high = map(float, score_range)
    except (TypeError, ValueError):
        low, high = inf, -inf
    if not low <= high:
        raise ValueError(
            f"score_range must be two numbers (low, high), low <= high, got {score_range!r}."
        )
    return low, high


def _at_least_one(k: int, name: str = "k") -> None:
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {k!r}.")
