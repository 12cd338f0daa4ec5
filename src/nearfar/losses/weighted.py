"""Losses that weigh each pair by how it compares with the other pairs of its anchor."""

from functools import partial
from math import inf
from typing import Any

import torch
from torch import Tensor

from nearfar.distance import Distance
from nearfar.engine.closeness import by_distance
from nearfar.engine.log_sum_rule import Exponent, Finished, LogSum, LogSumRule, affine
from nearfar.engine.log_sums import log_sum_loss
from nearfar.engine.meeting import Group, over_processes
from nearfar.engine.precision import Precision
from nearfar.engine.step import run
from nearfar.inputs import ArrayLike, between, positive_number, switch
from nearfar.listed import Pairs
from nearfar.losses.batch import as_batch, row_weight
from nearfar.losses.contrast import have_both
from nearfar.losses.similarity import Similarity, run_by_similarity
from nearfar.losses.terms import softplus
from nearfar.reduction import Reduction
from nearfar.reference import ReferenceLike


@over_processes
def multi_similarity_loss(
    x: ArrayLike,
    labels: ArrayLike | None,
    *,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    similarity: Similarity = "inner_product",
    normalize: bool = True,
    pairs: Pairs | None = None,
    weight: ArrayLike | None = None,
    reference: ReferenceLike | None = None,
    group: Group | None = None,
    precision: Precision | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Weigh each pair by its own similarity and by those of its anchor's other pairs.

    With :math:`s_{ij} = x_i \cdot x_j`, :math:`P(i)` the positives and :math:`N(i)` the negatives,

    .. math:: \ell_i =
        \frac{1}{\alpha} \log\Bigl(1 + \sum_{p \in P(i)} e^{-\alpha (s_{ip} - \lambda)}\Bigr)
        + \frac{1}{\beta} \log\Bigl(1 + \sum_{n \in N(i)} e^{\beta (s_{in} - \lambda)}\Bigr)

    Args:
        x: (n, d) embeddings, any floating dtype.
        labels: (n,) class ids, or (n, c) bool multi-labels; rows that share a label are similar.
            May be None with `pairs`.
        alpha: how sharply positives below `base` are pulled, above 0.
        beta: how sharply negatives above `base` are pushed, above 0.
        base: lambda, the similarity that separates the two.
        similarity: "inner_product", which is the cosine of normalized rows; "cosine", whatever
            `normalize` says; or "sqeuclidean", minus the squared Euclidean distance. These
            are at most 0, so that `base` should be below 0: minus the squared distance that
            separates the two.
        normalize: scale all rows to length 1 first, so that inner products are cosines.
        pairs: the only pairs that count, as a miner found them, or as (similar, dissimilar), each
            (k, 2) indices of an anchor and of another row of the batch or the reference; None: all.
            A pair counts as often as it is listed.
        weight: (n,) how much each anchor counts, 0 or more.
        reference: rows to compare with instead of the other rows of the batch.
        group: the processes that the batch is spread over: "world", a process group, a dimension of
            a DeviceMesh, or `nearfar.distributed.over(...)` of one; None: this one has all of it.
        precision: of matrix products, "float32", "tf32", "bfloat16" or "float16"; None: that of the
            context `nearfar.precision`, or its default.
        reduction: "mean" over all anchors with at least one positive or negative, as in the paper,
            "active" over those whose loss is not 0, (low, high) over those between; "sum", or
            "none" for one loss per anchor.

    Returns:
        A scalar, or (n,) with reduction="none"; float32 or wider.

    Raises:
        TypeError: labels that are not class ids or bool multi-labels.
        ValueError: a shape, length, device or hyperparameter out of range.

    >>> import torch
    >>> x = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1], [-0.6, 0.8]])
    >>> multi_similarity_loss(x, [0, 0, 1, 1])
    tensor(0.2688)

    Source: Wang et al., "Multi-Similarity Loss with General Pair Weighting for Deep Metric
    Learning", CVPR 2019, equation 17; its mining of pairs is a separate step.
    """
    alpha, beta = positive_number("alpha", alpha), positive_number("beta", beta)
    between("base", base, -inf, inf)

    def finish(negatives: LogSum, near: Tensor, _: None) -> Finished:
        far = negatives.value
        loss = softplus(near) / alpha + softplus(far) / beta
        return loss, far.sigmoid() / beta, near.sigmoid() / alpha

    rule = LogSumRule(
        finish,
        counts=lambda relation: relation.n_positives() + relation.n_negatives() > 0,
        near=affine(-alpha, alpha * base),
        far=affine(beta, -beta * base),
        steepness=max(alpha, beta),
        offset=beta * abs(base),
    )
    rows, columns, relation = as_batch(x, labels, reference, reduction, pairs, group)
    return run_by_similarity(
        partial(log_sum_loss, rule),
        rows,
        columns,
        relation,
        similarity=similarity,
        normalize=normalize,
        reduction=reduction,
        precision=precision,
        group=group,
        weight=weight,
    )


@over_processes
def circle_loss(
    x: ArrayLike,
    labels: ArrayLike | None,
    *,
    margin: float = 0.25,
    scale: float = 256.0,
    similarity: Similarity = "inner_product",
    normalize: bool = True,
    pairs: Pairs | None = None,
    weight: ArrayLike | None = None,
    reference: ReferenceLike | None = None,
    group: Group | None = None,
    precision: Precision | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Pull and push each similarity harder the farther it is from its target.

    With :math:`\gamma` the scale, :math:`s_p` and :math:`s_n` an anchor's similarities to positives
    and negatives,

    .. math:: \ell_i = \log\Bigl(1 + \sum_n e^{\gamma \alpha_n (s_n - m)}
                \sum_p e^{-\gamma \alpha_p (s_p - (1 - m))}\Bigr), \quad
                \alpha_n = [s_n + m]_+,\ \alpha_p = [1 + m - s_p]_+

    The gradient treats the weights :math:`\alpha` as constant.

    Args:
        x: (n, d) embeddings, any floating dtype.
        labels: (n,) class ids, or (n, c) bool multi-labels; rows that share a label are similar.
            May be None with `pairs`.
        margin: m, from 0 to 1: similarities should reach 1 - m and m.
        scale: gamma, above 0.
        similarity: "inner_product", which is the cosine of normalized rows; "cosine", whatever
            `normalize` says; or "sqeuclidean", minus the squared Euclidean distance. These
            are at most 0: dissimilar rows are pushed up to a squared distance of m, and similar
            rows reach their target only with m = 1.
        normalize: scale all rows to length 1 first, so that inner products are cosines.
        pairs: the only pairs that count, as a miner found them, or as (similar, dissimilar), each
            (k, 2) indices of an anchor and of another row of the batch or the reference; None: all.
            A pair counts as often as it is listed.
        weight: (n,) how much each anchor counts, 0 or more.
        reference: rows to compare with instead of the other rows of the batch.
        group: the processes that the batch is spread over: "world", a process group, a dimension of
            a DeviceMesh, or `nearfar.distributed.over(...)` of one; None: this one has all of it.
        precision: of matrix products, "float32", "tf32", "bfloat16" or "float16"; None: that of the
            context `nearfar.precision`, or its default.
        reduction: "mean" over the anchors that have a positive and a negative, "active" over those
            whose loss is not 0, (low, high) over those between; "sum", or "none", where the others
            are 0.

    Returns:
        A scalar, or (n,) with reduction="none"; float32 or wider.

    Raises:
        TypeError: labels that are not class ids or bool multi-labels.
        ValueError: a shape, length, device or hyperparameter out of range.

    >>> import torch
    >>> x = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1], [-0.6, 0.8]])
    >>> circle_loss(x, [0, 0, 1, 1], scale=16.0)
    tensor(2.5427)

    Source: Sun et al., "Circle Loss: A Unified Perspective of Pair Similarity Optimization",
    CVPR 2020, equations 6 and 8.
    """
    between("margin", margin, 0, 1)
    scale = positive_number("scale", scale)

    def push(s: Tensor) -> Tensor:
        return (s.detach() + margin).relu_().mul_(scale)

    def pull(s: Tensor) -> Tensor:
        return (s.detach() - (1 + margin)).clamp_(max=0).mul_(scale)

    def finish(negatives: LogSum, near: Tensor, _: None) -> Finished:
        gap = negatives.value + near
        wrong = gap.sigmoid()
        return softplus(gap), wrong, wrong

    rule = LogSumRule(
        finish,
        counts=have_both,
        near=Exponent(lambda s: pull(s) * (s - (1 - margin)), pull, _pull_kernel, (margin, scale)),
        far=Exponent(lambda s: push(s) * (s - margin), push, _push_kernel, (margin, scale)),
        steepness=scale * (1 + margin),
        offset=scale * (1 + margin) * margin,
    )
    rows, columns, relation = as_batch(x, labels, reference, reduction, pairs, group)
    return run_by_similarity(
        partial(log_sum_loss, rule),
        rows,
        columns,
        relation,
        similarity=similarity,
        normalize=normalize,
        reduction=reduction,
        precision=precision,
        group=group,
        weight=weight,
    )


