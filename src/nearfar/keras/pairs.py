"""Losses of labelled pairs, triplets and quadruplets, as functions of (y_true, y_pred)."""

from math import inf
from typing import Any

from keras import ops

from nearfar.keras.checks import between
from nearfar.keras.labels import blend, known, pair_labels
from nearfar.keras.rows import Distance, distances, lift, per_row, unit, unstacked


def contrastive_loss(
    y_true: Any, y_pred: Any, margin: float = 1.0, *, similar_label: int | None = None
) -> Any:
    r"""Pull similar pairs together, push dissimilar ones apart until they are `margin` away.

    With :math:`d_i` the predicted distance of pair i, and :math:`s_i` = 1 for similar pairs and 0
    for dissimilar ones,

    .. math:: \ell_i = s_i\, d_i^2 + (1 - s_i) \max(0,\, m - d_i)^2

    Args:
        y_true: (n,) or (n, 1) bool, True = similar; or numbers from 0 to 1 with `similar_label`. A
            number in between is a degree of similarity and mixes the two terms.
        y_pred: (n,) or (n, 1) distances, 0 or more, as from `Distance`.
        margin: the distance, 0 or more, at which dissimilar pairs are no longer pushed.
        similar_label: for numeric `y_true`, which of 0 and 1 means similar.

    Returns:
        (n,) one loss per pair, as Keras' own functions return them; float32 or wider.

    Raises:
        TypeError: numeric `y_true` without `similar_label`.
        ValueError: a negative distance, or a shape, label or margin out of range.

    >>> import numpy as np
    >>> losses = contrastive_loss([0, 1, 1], [0.5, 0.3, 1.5], similar_label=0)
    >>> print(np.asarray(losses).round(4))
    [0.25 0.49 0.  ]

    Source: Hadsell, Chopra & LeCun, "Dimensionality Reduction by Learning an Invariant Mapping",
    CVPR 2006, without the factor 1/2.
    """
    between("margin", margin, 0, inf)
    d = per_row("y_pred", lift("y_pred", y_pred))
    values = known(ops.stop_gradient(d))
    if values is not None and (values < 0).any():
        raise ValueError(
            "y_pred must hold distances, 0 or more (of similarities pass 1 - similarity); the "
            f"smallest is {values.min().item():g}."
        )
    similar = pair_labels(y_true, like=d, similar_label=similar_label)
    return blend(similar, ops.square(d), ops.square(ops.relu(margin - d)))


def cosine_loss(
    y_true: Any, y_pred: Any, margin: float = 0.0, *, similar_label: int | None = None
) -> Any:
    r"""Turn similar pairs to one direction, dissimilar ones apart until their cosine is `margin`.

    With :math:`s_i` = 1 for similar pairs and 0 for dissimilar ones,

    .. math:: \ell_i = s_i (1 - \cos_i) + (1 - s_i) \max(0,\, \cos_i - m)

    Args:
        y_true: (n,) or (n, 1) bool, True = similar; or numbers from 0 to 1 with `similar_label`.
        y_pred: (n, 2, d) the two embeddings of each pair.
        margin: the cosine, from -1 to 1, below which dissimilar pairs are not pushed.
        similar_label: for numeric `y_true`, which of 0 and 1 means similar.

    Returns:
        (n,) one loss per pair, from 0 to 2; float32 or wider. A row of zeros has cosine 0 with
        everything, and gradient 0.

    Raises:
        TypeError: numeric `y_true` without `similar_label`.
        ValueError: a shape, label or margin out of range.

    >>> import numpy as np
    >>> pairs = [[[1.0, 0], [2, 0]], [[0, 1], [1, 0]]]
    >>> print(np.asarray(cosine_loss([True, True], pairs)))
    [0. 1.]

    Source: the cosine embedding loss of Siamese networks (Bromley et al., NeurIPS 1993, trained
    on target cosines), in the margin form that became common.
    """
    between("margin", margin, -1, 1)
    x1, x2 = unstacked(y_pred, "x1", "x2")
    similar = pair_labels(y_true, like=x1, similar_label=similar_label)
    d = distances(x1, x2, "cosine")
    return blend(similar, d, ops.relu(1 - margin - d))


