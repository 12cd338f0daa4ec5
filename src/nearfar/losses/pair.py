"""Losses on labelled pairs: row i of `x1` with row i of `x2`."""

from math import inf

import torch
from torch import Tensor

from nearfar.distance import Distance, between_rows, cosine
from nearfar.engine.observe import measured
from nearfar.inputs import ArrayLike, between, embeddings, vector
from nearfar.labels import SimilarLabel, blend, pair_labels, refuse
from nearfar.reduction import Reduction, reduce


def contrastive_loss(
    x1: ArrayLike,
    x2: ArrayLike,
    y: ArrayLike,
    *,
    margin: float = 1.0,
    distance: Distance = "euclidean",
    similar_label: SimilarLabel = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Pull similar pairs together, push dissimilar ones apart until they are `margin` away.

    With :math:`d_i` the distance of row i of `x1` to row i of `x2`, and :math:`s_i` = 1 for similar
    pairs and 0 for dissimilar ones,

    .. math:: \ell_i = s_i\, d_i^2 + (1 - s_i) \max(0,\, m - d_i)^2

    The paper has a factor 1/2 in front of both terms and labels similar pairs 0; most later texts
    drop the factor, as here.

    Args:
        x1: (n, d) embeddings, any floating dtype.
        x2: (n, d) embeddings.
        y: (n,) bool, True = similar; or numbers from 0 to 1 together with `similar_label`. A number
            in between is a degree of similarity and mixes the two terms.
        margin: the distance, 0 or more, at which dissimilar pairs are no longer pushed.
        distance: "euclidean", "sqeuclidean" or "cosine".
        similar_label: for numeric `y`, which of 0 and 1 means similar.
        reduction: "mean" over all pairs, "sum", or "none" for one loss per pair.

    Returns:
        A scalar, or (n,) losses with reduction="none"; float32 or wider; 0 for no pairs. At
        distance 0 no direction is defined and the gradient is 0, for dissimilar pairs too.

    Raises:
        TypeError: numeric `y` without `similar_label`, or an argument that is not numeric.
        ValueError: a shape, length, device, label or hyperparameter out of range.

    >>> import torch
    >>> x1 = torch.tensor([[0.0, 1, 4], [7, 2, 1], [2, 1, 4], [1, 2, 0]])
    >>> x2 = torch.tensor([[0.0, 2, 1], [0, 2, 1], [3, 0, 1], [1, 2, 0]])
    >>> y = torch.tensor([False, False, False, True])
    >>> contrastive_loss(x1, x2, y, margin=4.0, reduction="none")  # distances 3.16, 7, 3.32, 0
    tensor([0.7018, 0.0000, 0.4670, 0.0000])
    >>> contrastive_loss(x1, x2, y, margin=0.0)
    tensor(0.)
    >>> contrastive_loss(x1, x2, [0, 0, 0, 1], similar_label=1, margin=4.0)
    tensor(0.2922)

    Source: Hadsell, Chopra & LeCun, "Dimensionality Reduction by Learning an Invariant Mapping",
    CVPR 2006.
    """
    x1, x2 = embeddings(x1=x1, x2=x2)
    similar = pair_labels(y, like=x1, similar_label=similar_label)
    return reduce(_contrastive(between_rows(x1, x2, distance), similar, margin), reduction)


def contrastive_loss_from_distance(
    d: ArrayLike,
    y: ArrayLike,
    *,
    margin: float = 1.0,
    similar_label: SimilarLabel = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""The contrastive loss of given distances.

    .. math:: \ell_i = s_i\, d_i^2 + (1 - s_i) \max(0,\, m - d_i)^2

    Keras users know this form as `loss(y_true, y_pred)` with distances as predictions; note that
    here the distances come first.

    Args:
        d: (n,) distances, 0 or more.
        y: (n,) bool, True = similar; or numbers from 0 to 1 together with `similar_label`.
        margin: the distance, 0 or more, at which dissimilar pairs are no longer pushed.
        similar_label: for numeric `y`, which of 0 and 1 means similar.
        reduction: "mean" over all pairs, "sum", or "none" for one loss per pair.

    Returns:
        A scalar, or (n,) losses with reduction="none"; float32 or wider.

    Raises:
        TypeError: numeric `y` without `similar_label`, or an argument that is not numeric.
        ValueError: a negative distance; a shape, length, device, label or margin out of range.

    >>> d = [0.5, 0.3, 1.5]
    >>> contrastive_loss_from_distance(d, [0, 1, 1], similar_label=0, reduction="none")
    tensor([0.2500, 0.4900, 0.0000])
    >>> contrastive_loss_from_distance(d, [1, 0, 0], similar_label=1, reduction="none")
    tensor([0.2500, 0.4900, 0.0000])
    >>> contrastive_loss_from_distance(d, [True, False, False])
    tensor(0.2467)

    Source: Hadsell, Chopra & LeCun, CVPR 2006; see `contrastive_loss`.
    """
    d = vector("d", d)
    refuse(
        "d", d.detach(), d < 0, "hold distances, 0 or more (of similarities pass 1 - similarity)"
    )
    similar = pair_labels(y, like=d, similar_label=similar_label)
    return reduce(_contrastive(d, similar, margin), reduction)


def cosine_loss(
    x1: ArrayLike,
    x2: ArrayLike,
    y: ArrayLike | None = None,
    *,
    margin: float = 0.0,
    similar_label: SimilarLabel = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Turn similar pairs to one direction, dissimilar ones apart until their cosine is `margin`.

    With :math:`s_i` = 1 for similar pairs and 0 for dissimilar ones,

    .. math:: \ell_i = s_i (1 - \cos_i) + (1 - s_i) \max(0,\, \cos_i - m)

    Args:
        x1: (n, d) embeddings, any floating dtype.
        x2: (n, d) embeddings.
        y: (n,) bool, True = similar; or numbers from 0 to 1 together with `similar_label`; None
            if every pair is similar.
        margin: the cosine, from -1 to 1, below which dissimilar pairs are not pushed.
        similar_label: for numeric `y`, which of 0 and 1 means similar.
        reduction: "mean" over all pairs, "sum", or "none" for one loss per pair.

    Returns:
        A scalar, or (n,) losses from 0 to 2 with reduction="none"; float32 or wider. A zero row
        has cosine 0 with everything, and gradient 0.

    Raises:
        TypeError: numeric `y` without `similar_label`, or an argument that is not numeric.
        ValueError: a shape, length, device, label or hyperparameter out of range.

    >>> import torch
    >>> x1, x2 = torch.tensor([[0.0, 1, 0, 9, 1]]), torch.tensor([[3.0, 0, 0, 9, 0]])
    >>> cosine_loss(x1, x2)
    tensor(0.0628)
    >>> cosine_loss(torch.eye(2), torch.tensor([[2.0, 0], [1, 0]]), reduction="none")
    tensor([0., 1.])
    >>> cosine_loss(x1, x2, torch.tensor([False]), margin=0.5)
    tensor(0.4372)

    Source: the cosine embedding loss of Siamese networks (Bromley et al., NeurIPS 1993, trained
    on target cosines), in the margin form that became common.
    """
    x1, x2 = embeddings(x1=x1, x2=x2)
    between("margin", margin, -1, 1, ", a cosine")
    # In terms of 1 - cos, which stays accurate when the cosine is near 1.
    d = cosine(x1, x2)
    if y is None:
        similar = torch.ones(len(d), dtype=torch.bool, device=d.device)
    else:
        similar = pair_labels(y, like=x1, similar_label=similar_label)
    d = measured("pair", "distance", d, similar)
    return reduce(blend(similar, d, (1 - margin - d).relu()), reduction)


def _contrastive(d: Tensor, similar: Tensor, margin: float) -> Tensor:
    between("margin", margin, 0, inf, ", a distance")
    d = measured("pair", "distance", d, similar)
    return blend(similar, d.square(), (margin - d).relu().square())
