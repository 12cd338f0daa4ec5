"""Miners of triplets: an anchor of the batch, a positive and a negative."""

from collections.abc import Iterator
from math import inf, radians, tan
from typing import Literal

import torch
from torch import Tensor

from nearfar.distance import Distance, between_rows
from nearfar.engine import budget
from nearfar.engine.anchors import Anchors
from nearfar.engine.budget import current_limits
from nearfar.engine.closeness import by_distance
from nearfar.engine.meeting import Group, over_processes
from nearfar.engine.pick import semihard, triplets_of_pairs
from nearfar.engine.slices import spans
from nearfar.inputs import ArrayLike, between, one_of, positive_integer
from nearfar.mine.comparison import Comparison, bounds
from nearfar.reference import ReferenceLike

Violating = Literal["all", "hard", "semihard", "easy"]
Choice = Literal["hard", "semihard", "easy", "all"]

# Copies of a block of pairs held at the same time: centres, distances, masks and indices.
_BUFFERS = 24


@over_processes
def semihard_triplets(
    x: ArrayLike,
    labels: ArrayLike,
    *,
    distance: Distance = "euclidean",
    normalize: bool = False,
    max: int | None = None,
    generator: torch.Generator | None = None,
    reference: ReferenceLike | None = None,
    group: Group | None = None,
) -> Tensor:
    r"""For each anchor and positive, the nearest negative that is farther than the positive.

    If no negative is farther, the anchor's farthest negative is taken, as in
    `batch_triplet_loss(select="semihard")`.

    Args:
        x: (n, d) embeddings.
        labels: (n,) class ids, or (n, c) bool multi-labels; rows that share a label are similar.
        distance: "euclidean", "sqeuclidean", "cosine", "snr", "manhattan" or the p of a p-norm.
        normalize: scale all rows to length 1 first, as losses of similarities do by default;
            "cosine" always does. If false, other distances are between the rows as they are.
        max: how many triplets at most, of all processes, drawn at random; None: all.
        generator: for the draw; None: torch's own.
        reference: rows to take positives and negatives from instead of the batch.
        group: the processes that the batch is spread over, as in a loss: anchors are then rows of
            this process, and what is found are rows of all, in the order of their processes;
            `reference` is the same on all. None: this one has all of the batch.

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
    compared = Comparison.of(x, labels, reference, distance, normalize=normalize, group=group)
    pick = semihard(compared.distance, compared.relation)
    found = pick.by_blocks(*compared.scaled(), current_limits(), "float32")
    return _some(found, compared, max, generator)


@over_processes
def violating_triplets(
    x: ArrayLike,
    labels: ArrayLike,
    *,
    margin: float = 0.2,
    kind: Violating = "all",
    distance: Distance = "euclidean",
    normalize: bool = False,
    max: int | None = None,
    generator: torch.Generator | None = None,
    reference: ReferenceLike | None = None,
    group: Group | None = None,
) -> Tensor:
    r"""Every triplet whose negative is not farther than its positive by more than a margin.

    With the gap :math:`g = d_{an} - d_{ap}`, the kinds are

    - "all": :math:`g \le m`, the triplets that violate the margin;
    - "hard": :math:`g \le 0`, those whose negative is not farther than the positive;
    - "semihard": :math:`0 < g \le m`;
    - "easy": :math:`g > m`, the triplets that do not violate it.

    Their number grows with n times the numbers of positives and negatives of a row; `max` bounds
    it.

    Args:
        x: (n, d) embeddings.
        labels: (n,) class ids, or (n, c) bool multi-labels; rows that share a label are similar.
        margin: m, 0 or more, in units of the distance.
        kind: "all", "hard", "semihard" or "easy".
        distance: "euclidean", "sqeuclidean", "cosine", "snr", "manhattan" or the p of a p-norm.
        normalize: scale all rows to length 1 first, as losses of similarities do by default;
            "cosine" always does. If false, other distances are between the rows as they are.
        max: how many triplets at most, of all processes, drawn at random; None: all.
        generator: for the draw; None: torch's own.
        reference: rows to take positives and negatives from instead of the batch.
        group: the processes that the batch is spread over, as in a loss: anchors are then rows of
            this process, and what is found are rows of all, in the order of their processes;
            `reference` is the same on all. None: this one has all of the batch.

    Returns:
        (t, 3) int64, the anchor, positive and negative of each triplet, sorted by all three.

    Raises:
        TypeError: labels that are not class ids or bool multi-labels.
        ValueError: a shape, length, device or hyperparameter out of range.

    >>> x = torch.tensor([[0.0, 0], [0, 1], [0.5, 0], [1.5, 0]])
    >>> violating_triplets(x, [0, 0, 1, 1], kind="semihard", margin=0.5)
    tensor([[0, 1, 3],
            [1, 0, 2],
            [2, 3, 1],
            [3, 2, 0]])

    Source: Schroff, Kalenichenko & Philbin, "FaceNet", CVPR 2015; the kinds as in
    pytorch-metric-learning's TripletMarginMiner.
    """
    between("margin", margin, 0, inf, ", a difference of distances")
    one_of("kind", kind, Violating)
    low, high = {"all": (-inf, margin), "hard": (-inf, 0), "semihard": (0, margin)}.get(
        kind, (margin, inf)
    )
    compared = Comparison.of(x, labels, reference, distance, normalize=normalize, group=group)

    def found() -> Iterator[Tensor]:
        for where, d, block in compared.blocks():
            anchors, negative = Anchors.of(block), block.masks()[1]
            # The rows of so many pairs, and their gaps, are as large as the block.
            for some in spans(len(anchors.row), len(d) // 2 + 1):
                row, column = anchors.row[some], anchors.column[some]
                gap = d[row] - d[row, column][:, None]
                inside = (gap > low) & (gap <= high) & negative[row]
                yield triplets_of_pairs(where, row, column, inside)

    return _some(found(), compared, max, generator)


@over_processes
def easy_hard_triplets(
    x: ArrayLike,
    labels: ArrayLike,
    *,
    positive: Choice = "easy",
    negative: Choice = "semihard",
    positive_range: tuple[float, float] | None = None,
    negative_range: tuple[float, float] | None = None,
    distance: Distance = "euclidean",
    normalize: bool = False,
    reference: ReferenceLike | None = None,
    group: Group | None = None,
) -> Tensor:
    """One triplet of each anchor: its easiest or hardest positive and negative.

    - "easy": the nearest positive, or the farthest negative;
    - "hard": the farthest positive, or the nearest negative;
    - "semihard": the nearest negative that is farther than the chosen positive, or the farthest
      positive that is nearer than the chosen negative; an anchor without one is left out;
    - "all": every positive, or every negative, with the one chosen on the other side.

    Args:
        x: (n, d) embeddings.
        labels: (n,) class ids, or (n, c) bool multi-labels; rows that share a label are similar.
        positive: "easy", "hard", "semihard" or "all".
        negative: "hard", "semihard", "easy" or "all".
        positive_range: (low, high) distances of the positives to choose from, both included; None:
            all.
        negative_range: likewise of the negatives.
        distance: "euclidean", "sqeuclidean", "cosine", "snr", "manhattan" or the p of a p-norm.
        normalize: scale all rows to length 1 first, as losses of similarities do by default;
            "cosine" always does. If false, other distances are between the rows as they are.
        reference: rows to take positives and negatives from instead of the batch.
        group: the processes that the batch is spread over, as in a loss: anchors are then rows of
            this process, and what is found are rows of all, in the order of their processes;
            `reference` is the same on all. None: this one has all of the batch.

    Returns:
        (t, 3) int64, the anchor, positive and negative of each triplet, sorted by anchor.

    Raises:
        TypeError: labels that are not class ids or bool multi-labels.
        ValueError: a shape, length, device or hyperparameter out of range.

    >>> x = torch.tensor([[0.0, 0], [0, 1], [0, 3], [0.5, 0], [1.5, 0]])
    >>> easy_hard_triplets(x, [0, 0, 0, 1, 1])
    tensor([[0, 1, 4],
            [1, 0, 3],
            [2, 1, 3],
            [3, 4, 1],
            [4, 3, 0]])
    >>> easy_hard_triplets(x, [0, 0, 0, 1, 1], positive="hard", negative="hard")  # batch hard
    tensor([[0, 2, 3],
            [1, 2, 3],
            [2, 0, 3],
            [3, 4, 0],
            [4, 3, 0]])

    Source: Xuan, Stylianou & Pless, "Improved Embeddings with Easy Positive Triplet Mining", WACV
    2020; Hermans, Beyer & Leibe, "In Defense of the Triplet Loss for Person Re-Identification",
    2017; the choices as in pytorch-metric-learning's BatchEasyHardMiner.
    """
    _check_choices(positive, negative)
    near_bounds = bounds("positive_range", positive_range)
    far_bounds = bounds("negative_range", negative_range)
    compared = Comparison.of(x, labels, reference, distance, normalize=normalize, group=group)

    def found() -> Iterator[Tensor]:
        for where, d, block in compared.blocks():
            if not d.shape[1]:
                continue
            near, far = block.masks()
            near = near & (d >= near_bounds[0]) & (d <= near_bounds[1])
            far = far & (d >= far_bounds[0]) & (d <= far_bounds[1])
            if positive == "semihard":
                near &= d < _extreme(d, far, farthest=negative == "easy")[0]
            elif negative == "semihard":
                far &= d > _extreme(d, near, farthest=positive == "hard")[0]
            _, p = _extreme(d, near, farthest=positive != "easy")
            _, n = _extreme(d, far, farthest=negative == "easy")
            if positive != "all":
                near = torch.zeros_like(near).scatter_(1, p, near.gather(1, p))
            if negative != "all":
                far = torch.zeros_like(far).scatter_(1, n, far.gather(1, n))
            row, column = near.nonzero(as_tuple=True)
            yield triplets_of_pairs(where, row, column, far[row])

    return _some(found(), compared, None, None)


@over_processes
def angular_triplets(
    x: ArrayLike,
    labels: ArrayLike,
    *,
    angle: float = 20.0,
    normalize: bool = False,
    max: int | None = None,
    generator: torch.Generator | None = None,
    reference: ReferenceLike | None = None,
    group: Group | None = None,
) -> Tensor:
    r"""Every triplet in which the negative sees anchor and positive under too large an angle.

    With :math:`c = (a + p) / 2` the middle of anchor and positive, these are the triplets with

    .. math:: \arctan \frac{|a - p|}{2\,|n - c|} > \alpha

    Args:
        x: (n, d) embeddings.
        labels: (n,) class ids, or (n, c) bool multi-labels; rows that share a label are similar.
        angle: alpha, in degrees, from 0 to 89.999.
        normalize: scale all rows to length 1 first, as losses of similarities do by default.
        max: how many triplets at most, of all processes, drawn at random; None: all.
        generator: for the draw; None: torch's own.
        reference: rows to take positives and negatives from instead of the batch.
        group: the processes that the batch is spread over, as in a loss: anchors are then rows of
            this process, and what is found are rows of all, in the order of their processes;
            `reference` is the same on all. None: this one has all of the batch.

    Returns:
        (t, 3) int64, the anchor, positive and negative of each triplet, sorted by all three.

    Raises:
        TypeError: labels that are not class ids or bool multi-labels.
        ValueError: a shape, length, device or hyperparameter out of range.

    >>> x = torch.tensor([[0.0, 0], [0, 1], [0.5, 0.5], [3.0, 0.5]])
    >>> angular_triplets(x, [0, 0, 1, 1], angle=40.0)  # 45 degrees, and for row 3 only 9.5
    tensor([[0, 1, 2],
            [1, 0, 2]])

    Source: Wang, Zhou, Wen, Liu & Lin, "Deep Metric Learning with Angular Loss", ICCV 2017; as in
    pytorch-metric-learning's AngularMiner.
    """
    between("angle", angle, 0, 89.999, ", in degrees")
    steepness = 2 * tan(radians(angle))
    compared = Comparison.of(x, labels, reference, "euclidean", normalize=normalize, group=group)
    relation, closeness = compared.relation, by_distance("euclidean")
    a, b = closeness.prepare(compared.rows, compared.columns)
    columns = a if b is None else b

    def found() -> Iterator[Tensor]:
        room = current_limits(), a.device, a.element_size(), _BUFFERS
        size = budget.block(*room, relation.m)
        for where in spans(relation.n, size):
            here = relation.block(where, slice(0, relation.m))
            anchors, negative = Anchors.of(here), here.masks()[1]
            for some in spans(len(anchors.row), size):
                row, column = anchors.row[some], anchors.column[some]
                anchor, positive = a[row + where.start], columns[column]
                near = between_rows(anchor, positive, "euclidean")
                far, _ = closeness.measure(anchor / 2 + positive / 2, columns)
                wide = (near[:, None] > steepness * far) & negative[row]
                yield triplets_of_pairs(where, row, column, wide)

    return _some(found(), compared, max, generator)


def _check_choices(positive: Choice, negative: Choice) -> None:
    one_of("positive", positive, Choice)
    one_of("negative", negative, Choice)
    if positive == negative == "all":
        raise ValueError(
            'positive and negative must not both be "all", which is every triplet: a loss with '
            "labels alone takes them all, without a list."
        )
    if "semihard" in (positive, negative) and (positive in ("semihard", "all")) == (
        negative in ("semihard", "all")
    ):
        raise ValueError(
            f'positive and negative must not be {positive!r} and {negative!r}: "semihard" compares '
            "with the one that the other side chooses. semihard_triplets takes every positive."
        )


def _extreme(d: Tensor, among: Tensor, *, farthest: bool) -> tuple[Tensor, Tensor]:
    """(b, 1) the largest or smallest distance among some, and (b, 1) its column."""
    if farthest:
        return d.masked_fill(~among, -inf).max(1, keepdim=True)
    return d.masked_fill(~among, inf).min(1, keepdim=True)


def _some(
    found: Iterator[Tensor],
    compared: Comparison,
    max: int | None,
    generator: torch.Generator | None,
) -> Tensor:
    """All triplets that are found, or at most `max` of them, drawn at random."""
    none = torch.zeros(0, 3, dtype=torch.int64, device=compared.rows.device)
    if max is None:
        return torch.cat([*found, none])
    positive_integer("max", max)
    # Keep the triplets with the highest random numbers so far, never more than `max`.
    random = compared.chance(generator)
    kept, keys = none, torch.zeros(0, dtype=torch.float64)
    for triplets in found:
        drawn = torch.rand(len(triplets), generator=random, dtype=torch.float64)
        (higher,) = (drawn >= (keys.min() if len(keys) == max else 0)).nonzero(as_tuple=True)
        kept = torch.cat([kept, triplets[higher.to(kept.device)]])
        keys = torch.cat([keys, drawn[higher]])
        best = keys.topk(min(max, len(keys))).indices.sort().values
        kept, keys = kept[best.to(kept.device)], keys[best]
    return kept[compared.largest_of_all(keys.to(kept.device), max)]
