"""Losses that are a sum over all pairs of the batch."""

from functools import partial
from math import inf
from typing import Any, Literal

import torch
from torch import Tensor

from nearfar.distance import Distance, check_distance
from nearfar.engine.closeness import by_distance
from nearfar.engine.meeting import Group, over_processes
from nearfar.engine.pair_sums import PairKernel, PairSum, pair_loss
from nearfar.engine.precision import Precision
from nearfar.engine.relation import matched
from nearfar.engine.step import run
from nearfar.inputs import ArrayLike, above_zero, between, finite, one_of, switch
from nearfar.listed import Pairs
from nearfar.losses.batch import as_batch, as_items, as_towers, row_weight
from nearfar.losses.own import PairRule, batch_loss
from nearfar.losses.similarity import Similarity, run_by_similarity
from nearfar.losses.terms import softplus_and_slope
from nearfar.reduction import Reduction
from nearfar.reference import ReferenceLike

Selection = Literal["all", "hard"]


@over_processes
def batch_contrastive_loss(
    x: ArrayLike,
    labels: ArrayLike | None,
    *,
    margin: float = 1.0,
    pos_margin: float = 0.0,
    squared: bool = True,
    distance: Distance = "euclidean",
    normalize: bool = False,
    select: Selection = "all",
    pairs: Pairs | None = None,
    weight: ArrayLike | None = None,
    reference: ReferenceLike | None = None,
    group: Group | None = None,
    precision: Precision | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""The contrastive loss over all pairs, with equal weight on similar and on dissimilar ones.

    With :math:`S` the ordered pairs :math:`i \ne j` that share a label and :math:`D` the others,

    .. math:: L = \frac{1}{|S|} \sum_{(i,j) \in S} \max(0,\, d_{ij} - m_p)^2
                + \frac{1}{|D|} \sum_{(i,j) \in D} \max(0,\, m - d_{ij})^2

    without the squares if `squared` is false.

    In a batch the dissimilar pairs outnumber the similar ones by hundreds to one, so in a mean over
    all pairs the pull would vanish. (`contrastive_loss` on listed pairs is the plain mean.)

    With `select="hard"` only pairs in the overlap of the two kinds count (online contrastive loss):
    :math:`S` becomes the similar pairs farther apart than the nearest dissimilar pair of the batch,
    :math:`D` the dissimilar pairs closer than its farthest similar pair. If the kinds do not
    overlap, or one is missing, the loss is 0. The gradient treats the selection as constant.

    Args:
        x: (n, d) embeddings, any floating dtype.
        labels: (n,) class ids, or (n, c) bool multi-labels; rows that share a label are similar.
            May be None with `pairs`.
        margin: the distance, 0 or more, at which dissimilar pairs are no longer pushed.
        pos_margin: the distance, 0 or more, at which similar pairs are no longer pulled.
        squared: whether the two hinges are squared, as in the paper.
        distance: "euclidean", "sqeuclidean", "cosine", "snr" (anchor first), "manhattan", or a
            number p of at least 1 for the p-norm.
        normalize: scale all rows to length 1 first; "cosine" does so in any case.
        select: "all" pairs, or "hard", those in the overlap; with `pairs`, the overlap among them.
        pairs: the only pairs that count, as a miner found them, or as (similar, dissimilar), each
            (k, 2) indices of an anchor and of another row of the batch or the reference; None: all.
            A pair counts as often as it is listed.
        weight: (n,) how much each anchor counts, 0 or more.
        reference: rows to compare with instead of the other rows of the batch.
        group: the processes that the batch is spread over: "world", a process group, a dimension of
            a DeviceMesh, or `nearfar.distributed.over(...)` of one; None: this one has all of it.
        precision: of matrix products, "float32", "tf32", "bfloat16" or "float16"; None: that of the
            context `nearfar.precision`, or its default.
        reduction: "mean" over similar plus mean over dissimilar pairs, "active" over those of each
            kind that are not 0, (low, high) over those between; "sum" over all ordered pairs, or
            "none" for (n,) sums, one per row over its pairs, without those means.

    Returns:
        A scalar, or (n,) with reduction="none"; float32 or wider. A kind of pair that does not
        occur adds 0.

    Raises:
        TypeError: labels that are not class ids or bool multi-labels.
        ValueError: a shape, length, device or hyperparameter out of range.

    >>> x = torch.tensor([[0.0, 0], [0, 0.5], [0.25, 0]])
    >>> batch_contrastive_loss(x, [0, 0, 1])  # similar 0.5; dissimilar 0.25 and 0.559
    tensor(0.6285)
    >>> batch_contrastive_loss(x, [0, 0, 1], reduction="sum")
    tensor(2.0139)
    >>> batch_contrastive_loss(x, [0, 0, 1], select="hard")  # 0.5 > 0.25, and 0.25 < 0.5
    tensor(0.8125)

    Source: Hadsell, Chopra & LeCun, CVPR 2006, over all pairs as in pytorch-metric-learning; the
    selection as in sentence-transformers' OnlineContrastiveLoss, over all pairs of the batch.
    """
    between("margin", margin, 0, inf, ", a distance")
    between("pos_margin", pos_margin, 0, inf, ", a distance")
    check_distance(distance)
    switch("squared", squared)
    switch("normalize", normalize)
    one_of("select", select, Selection)

    def near(d: Tensor) -> tuple[Tensor, Tensor]:
        excess = (d - pos_margin).relu_() if pos_margin else d
        return (excess.square(), 2 * excess) if squared else (excess.clone(), excess.sign())

    def far(d: Tensor) -> tuple[Tensor, Tensor]:
        shortfall = (margin - d).relu_()
        if squared:
            return shortfall.square(), -2 * shortfall
        return shortfall, shortfall.sign().neg_()

    terms = (_near_squared, _far_squared) if squared else (_near, _far)
    kernel = PairKernel(*terms, (float(margin), float(pos_margin)))
    if select == "all":
        return batch_loss(
            PairRule(near, far, kernel=kernel),
            x,
            labels,
            distance=distance,
            normalize=normalize,
            pairs=pairs,
            weight=weight,
            reference=reference,
            reduction=reduction,
            precision=precision,
            group=group,
        )
    rows, columns, relation = as_batch(x, labels, reference, reduction, pairs, group)
    return run(
        partial(pair_loss, PairSum(near, far, kernel=kernel), by_distance(distance), overlap=True),
        rows,
        columns,
        relation,
        closeness=by_distance(distance),
        normalize=normalize or distance == "cosine",
        reduction=reduction,
        precision=precision,
        group=group,
        weight=row_weight(weight, rows),
    )


@over_processes
def batch_cosine_loss(
    x: ArrayLike,
    labels: ArrayLike | None,
    *,
    margin: float = 0.0,
    pairs: Pairs | None = None,
    weight: ArrayLike | None = None,
    reference: ReferenceLike | None = None,
    group: Group | None = None,
    precision: Precision | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""The cosine loss over all pairs, with equal weight on similar and on dissimilar ones.

    With :math:`S` the ordered pairs :math:`i \ne j` that share a label and :math:`D` the others,

    .. math:: L = \frac{1}{|S|} \sum_{(i,j) \in S} (1 - \cos_{ij})
                + \frac{1}{|D|} \sum_{(i,j) \in D} \max(0,\, \cos_{ij} - m)

    Args:
        x: (n, d) embeddings, any floating dtype.
        labels: (n,) class ids, or (n, c) bool multi-labels; rows that share a label are similar.
            May be None with `pairs`.
        margin: the cosine, from -1 to 1, below which dissimilar pairs are not pushed.
        pairs: the only pairs that count, as a miner found them, or as (similar, dissimilar), each
            (k, 2) indices of an anchor and of another row of the batch or the reference; None: all.
            A pair counts as often as it is listed.
        weight: (n,) how much each anchor counts, 0 or more.
        reference: rows to compare with instead of the other rows of the batch.
        group: the processes that the batch is spread over: "world", a process group, a dimension of
            a DeviceMesh, or `nearfar.distributed.over(...)` of one; None: this one has all of it.
        precision: of matrix products, "float32", "tf32", "bfloat16" or "float16"; None: that of the
            context `nearfar.precision`, or its default.
        reduction: "mean" over similar plus mean over dissimilar pairs, "active" over those of each
            kind that are not 0, (low, high) over those between; "sum" over all ordered pairs, or
            "none" for (n,) sums, one per row over its pairs, without those means.

    Returns:
        A scalar, or (n,) with reduction="none"; float32 or wider.

    Raises:
        TypeError: labels that are not class ids or bool multi-labels.
        ValueError: a shape, length, device or hyperparameter out of range.

    >>> x = torch.tensor([[1.0, 0], [0.6, 0.8], [0, 1]])
    >>> batch_cosine_loss(x, [0, 0, 1])  # similar at cosine 0.6; dissimilar at 0 and 0.8
    tensor(0.8000)

    Source: as `cosine_loss`, over all pairs.
    """
    between("margin", margin, -1, 1, ", a cosine")

    def near(d: Tensor) -> tuple[Tensor, Tensor]:
        return d.clone(), torch.ones_like(d)

    def far(d: Tensor) -> tuple[Tensor, Tensor]:
        shortfall = (1 - margin - d).relu_()
        return shortfall, shortfall.sign().neg_()

    rule = PairRule(near, far, kernel=PairKernel(_itself, _far, (1 - margin,)))
    return batch_loss(
        rule,
        x,
        labels,
        distance="cosine",
        pairs=pairs,
        weight=weight,
        reference=reference,
        reduction=reduction,
        precision=precision,
        group=group,
    )


@over_processes
def siglip_loss(
    x: ArrayLike,
    y: ArrayLike,
    *,
    scale: float | Tensor,
    bias: float | Tensor,
    similarity: Similarity = "inner_product",
    normalize: bool = True,
    ids: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    group: Group | None = None,
    precision: Precision | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""The sigmoid loss of two towers: each pair is classified by itself as a match or not.

    With :math:`z_{ij} = t\, x_i \cdot y_j + b`,

    .. math:: L = -\frac{1}{n} \sum_i \Bigl( \log \sigma(z_{ii})
                + \sum_{j \ne i} \log \sigma(-z_{ij}) \Bigr)

    Args:
        x: (n, d) embeddings of the first tower, any floating dtype.
        y: (n, d) embeddings of the second; row i matches row i of `x` and no other.
        scale: t, above 0; the paper learns log t from log 10: pass `log_t.exp()`
            in each step, to the function, not to the module.
        bias: b; the paper learns it from -10.
        similarity: "inner_product", which is the cosine of normalized rows; "cosine", whatever
            `normalize` says; or "sqeuclidean", minus the squared Euclidean distance.
        normalize: scale all rows to length 1 first, so that inner products are cosines.
        ids: (n,) integers, the item of each match: the rows of one item are no negatives of each
            other, and count as no pair. (n, k): several ids, of which two matches need one in
            common. -1 for none; None: every match is another item.
        weight: (n,) how much each row of `x` counts, 0 or more.
        group: the processes that the batch is spread over: "world", a process group, a dimension of
            a DeviceMesh, or `nearfar.distributed.over(...)` of one; None: this one has all of it.
        precision: of matrix products, "float32", "tf32", "bfloat16" or "float16"; None: that of the
            context `nearfar.precision`, or its default.
        reduction: "mean" over the n rows (each a sum over n pairs, as in the paper), "active" over
            those whose loss is not 0, (low, high) over those between; "sum", or "none" for one loss
            per row.

    Returns:
        A scalar, or (n,) with reduction="none"; float32 or wider. Scale and bias may be tensors
        with one number, and get gradients.

    Raises:
        TypeError: an argument is not an array of numbers.
        ValueError: a shape, device or hyperparameter out of range.

    >>> siglip_loss(torch.eye(3), torch.eye(3), scale=10.0, bias=-5.0)
    tensor(0.0201)

    Source: Zhai, Mustafa, Kolesnikov & Beyer, "Sigmoid Loss for Language Image Pre-Training",
    ICCV 2023.
    """
    rows, columns = as_towers(x=x, y=y)

    def match(z: Tensor) -> tuple[Tensor, Tensor]:
        loss, force = softplus_and_slope(-z)
        return loss, force.neg_()

    relation = matched(len(rows), len(columns), rows.device, as_items(ids, rows, reduction))
    rule = PairSum(match, softplus_and_slope, "rows", PairKernel("match", "no_match"))
    return run_by_similarity(
        partial(pair_loss, rule),
        rows,
        columns,
        relation,
        similarity=similarity,
        normalize=normalize,
        reduction=reduction,
        precision=precision,
        group=group,
        scale=above_zero("scale", scale),
        bias=finite("bias", bias),
        weight=weight,
    )


# The terms as kernels run them; numbers are the margin and the margin of positives.
def _near(d: "Any", numbers: "Any") -> "Any":
    excess = d - numbers[1]
    return excess * (excess > 0), 1.0 * (excess > 0)


def _far(d: "Any", numbers: "Any") -> "Any":
    shortfall = numbers[0] - d
    return shortfall * (shortfall > 0), -1.0 * (shortfall > 0)


def _near_squared(d: "Any", numbers: "Any") -> "Any":
    excess = d - numbers[1]
    excess = excess * (excess > 0)
    return excess * excess, 2 * excess


def _far_squared(d: "Any", numbers: "Any") -> "Any":
    shortfall = numbers[0] - d
    shortfall = shortfall * (shortfall > 0)
    return shortfall * shortfall, -2 * shortfall


def _itself(d: "Any", numbers: "Any") -> "Any":
    return d, 0 * d + 1
