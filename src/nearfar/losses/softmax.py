"""Losses that pick the right one out of many by a softmax."""

from math import inf

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nearfar.distance import unit
from nearfar.inputs import (
    ArrayLike,
    above_zero,
    between,
    embeddings,
    lift,
    matrix,
    same_device,
    tensor,
)
from nearfar.labels import class_ids
from nearfar.losses.reduction import Reduction, reduce
from nearfar.losses.shell import as_module
from nearfar.observe import measured


def info_nce_loss(
    query: ArrayLike,
    positive: ArrayLike,
    negatives: ArrayLike | None = None,
    *,
    temperature: float | Tensor = 0.07,
    normalize: bool = True,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Pick the positive out of the negatives: softmax cross-entropy over similarities.

    With :math:`s^+_i = q_i \cdot p_i / \tau` and :math:`s^-_{ij} = q_i \cdot n_{ij} / \tau`,

    .. math:: \ell_i = -\log \frac{e^{s^+_i}}{e^{s^+_i} + \sum_j e^{s^-_{ij}}}
                     = \log\Bigl(1 + \sum_j e^{s^-_{ij} - s^+_i}\Bigr)

    computed in the second form, which keeps its digits when the loss is near 0 and cannot
    saturate when it is large.

    Args:
        query: (n, d) embeddings, any floating dtype.
        positive: (n, d) embeddings; row i is the match of row i of `query`.
        negatives: (m, d), shared by all queries; (n, m, d), m for each query; or None, where the
            other rows of `positive` are the negatives of row i.
        temperature: tau, above 0; smaller looks harder at the nearest negatives. A tensor with one
            number may be learned.
        normalize: scale all rows to length 1 first, so that similarities are cosines.
        reduction: "mean" over the queries, "sum", or "none" for a loss a query.

    Returns:
        A scalar, or (n,) losses with reduction="none"; float32 or wider. A query with nothing to
        compare against costs 0.

    Raises:
        TypeError: an argument is not an array of numbers.
        ValueError: a shape, device or hyperparameter out of range.

    >>> import torch
    >>> query = torch.tensor([[-0.83483301, -0.16904167, 0.52390721]], dtype=torch.float64)
    >>> positive = torch.tensor([[-0.83455951, -0.16862266, 0.52447767]], dtype=torch.float64)
    >>> negatives = torch.tensor(
    ...     [[0.70374682, -0.18682394, -0.68544673], [0.15465702, 0.32303224, 0.93366556],
    ...      [0.53043332, -0.83523217, -0.14500935], [0.68285685, -0.73054075, 0.00409143],
    ...      [0.76652431, 0.61500886, 0.18494479]], dtype=torch.float64)
    >>> round(info_nce_loss(query, positive, negatives, normalize=False).item(), 15)
    4.906865066e-05
    >>> negatives[:2] = positive  # two negatives as close as the positive: -log(1/3)
    >>> round(info_nce_loss(query, positive, negatives, normalize=False).item(), 12)
    1.098612289999
    >>> info_nce_loss(torch.eye(3), torch.eye(3), temperature=0.5)  # the other rows as negatives
    tensor(0.2395)

    Source: van den Oord, Li & Vinyals, "Representation Learning with Contrastive Predictive
    Coding", 2018.
    """
    query, positive = embeddings(query=query, positive=positive)
    temperature = above_zero("temperature", temperature)
    scale = unit if normalize else _as_is
    query, positive = scale(query), scale(positive)
    # Under autocast a matrix product would drop to half precision, and its digits with it.
    with torch.autocast(query.device.type, enabled=False):
        if negatives is None:
            everyone = query @ positive.T
            to_positive = everyone.diagonal()
            itself = torch.eye(len(query), dtype=torch.bool, device=query.device)
            to_negatives = everyone.masked_fill(itself, -inf)
        else:
            others = scale(_negatives(negatives, query))
            to_positive = (query * positive).sum(-1)
            shared = others.ndim == 2
            to_negatives = query @ others.T if shared else (others @ query[..., None])[..., 0]
    to_positive = measured("positive", "similarity", to_positive)
    to_negatives = measured("negative", "similarity", to_negatives)
    return reduce(_pick(to_positive / temperature, to_negatives / temperature), reduction)


def softmax_loss(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Softmax cross-entropy: pick the target class out of all classes.

    .. math:: \ell_i = -\log \frac{e^{z_{i t_i}}}{\sum_j e^{z_{ij}}}
                     = \log\Bigl(1 + \sum_{j \ne t_i} e^{z_{ij} - z_{i t_i}}\Bigr)

    computed in the second form, which keeps its digits when the loss is near 0. With label
    smoothing :math:`\varepsilon` the target has weight :math:`1 - \varepsilon` and every class,
    itself included, :math:`\varepsilon / c` (Szegedy et al. 2016), which adds
    :math:`\varepsilon (z_{i t_i} - \tfrac{1}{c} \sum_j z_{ij})`.

    Args:
        logits: (n, c) scores, any floating dtype, not normalised.
        target: (n,) class ids from 0 to c - 1, any integer dtype.
        label_smoothing: epsilon, from 0 to 1.
        reduction: "mean" over the rows, "sum", or "none" for a loss a row.

    Returns:
        A scalar, or (n,) losses with reduction="none"; float32 or wider.

    Raises:
        TypeError: `logits` is not an array of numbers, or `target` not integers.
        ValueError: a shape, length, device, class id or hyperparameter out of range.

    >>> logits = [[2.0, 0.0, 0.0], [0.0, 40.0, 0.0]]
    >>> softmax_loss(logits, [0, 1], reduction="none")
    tensor([2.3954e-01, 8.4967e-18])
    >>> softmax_loss(logits, [0, 1], label_smoothing=0.1)
    tensor(1.5198)

    Source: Bridle, "Probabilistic Interpretation of Feedforward Classification Network Outputs",
    1990.
    """
    logits = lift("logits", tensor("logits", logits))
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(
            f"logits must have shape (n, c), a score for each of c classes, "
            f"got {tuple(logits.shape)}."
        )
    target = class_ids(target, like=logits, n_classes=logits.shape[1], name="target")
    between("label_smoothing", label_smoothing, 0, 1)
    of_target = measured("positive", "logit", logits.gather(1, target[:, None])[:, 0])
    of_others = measured("negative", "logit", logits.scatter(1, target[:, None], -inf))
    per_row = _pick(of_target, of_others)
    if label_smoothing:
        total = of_target + of_others.scatter(1, target[:, None], 0).sum(1)
        per_row = per_row + label_smoothing * (of_target - total / logits.shape[1])
    return reduce(per_row, reduction)


def _pick(chosen: Tensor, others: Tensor) -> Tensor:
    """log(1 + sum_j e^(others_j - chosen)); others at -inf take no part."""
    return -logsigmoid(chosen - others.logsumexp(1))


def _negatives(negatives: ArrayLike, query: Tensor) -> Tensor:
    """(m, d) or (n, m, d), lifted and checked against the queries."""
    n, d = query.shape
    given = tensor("negatives", negatives)
    if given.ndim == 2:
        return matrix("negatives", given, width=d, like=query)
    if given.ndim != 3 or given.shape[0] != n or given.shape[2] != d:
        raise ValueError(
            f"negatives must have shape (m, {d}), shared by all queries, or ({n}, m, {d}), "
            f"m for each query; got {tuple(given.shape)}."
        )
    same_device("negatives", given, "query", query)
    return lift("negatives", given)


def _as_is(x: Tensor) -> Tensor:
    return x


InfoNCELoss = as_module(info_nce_loss)
SoftmaxLoss = as_module(softmax_loss)