def triplet_loss(
    y_true: Any,
    y_pred: Any,
    margin: float = 1.0,
    *,
    distance: Distance = "euclidean",
    normalize: bool = False,
    swap: bool = False,
    smooth: bool = False,
) -> Any:
    r"""Anchors nearer to their positive than to their negative, by at least `margin`.

    .. math:: \ell_i = \max(0,\, d(a_i, p_i) - d(a_i, n_i) + m)

    Args:
        y_true: not used: y_pred says which row is which.
        y_pred: (n, 3, d) the embeddings of anchor, positive and negative.
        margin: how much farther the negative must be than the positive, 0 or more.
        distance: "euclidean", "sqeuclidean" (Schroff et al.), "cosine" or "manhattan".
        normalize: scale all rows to length 1 first; "cosine" does in any case.
        swap: measure the negative from the anchor or the positive, whichever is nearer to it.
        smooth: softplus in place of the hinge.

    Returns:
        (n,) one loss per triplet; float32 or wider.

    Raises:
        ValueError: a shape or setting out of range.

    >>> import numpy as np
    >>> triplets = [[[0.0, 0], [0, 1], [0, 1.5]], [[0, 0], [0, 1], [4, 0]]]
    >>> print(np.asarray(triplet_loss(None, triplets)))
    [0.5 0. ]

    Source: Schroff, Kalenichenko & Philbin, "FaceNet", CVPR 2015; Weinberger & Saul, JMLR 2009.
    """
    rows = unstacked(y_pred, "anchor", "positive", "negative")
    rows = tuple(map(unit, rows)) if normalize else rows
    return triplet_losses(*rows, margin=margin, distance=distance, swap=swap, smooth=smooth)


def quadruplet_loss(
    y_true: Any,
    y_pred: Any,
    margin: float = 1.0,
    margin2: float = 0.5,
    *,
    distance: Distance = "euclidean",
    normalize: bool = False,
) -> Any:
    r"""The triplet loss, plus a term that keeps positive pairs closer than pairs of two negatives.

    .. math:: \ell_i = \max(0,\, d(a_i, p_i) - d(a_i, n_i) + m_1)
                     + \max(0,\, d(a_i, p_i) - d(n_i, n'_i) + m_2)

    Args:
        y_true: not used: y_pred says which row is which.
        y_pred: (n, 4, d) the embeddings of anchor, positive, negative and second negative.
        margin: of the first term, 0 or more, in units of the distance.
        margin2: of the second term, 0 or more.
        distance: "euclidean", "sqeuclidean", "cosine" or "manhattan".
        normalize: scale all rows to length 1 first; "cosine" does in any case.

    Returns:
        (n,) one loss per quadruplet; float32 or wider.

    Raises:
        ValueError: a shape or setting out of range.

    >>> import numpy as np
    >>> quadruplet = [[[0.0, 0], [0, 1], [0, 1.5], [0, 2.75]]]
    >>> print(np.asarray(quadruplet_loss(None, quadruplet)))  # 0.5 + 0.25
    [0.75]

    Source: Chen, Chen, Zhang & Huang, "Beyond triplet loss: a deep quadruplet network for person
    re-identification", CVPR 2017.
    """
    between("margin", margin, 0, inf)
    between("margin2", margin2, 0, inf)
    rows = unstacked(y_pred, "anchor", "positive", "negative", "negative2")
    anchor, positive, negative, negative2 = map(unit, rows) if normalize else rows
    near = distances(anchor, positive, distance)
    far = distances(anchor, negative, distance)
    apart = distances(negative, negative2, distance)
    return ops.relu(near - far + margin) + ops.relu(near - apart + margin2)


def triplet_losses(
    anchor: Any,
    positive: Any,
    negative: Any,
    *,
    margin: float,
    distance: Distance,
    swap: bool = False,
    smooth: bool = False,
) -> Any:
    """(n,) the loss of each triplet of aligned rows."""
    between("margin", margin, 0, inf)
    far = distances(anchor, negative, distance)
    if swap:
        far2 = distances(positive, negative, distance)
        far = ops.where(far < far2, far, far2)
    violation = distances(anchor, positive, distance) - far + margin
    return ops.softplus(violation) if smooth else ops.relu(violation)
