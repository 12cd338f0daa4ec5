"""Losses on labelled pairs: row i of `x1` with row i of `x2`."""

from math import inf

import torch
from torch import Tensor

from nearfar.distance import Distance, between_rows, cosine, scaled
from nearfar.engine.observe import measured
from nearfar.inputs import ArrayLike, between, embeddings, switch, vector
from nearfar.labels import SimilarLabel, blend, pair_labels, refuse
from nearfar.losses.batch import row_weight
from nearfar.reduction import Reduction, reduce


def contrastive_loss(
    x1: ArrayLike,
    x2: ArrayLike,
    y: ArrayLike,
    *,
    margin: float = 1.0,
    pos_margin: float = 0.0,
    distance: Distance = "euclidean",
    normalize: bool = False,
    squared: bool = True,
    similar_label: SimilarLabel = None,
    weight: ArrayLike | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Pull similar pairs together, push dissimilar ones apart until they are `margin` away.

    With :math:`d_i` the distance of row i of `x1` to row i of `x2`, and :math:`s_i` = 1 for similar
    pairs and 0 for dissimilar ones,

    .. math:: \ell_i = s_i \max(0,\, d_i - m^+)^2 + (1 - s_i) \max(0,\, m - d_i)^2

    where :math:`m^+` is `pos_margin`, 0 in the paper. The paper has a factor 1/2 in front of both
    terms and labels similar pairs 0; most later texts drop the factor, as here.

    Args:
        x1: (n, d) embeddings, any floating dtype.
        x2: (n, d) embeddings.
        y: (n,) bool, True = similar; or numbers from 0 to 1 together with `similar_label`. A number
            in between is a degree of similarity and mixes the two terms.
        margin: the distance, 0 or more, at which dissimilar pairs are no longer pushed.
        pos_margin: the distance, 0 or more, up to which similar pairs are not pulled.
        distance: "euclidean", "sqeuclidean", "cosine", "snr", "manhattan" or the p of a p-norm.
        normalize: scale all rows to length 1 first; "cosine" does in any case.
        squared: whether the two terms are squared; if not, they push and pull with the same force
            at every distance.
        similar_label: for numeric `y`, which of 0 and 1 means similar.
        weight: (n,) how much each pair counts, 0 or more.
        reduction: "mean" over the losses of all pairs, "active" over those that are not 0, (low,
            high) over those between; "sum", or "none" for one loss per pair.

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
    >>> contrastive_loss(x1, x2, y, margin=4.0, squared=False, reduction="active")
    tensor(0.7605)
    >>> contrastive_loss(x1, x2, ~y, pos_margin=3.0, distance="manhattan", reduction="none")
    tensor([ 1., 16.,  4.,  1.])

    Source: Hadsell, Chopra & LeCun, "Dimensionality Reduction by Learning an Invariant Mapping",
    CVPR 2006; "snr", var(x1 - x2) / var(x1), is that of Yuan et al., "Signal-to-Noise Ratio: A
    Robust Distance Metric for Deep Metric Learning", CVPR 2019.
    """
    x1, x2 = embeddings(x1=x1, x2=x2)
    similar = pair_labels(y, like=x1, similar_label=similar_label)
    weights = row_weight(weight, x1)
    x1, x2 = scaled(distance, normalize, x1, x2)
    d = between_rows(x1, x2, distance)
    return reduce(_contrastive(d, similar, margin, pos_margin, squared), reduction, weights)


def contrastive_loss_from_distance(
    d: ArrayLike,
    y: ArrayLike,
    *,
    margin: float = 1.0,
    pos_margin: float = 0.0,
    squared: bool = True,
    similar_label: SimilarLabel = None,
    weight: ArrayLike | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""The contrastive loss of given distances.

    .. math:: \ell_i = s_i \max(0,\, d_i - m^+)^2 + (1 - s_i) \max(0,\, m - d_i)^2

    Keras users know this form as `loss(y_true, y_pred)` with distances as predictions; note that
    here the distances come first.

    Args:
        d: (n,) distances, 0 or more.
        y: (n,) bool, True = similar; or numbers from 0 to 1 together with `similar_label`.
        margin: the distance, 0 or more, at which dissimilar pairs are no longer pushed.
        pos_margin: the distance, 0 or more, up to which similar pairs are not pulled.
        squared: whether the two terms are squared.
        similar_label: for numeric `y`, which of 0 and 1 means similar.
        weight: (n,) how much each pair counts, 0 or more.
        reduction: "mean" over the losses of all pairs, "active" over those that are not 0, (low,
            high) over those between; "sum", or "none" for one loss per pair.

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
    weights = row_weight(weight, d)
    return reduce(_contrastive(d, similar, margin, pos_margin, squared), reduction, weights)


def cosine_loss(
    x1: ArrayLike,
    x2: ArrayLike,
    y: ArrayLike | None = None,
    *,
    margin: float = 0.0,
    similar_label: SimilarLabel = None,
    weight: ArrayLike | None = None,
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
        weight: (n,) how much each pair counts, 0 or more.
        reduction: "mean" over the losses of all pairs, "active" over those that are not 0, (low,
            high) over those between; "sum", or "none" for one loss per pair.

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
    weights = row_weight(weight, x1)
    # In terms of 1 - cos, which stays accurate when the cosine is near 1.
    d = cosine(x1, x2)
    if y is None:
        similar = torch.ones(len(d), dtype=torch.bool, device=d.device)
    else:
        similar = pair_labels(y, like=x1, similar_label=similar_label)
    d = measured("pair", "distance", d, similar)
    return reduce(blend(similar, d, (1 - margin - d).relu()), reduction, weights)


def _contrastive(
    d: Tensor, similar: Tensor, margin: float, pos_margin: float, squared: bool
) -> Tensor:
    between("margin", margin, 0, inf, ", a distance")
    between("pos_margin", pos_margin, 0, inf, ", a distance")
    switch("squared", squared)
    d = measured("pair", "distance", d, similar)
    # The relu, since at distance 0 the derivative is 0.
    near = d if squared and not pos_margin else (d - pos_margin).relu()
    far = (margin - d).relu()
    return blend(similar, near.square(), far.square()) if squared else blend(similar, near, far)
