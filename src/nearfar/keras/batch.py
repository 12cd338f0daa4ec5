"""Losses over a whole batch of embeddings with class labels, in memory linear in the batch."""

from math import inf
from typing import Any, Literal, get_args

from keras import ops

from nearfar.keras.checks import above_zero, between, chunk_rows, one_of
from nearfar.keras.chunks import Relation, anchor_losses, by_labels, map_chunks, n_positives
from nearfar.keras.labels import batch_labels
from nearfar.keras.pairs import triplet_losses
from nearfar.keras.reduction import Reduction, reduce
from nearfar.keras.rows import matrix, nan_unless_finite, number, row_weight, unit
from nearfar.keras.rules import pick_all, pick_each

Select = Literal["hard", "easy_positive"]
BatchDistance = Literal["euclidean", "sqeuclidean", "cosine"]


def sup_con_loss(
    x: Any,
    labels: Any,
    *,
    temperature: Any = 0.1,
    normalize: bool = True,
    weight: Any = None,
    reduction: Reduction = "mean",
    chunk_size: int = 256,
) -> Any:
    r"""Supervised contrast: each anchor against all other rows, with its whole class as positives.

    With :math:`z_{ij} = x_i \cdot x_j / \tau`, :math:`P(i)` the positives of i and :math:`A(i)`
    all rows but i,

    .. math:: \ell_i = -\frac{1}{|P(i)|} \sum_{p \in P(i)}
                \log \frac{e^{z_{ip}}}{\sum_{a \in A(i)} e^{z_{ia}}}

    Args:
        x: (n, d) embeddings, any floating dtype.
        labels: (n,) class ids of any integer dtype, or (n, c) bool multi-labels; rows that share a
            label are similar.
        temperature: tau, above 0; a tensor may be learned.
        normalize: scale all rows to length 1 first, so that inner products are cosines.
        weight: (n,) how much each anchor counts, 0 or more.
        reduction: "mean" over the anchors that have a positive, "sum", or "none" for one loss per
            anchor, 0 for the others.
        chunk_size: how many anchors are compared at a time; changes only memory and time.

    Returns:
        A scalar, or (n,) with reduction="none"; float32 or wider.

    Raises:
        TypeError: labels that are not class ids or bool multi-labels.
        ValueError: a shape or setting out of range.

    >>> x = [[1.0, 0], [0.8, 0.6], [0, 1], [-0.6, 0.8]]
    >>> print(f"{float(sup_con_loss(x, [0, 0, 1, 1], temperature=0.5)):.4f}")
    0.4302

    Source: Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, equation 2 (L_out).
    """
    rows, relation = _batch(x, labels, normalize)
    size = chunk_rows(chunk_size)
    scaled = rows / number(above_zero("temperature", temperature), like=rows)
    losses = anchor_losses(pick_all, scaled, rows, relation, size)
    positives = n_positives(relation, ops.stop_gradient(losses), size)
    counts = ops.cast(positives > 0, losses.dtype)
    return reduce(losses, counts, row_weight(weight, rows), reduction)


def nt_xent_loss(
    x: Any,
    labels: Any,
    *,
    temperature: Any = 0.5,
    normalize: bool = True,
    weight: Any = None,
    reduction: Reduction = "mean",
    chunk_size: int = 256,
) -> Any:
    r"""One softmax per positive pair: the positive against the anchor's negatives.

    With :math:`z_{ij} = x_i \cdot x_j / \tau` and :math:`N(i)` the negatives of anchor i, the
    loss of a positive pair (i, p) is

    .. math:: \ell_{ip} = -\log \frac{e^{z_{ip}}}{e^{z_{ip}} + \sum_{n \in N(i)} e^{z_{in}}}

    In SimCLR every item has two views, so one positive. With more, the anchor's other positives are
    left out of the denominator.

    Args:
        x: (n, d) embeddings, any floating dtype.
        labels: (n,) class ids of any integer dtype, or (n, c) bool multi-labels; rows that share a
            label are similar. For two views of n items, `numpy.tile(numpy.arange(n), 2)`.
        temperature: tau, above 0; a tensor may be learned.
        normalize: scale all rows to length 1 first, so that inner products are cosines.
        weight: (n,) how much each anchor counts, 0 or more.
        reduction: "mean" over the positive pairs, "sum", or "none" for (n,) sums, one per anchor. A
            positive pair whose anchor has no negatives has loss 0 and counts in the mean.
        chunk_size: how many anchors are compared at a time; changes only memory and time.

    Returns:
        A scalar, or (n,) with reduction="none"; float32 or wider.

    Raises:
        TypeError: labels that are not class ids or bool multi-labels.
        ValueError: a shape or setting out of range.

    >>> x = [[1.0, 0], [0.8, 0.6], [0, 1], [-0.6, 0.8]]
    >>> print(f"{float(nt_xent_loss(x, [0, 0, 1, 1])):.4f}")
    0.4302

    Source: Chen, Kornblith, Norouzi & Hinton, "A Simple Framework for Contrastive Learning of
    Visual Representations", ICML 2020, equation 1.
    """
    rows, relation = _batch(x, labels, normalize)
    size = chunk_rows(chunk_size)
    scaled = rows / number(above_zero("temperature", temperature), like=rows)
    losses = anchor_losses(pick_each, scaled, rows, relation, size)
    counts = n_positives(relation, ops.stop_gradient(losses), size)
    return reduce(losses, counts, row_weight(weight, rows), reduction)