@over_processes
def lifted_structure_loss(
    x: ArrayLike,
    labels: ArrayLike | None,
    *,
    margin: float = 1.0,
    distance: Distance = "euclidean",
    normalize: bool = False,
    pairs: Pairs | None = None,
    weight: ArrayLike | None = None,
    reference: ReferenceLike | None = None,
    group: Group | None = None,
    precision: Precision | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Pull the farthest positives and push the nearest negatives of each anchor, smoothly.

    .. math:: \ell_i = \Bigl[ \log \sum_{p \in P(i)} e^{d_{ip}}
                + \log \sum_{n \in N(i)} e^{m - d_{in}} \Bigr]_+

    Args:
        x: (n, d) embeddings, any floating dtype.
        labels: (n,) class ids, or (n, c) bool multi-labels; rows that share a label are similar.
            May be None with `pairs`.
        margin: m, 0 or more, in units of the distance.
        distance: "euclidean", "sqeuclidean", "cosine", "snr" (anchor first), "manhattan", or a
            number p of at least 1 for the p-norm.
        normalize: scale all rows to length 1 first; "cosine" does so in any case.
        pairs: the only pairs that count, as a miner found them, or as (similar, dissimilar), each
            (k, 2) indices of an anchor and of another row of the batch or the reference; None: all.
            A pair counts as often as it is listed.
        weight: (n,) how much each anchor counts, 0 or more.
        reference: rows to compare with instead of the other rows of the batch.
        group: the processes that the batch is spread over: "world", a process group, a dimension of
            a DeviceMesh, or `nearfar.distributed.over(...)` of one; None: this one has all of it.
        precision: of matrix products, "float32", "tf32", "bfloat16" or "float16"; None: that of the
            context `nearfar.precision`, or its default.
        reduction: "mean" over the anchors that have a positive and a negative, "active" over those
            whose loss is not 0, (low, high) over those between; "sum", or "none", where the others
            are 0.

    Returns:
        A scalar, or (n,) with reduction="none"; float32 or wider.

    Raises:
        TypeError: labels that are not class ids or bool multi-labels.
        ValueError: a shape, length, device or hyperparameter out of range.

    >>> import torch
    >>> x = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1], [-0.6, 0.8]])
    >>> lifted_structure_loss(x, [0, 0, 1, 1])
    tensor(0.9731)

    Source: Hermans, Beyer & Leibe, "In Defense of the Triplet Loss for Person Re-Identification",
    2017, equation 8, the generalised form of Oh Song et al., CVPR 2016.
    """
    between("margin", margin, 0, inf, ", a distance")

    def finish(negatives: LogSum, near: Tensor, _: None) -> Finished:
        loss = (negatives.value + near).relu()
        active = loss.sign()
        return loss, active, active

    rule = LogSumRule(
        finish,
        counts=have_both,
        near=affine(1.0, 0.0),
        far=affine(-1.0, margin),
        offset=inf,  # unlike products, distances are not bounded
    )
    rows, columns, relation = as_batch(x, labels, reference, reduction, pairs, group)
    closeness = by_distance(distance)
    return run(
        partial(log_sum_loss, rule, closeness),
        rows,
        columns,
        relation,
        closeness=closeness,
        normalize=switch("normalize", normalize) or distance == "cosine",
        reduction=reduction,
        precision=precision,
        group=group,
        weight=row_weight(weight, rows),
    )


@over_processes
def lifted_pair_loss(
    x: ArrayLike,
    labels: ArrayLike | None,
    *,
    margin: float = 1.0,
    distance: Distance = "euclidean",
    normalize: bool = False,
    pairs: Pairs | None = None,
    weight: ArrayLike | None = None,
    group: Group | None = None,
    precision: Precision | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""One hinge per similar pair, which compares it with all negatives of both its ends.

    The lifted structure loss as in its paper. With :math:`N(i)` the negatives of row i,

    .. math:: \ell_{ij} = \frac{1}{2} \Bigl[ d_{ij} + \log \Bigl( \sum_{k \in N(i)} e^{m - d_{ik}}
                + \sum_{l \in N(j)} e^{m - d_{jl}} \Bigr) \Bigr]_+^2

    A pair of which neither end has a negative has loss 0. `lifted_structure_loss` is the later
    form, with one loss per row.

    Args:
        x: (n, d) embeddings, any floating dtype.
        labels: (n,) class ids, or (n, c) bool multi-labels; rows that share a label are similar.
            May be None with `pairs`.
        margin: m, 0 or more, in units of the distance.
        distance: "euclidean", "sqeuclidean", "cosine", "snr" (anchor first), "manhattan", or a
            number p of at least 1 for the p-norm.
        normalize: scale all rows to length 1 first; "cosine" does so in any case.
        pairs: the only pairs that count, as a miner found them, or as (similar, dissimilar), each
            (k, 2) indices of an anchor and of another row of the batch; None: all. A pair counts as
            often as it is listed.
        weight: (n,) how much each anchor counts, 0 or more.
        group: the processes that the batch is spread over: "world", a process group, a dimension of
            a DeviceMesh, or `nearfar.distributed.over(...)` of one; None: this one has all of it.
        precision: of matrix products, "float32", "tf32", "bfloat16" or "float16"; None: that of the
            context `nearfar.precision`, or its default.
        reduction: "mean" over the similar pairs, each in both orders; "active" over those that are
            not 0, (low, high) over those between; "sum", or "none" for (n,) sums, one per anchor.

    Returns:
        A scalar, or (n,) with reduction="none"; float32 or wider.

    Raises:
        TypeError: labels that are not class ids or bool multi-labels.
        ValueError: a shape, length, device or hyperparameter out of range.

    >>> x = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1], [-0.6, 0.8]])
    >>> lifted_pair_loss(x, [0, 0, 1, 1])
    tensor(1.4328)

    Source: Oh Song, Xiang, Jegelka & Savarese, "Deep Metric Learning via Lifted Structured Feature
    Embedding", CVPR 2016, equation 4.
    """
    between("margin", margin, 0, inf, ", a distance")

    def finish(negatives: tuple[LogSum, LogSum], d: Tensor, _: None) -> Finished:
        of_ends = torch.stack([of_end.value for of_end in negatives])
        far = of_ends.logsumexp(0)
        excess = (d + far).relu()
        share = (of_ends - far.clamp(min=torch.finfo(far.dtype).min)).exp()
        return excess.square() / 2, excess * share, excess

    rule = LogSumRule(
        finish,
        counts=lambda relation: relation.n_positives(),
        per_positive=True,
        both_ends=True,
        term="lifted",
        far=affine(-1.0, margin),
        offset=inf,  # unlike products, distances are not bounded
    )
    rows, columns, relation = as_batch(x, labels, None, reduction, pairs, group)
    closeness = by_distance(distance)
    return run(
        partial(log_sum_loss, rule, closeness),
        rows,
        columns,
        relation,
        closeness=closeness,
        normalize=switch("normalize", normalize) or distance == "cosine",
        reduction=reduction,
        precision=precision,
        group=group,
        weight=row_weight(weight, rows),
    )


def _push_kernel(s: "Any", numbers: "Any") -> "Any":
    margin = numbers[0]
    push = (s + margin) * numbers[1]
    push = push * (push > 0)
    return push * (s - margin), push


def _pull_kernel(s: "Any", numbers: "Any") -> "Any":
    margin = numbers[0]
    pull = (s - 1 - margin) * numbers[1]
    pull = pull * (pull < 0)
    return pull * (s - 1 + margin), pull
