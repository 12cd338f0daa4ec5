"""Miners of rows: some negatives or positives of each anchor."""

from math import inf

import torch
from torch import Tensor

from nearfar.distance import Distance
from nearfar.engine.meeting import Group, confirmed, over_processes
from nearfar.engine.pick import check_cutoffs, distance_weight, draw
from nearfar.engine.relation import Block
from nearfar.inputs import ArrayLike, between, positive_integer
from nearfar.labels import listed_rows
from nearfar.listed import Found
from nearfar.mine.comparison import Comparison, bounds, nearest
from nearfar.reference import ReferenceLike


@over_processes
def hard_negatives(
    x: ArrayLike,
    labels: ArrayLike | None,
    *,
    k: int = 1,
    distance: Distance = "euclidean",
    normalize: bool = False,
    margin: float | None = None,
    relative_margin: float | None = None,
    score_range: tuple[float, float] | None = None,
    exclude: ArrayLike | None = None,
    reference: ReferenceLike | None = None,
    group: Group | None = None,
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
        normalize: scale all rows to length 1 first, as losses of similarities do by default;
            "cosine" always does. If false, other distances are between the rows as they are.
        margin: m, how much farther than the farthest positive a negative must be, in units of the
            distance.
        relative_margin: r, 0 or more, the same as a share of the positive's score.
        score_range: (low, high) scores to keep.
        exclude: (n, e) int64, further known positives, as rows of the reference or of the batch; -1
            for none.
        reference: rows to search instead of the other rows of the batch; without labels if
            `labels` is None, `Reference(x, None)`.
        group: the processes that the batch is spread over, as in a loss: anchors are then rows of
            this process, and what is found are rows of all, in the order of their processes;
            `reference` is the same on all. None: this one has all of the batch.

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
    positive_integer("k", k)
    if margin is not None:
        between("margin", margin, -inf, inf)
    if relative_margin is not None:
        between("relative_margin", relative_margin, 0, inf)
    low, high = bounds("score_range", score_range)
    compared = Comparison.of(x, labels, reference, distance, normalize=normalize, group=group)
    known = None
    if exclude is not None:
        n, m = compared.relation.n, compared.relation.m
        device = compared.rows.device
        known = confirmed(group, lambda: listed_rows("exclude", exclude, n, m, device))

    def in_block(where: slice, d: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        positive, negative = block.masks()
        if known is not None:
            also = _mark(known[where], d)
            if block.selves is not None:  # no row is its own positive
                also &= ~block.selves.mask()
            positive, negative = positive | also, negative & ~also
        score = 1 - d if distance == "cosine" else -d
        if not d.shape[1]:
            return nearest(d, k)
        lowest = score.masked_fill(~positive, inf).amin(1, keepdim=True)
        if margin is not None:
            negative &= score <= lowest - margin
        if relative_margin is not None:
            limit = lowest - relative_margin * lowest.abs()
            negative &= (score <= limit) | (lowest == inf)
        if score_range is not None:
            negative &= (score >= low) & (score <= high)
        return nearest(d.masked_fill(~negative, inf), k)

    return compared.for_each_row(in_block, k)


@over_processes
def hard_positives(
    x: ArrayLike,
    labels: ArrayLike,
    *,
    k: int = 1,
    distance: Distance = "euclidean",
    normalize: bool = False,
    reference: ReferenceLike | None = None,
    group: Group | None = None,
) -> Found:
    """The k farthest positives of each row.

    Args:
        x: (n, d) embeddings.
        labels: (n,) class ids, or (n, c) bool multi-labels; rows that share a label are similar.
        k: how many positives.
        distance: "euclidean", "sqeuclidean", "cosine", "snr", "manhattan" or the p of a p-norm.
        normalize: scale all rows to length 1 first, as losses of similarities do by default;
            "cosine" always does. If false, other distances are between the rows as they are.
        reference: rows to search instead of the other rows of the batch.
        group: the processes that the batch is spread over, as in a loss: anchors are then rows of
            this process, and what is found are rows of all, in the order of their processes;
            `reference` is the same on all. None: this one has all of the batch.

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
    positive_integer("k", k)
    compared = Comparison.of(x, labels, reference, distance, normalize=normalize, group=group)

    def in_block(where: slice, d: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        far, index = nearest((-d).masked_fill(~block.masks()[0], inf), k)
        return far.neg().masked_fill(index < 0, inf), index

    return compared.for_each_row(in_block, k)


@over_processes
def distance_weighted_negatives(
    x: ArrayLike,
    labels: ArrayLike,
    *,
    k: int = 1,
    cutoff: float = 0.5,
    nonzero_loss_cutoff: float = 1.4,
    generator: torch.Generator | None = None,
    reference: ReferenceLike | None = None,
    group: Group | None = None,
) -> Found:
    r"""k negatives of each row, drawn so that all distances are equally likely.

    Nearly all random unit vectors in D dimensions are :math:`\sqrt 2` apart. Each negative is
    therefore drawn, with replacement, with weight

    .. math:: \min(\lambda, 1 / q(d)), \qquad q(d) \propto d^{D-2} (1 - d^2 / 4)^{(D-3)/2}

    where d is the distance between the rows scaled to length 1. With `group`, each process draws
    for its own anchors: negatives with the same weights, but others than one process would draw.

    Args:
        x: (n, D) embeddings; only their directions count.
        labels: (n,) class ids, or (n, c) bool multi-labels; rows that share a label are similar.
        k: how many negatives.
        cutoff: from 0 to 2; smaller distances get the weight of this distance, which is lambda.
        nonzero_loss_cutoff: from `cutoff` to 2; negatives at this distance or farther are drawn
            only if there are no others; then all have the same weight.
        generator: for the draw; None: torch's own.
        reference: rows to draw from instead of the other rows of the batch.
        group: the processes that the batch is spread over, as in a loss: anchors are then rows of
            this process, and what is found are rows of all, in the order of their processes;
            `reference` is the same on all. None: this one has all of the batch.

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
    positive_integer("k", k)
    check_cutoffs(cutoff, nonzero_loss_cutoff)
    compared = Comparison.of(x, labels, reference, "sqeuclidean", normalize=True, group=group)
    random = compared.chance(generator)
    every = torch.full((compared.relation.n,), k, device=compared.rows.device)

    def in_block(where: slice, d: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        negative = block.masks()[1]
        if not d.shape[1]:
            return nearest(d, k)
        squares = d.masked_fill(~negative, inf)
        weight = distance_weight(squares, compared.rows.shape[1], cutoff, nonzero_loss_cutoff)
        index = draw(weight, every[where], random)
        none = ~negative.any(1, keepdim=True)
        return d.gather(1, index).sqrt().masked_fill(none, inf), index.masked_fill(none, -1)

    return compared.for_each_row(in_block, k)


def _mark(known: Tensor, d: Tensor) -> Tensor:
    """(b, m) bool, true at the known columns of each row."""
    marks = torch.zeros(len(d), d.shape[1] + 1, dtype=torch.bool, device=d.device)
    marks.scatter_(1, torch.where(known < 0, d.shape[1], known), True)
    return marks[:, :-1]