def batch_triplet_loss(
    x: Any,
    labels: Any,
    *,
    select: Select,
    margin: float = 1.0,
    distance: BatchDistance = "euclidean",
    normalize: bool = False,
    smooth: bool = False,
    weight: Any = None,
    reduction: Reduction = "mean",
    chunk_size: int = 256,
) -> Any:
    r"""The triplet loss over the triplet of each anchor that `select` picks.

    .. math:: \ell_i = \max(0,\, d_{ip} - d_{in} + m)

    with n the nearest negative of anchor i, and p its farthest positive ("hard", batch hard) or its
    nearest ("easy_positive"). The gradient treats the selection as constant. To select other
    triplets, or all, see `nearfar.batch_triplet_loss`.

    Args:
        x: (n, d) embeddings, any floating dtype.
        labels: (n,) class ids of any integer dtype, or (n, c) bool multi-labels; rows that share a
            label are similar.
        select: "hard" or "easy_positive".
        margin: how much farther the negative must be than the positive, 0 or more.
        distance: "euclidean", "sqeuclidean" or "cosine".
        normalize: scale all rows to length 1 first; "cosine" always does.
        smooth: softplus in place of the hinge; with margin 0, the soft margin of Hermans et al.
        weight: (n,) how much each anchor counts, 0 or more.
        reduction: "mean" over the anchors that have a positive and a negative, "sum", or "none" for
            one loss per anchor, 0 for the others.
        chunk_size: how many anchors are compared at a time; changes only memory and time.

    Returns:
        A scalar, or (n,) with reduction="none"; float32 or wider.

    Raises:
        TypeError: labels that are not class ids or bool multi-labels.
        ValueError: a shape or setting out of range.

    >>> import numpy as np
    >>> x = [[0.0, 0], [0, 1], [1.5, 0], [0, 4]]
    >>> losses = batch_triplet_loss(x, [0, 0, 1, 1], select="hard", reduction="none")
    >>> print(np.asarray(losses).round(4))
    [0.5    0.1972 3.772  2.272 ]

    Source: Hermans, Beyer & Leibe, "In Defense of the Triplet Loss for Person Re-Identification",
    2017; Xuan, Stylianou & Pless, "Improved Embeddings with Easy Positive Triplet Mining", WACV
    2020.
    """
    one_of("select", select, get_args(Select))
    one_of("distance", distance, get_args(BatchDistance))
    between("margin", margin, 0, inf)
    rows, relation = _batch(x, labels, normalize or distance == "cosine")
    if rows.shape[0] == 0:
        return reduce(ops.sum(rows, axis=1), ops.zeros((0,)), None, reduction)
    size = chunk_rows(chunk_size)
    positive, negative, both = _extremes(rows, relation, select, size)
    losses = triplet_losses(
        rows,
        ops.take(rows, positive, axis=0),
        ops.take(rows, negative, axis=0),
        margin=margin,
        distance=distance,
        smooth=smooth,
    )
    losses = ops.where(both, losses, 0.0) + nan_unless_finite(rows)
    counts = ops.cast(both, losses.dtype)
    return reduce(losses, counts, row_weight(weight, rows), reduction)


def _batch(x: Any, labels: Any, normalize: bool) -> tuple[Any, Relation]:
    x = matrix("x", x)
    rows = unit(x) if normalize else x
    return rows, by_labels(batch_labels(labels, like=x))


def _extremes(rows: Any, relation: Relation, select: Select, size: int) -> tuple[Any, Any, Any]:
    """(n,) a positive and the nearest negative of each anchor, and whether it has both."""
    rows = ops.stop_gradient(rows)
    largest = ops.max(ops.abs(rows))
    largest = ops.where(largest < 1e-30, 1.0, largest)
    # Neither changes which distance is larger. Shorter rows keep more digits, and in units of the
    # largest coordinate no sum or square overflows.
    rows = (rows - largest * ops.mean(rows / largest, axis=0)) / largest
    half = ops.sum(ops.square(rows), axis=1) / 2

    def pick(here: Any) -> Any:
        positive, negative = relation(here)
        # |b|^2 / 2 - ab ranks the columns of a row as their distances do.
        x = ops.take(rows, here, axis=0)
        rank = half[None, :] - x @ ops.transpose(rows)
        nearest = ops.argmin(ops.where(negative, rank, inf), axis=1)
        if select == "hard":
            other = ops.argmax(ops.where(positive, rank, -inf), axis=1)
        else:
            other = ops.argmin(ops.where(positive, rank, inf), axis=1)
        both = ops.logical_and(ops.any(positive, axis=1), ops.any(negative, axis=1))
        return ops.stack([ops.cast(each, "int32") for each in (other, nearest, both)], axis=1)

    like = ops.zeros((ops.shape(rows)[0], 3), dtype="int32")
    found = map_chunks(pick, like, size)
    return found[:, 0], found[:, 1], found[:, 2] > 0
