"""Losses on triplets and quadruplets: row i of every argument belongs to tuple i."""

from math import inf

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nearfar.distance import Distance, between_rows, scaled
from nearfar.engine.observe import measured
from nearfar.inputs import ArrayLike, between, embeddings, switch
from nearfar.losses.batch import row_weight
from nearfar.reduction import Reduction, reduce


def triplet_loss(
    anchor: ArrayLike,
    positive: ArrayLike,
    negative: ArrayLike,
    *,
    margin: float = 1.0,
    distance: Distance = "euclidean",
    normalize: bool = False,
    swap: bool = False,
    smooth: bool = False,
    weight: ArrayLike | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Keep each anchor nearer to its positive than to its negative, by at least `margin`.

    With :math:`d^+_i = d(a_i, p_i)` and :math:`d^-_i = d(a_i, n_i)`,

    .. math:: \ell_i = \max(0,\, d^+_i - d^-_i + m)

    With `swap`, the positive may stand in for the anchor: :math:`d^-_i = \min(d(a_i, n_i),
    d(p_i, n_i))`, the harder of the two (Balntas et al. 2016). With `smooth`, the hinge becomes
    a softplus, :math:`\ell_i = \log(1 + e^{d^+_i - d^-_i + m})`, which never stops pulling; with
    margin 0, this is the soft margin of Hermans et al. 2017.

    Args:
        anchor: (n, d) embeddings, any floating dtype.
        positive: (n, d) embeddings; row i is similar to row i of `anchor`.
        negative: (n, d) embeddings; row i is dissimilar to row i of `anchor`.
        margin: how much nearer, 0 or more, in units of the distance.
        distance: "euclidean", "sqeuclidean" (the paper's), "cosine", "snr", "manhattan" or the p of
            a p-norm.
        normalize: scale all rows to length 1 first, as the paper does; "cosine" does in any case.
        swap: measure the negative from the anchor or the positive, whichever is nearer to it.
        smooth: softplus in place of the hinge.
        weight: (n,) how much each triplet counts, 0 or more.
        reduction: "mean" over the losses of all triplets, "active" over those that are not 0,
            (low, high) over those between; "sum", or "none" for one loss per triplet.

    Returns:
        A scalar, or (n,) losses with reduction="none"; float32 or wider.

    Raises:
        TypeError: an argument is not an array of numbers.
        ValueError: a shape, device or hyperparameter out of range.

    >>> import torch
    >>> anchor, positive = torch.tensor([[0.0, 0], [0, 0]]), torch.tensor([[0.0, 1], [0, 1]])
    >>> negative = torch.tensor([[0.0, 1.5], [4, 0]])
    >>> triplet_loss(anchor, positive, negative, reduction="none")
    tensor([0.5000, 0.0000])
    >>> triplet_loss(anchor, positive, negative, swap=True, reduction="none")
    tensor([1.5000, 0.0000])
    >>> triplet_loss(anchor, positive, negative, smooth=True, reduction="none")
    tensor([0.9741, 0.1269])

    Source: Schroff, Kalenichenko & Philbin, "FaceNet", CVPR 2015; Weinberger & Saul, JMLR 2009.
    """
    anchor, positive, negative = embeddings(anchor=anchor, positive=positive, negative=negative)
    between("margin", margin, 0, inf, ", a difference of distances")
    switch("swap", swap)
    switch("smooth", smooth)
    weights = row_weight(weight, anchor)
    anchor, positive, negative = scaled(distance, normalize, anchor, positive, negative)
    to_positive = measured("positive", "distance", between_rows(anchor, positive, distance))
    to_negative = between_rows(anchor, negative, distance)
    if swap:
        to_negative = torch.minimum(to_negative, between_rows(positive, negative, distance))
    to_negative = measured("negative", "distance", to_negative)
    violation = to_positive - to_negative + margin
    # -logsigmoid(-v) is log(1 + e^v), accurately; torch's softplus drops e^-v above 20.
    per_row = -logsigmoid(-violation) if smooth else violation.relu()
    return reduce(per_row, reduction, weights)


def quadruplet_loss(
    anchor: ArrayLike,
    positive: ArrayLike,
    negative: ArrayLike,
    negative2: ArrayLike,
    *,
    margin: float = 1.0,
    margin2: float = 0.5,
    distance: Distance = "euclidean",
    normalize: bool = False,
    weight: ArrayLike | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""The triplet loss, plus a term that keeps positive pairs closer than pairs of two negatives.

    .. math:: \ell_i = \max(0,\, d(a_i, p_i) - d(a_i, n_i) + m_1)
                     + \max(0,\, d(a_i, p_i) - d(n_i, n'_i) + m_2)

    The second term compares distances between pairs that share no item, so a positive pair must be
    closer than every dissimilar pair, not only those of its own anchor: intra-class distances
    shrink. The paper takes :math:`m_2 < m_1`, so that the first term leads, and squares its learned
    distances (`distance="sqeuclidean"`).

    Args:
        anchor: (n, d) embeddings, any floating dtype.
        positive: (n, d) embeddings; row i is similar to row i of `anchor`.
        negative: (n, d) embeddings; row i is dissimilar to row i of `anchor`.
        negative2: (n, d) embeddings; row i is dissimilar to row i of `anchor` and of `negative`.
        margin: of the first term, 0 or more, in units of the distance.
        margin2: of the second term, 0 or more.
        distance: "euclidean", "sqeuclidean", "cosine", "snr", "manhattan" or the p of a p-norm.
        normalize: scale all rows to length 1 first; "cosine" does in any case.
        weight: (n,) how much each quadruplet counts, 0 or more.
        reduction: "mean" over the losses of all quadruplets, "active" over those that are not 0,
            (low, high) over those between; "sum", or "none" for one loss per quadruplet.

    Returns:
        A scalar, or (n,) losses with reduction="none"; float32 or wider.

    Raises:
        TypeError: an argument is not an array of numbers.
        ValueError: a shape, device or hyperparameter out of range.

    >>> import torch
    >>> anchor, positive = torch.tensor([[0.0, 0]]), torch.tensor([[0.0, 1]])
    >>> negative, negative2 = torch.tensor([[0.0, 1.5]]), torch.tensor([[0.0, 2.75]])
    >>> quadruplet_loss(anchor, positive, negative, negative2)  # 0.5 + 0.25
    tensor(0.7500)

    Source: Chen, Chen, Zhang & Huang, "Beyond triplet loss: a deep quadruplet network for person
    re-identification", CVPR 2017.
    """
    anchor, positive, negative, negative2 = embeddings(
        anchor=anchor, positive=positive, negative=negative, negative2=negative2
    )
    between("margin", margin, 0, inf, ", a difference of distances")
    between("margin2", margin2, 0, inf, ", a difference of distances")
    weights = row_weight(weight, anchor)
    anchor, positive, negative, negative2 = scaled(
        distance, normalize, anchor, positive, negative, negative2
    )
    near = measured("positive", "distance", between_rows(anchor, positive, distance))
    far = measured("negative", "distance", between_rows(anchor, negative, distance))
    apart = measured("second negative", "distance", between_rows(negative, negative2, distance))
    first = (near - far + margin).relu()
    second = (near - apart + margin2).relu()
    return reduce(first + second, reduction, weights)
