"""Softmax losses over a whole batch: pick the positives out of all other rows."""

from functools import partial
from math import inf

import torch
from torch import Tensor

from nearfar.engine.log_sum_rule import Finished, LogSum, LogSumRule, affine
from nearfar.engine.log_sums import log_sum_loss
from nearfar.engine.meeting import Group, over_processes
from nearfar.engine.precision import Precision
from nearfar.engine.relation import Relation, matched
from nearfar.inputs import ArrayLike, above_zero, switch
from nearfar.listed import Pairs
from nearfar.losses.batch import as_batch, as_items, as_towers
from nearfar.losses.similarity import Similarity, run_by_similarity
from nearfar.losses.terms import softplus
from nearfar.reduction import Reduction
from nearfar.reference import ReferenceLike


def pick_one(negatives: LogSum, positive: Tensor, _: Tensor | float) -> Finished:
    """log(1 + sum_n e^(z_n - z_p)), for one positive per anchor."""
    gap = negatives.minus(positive)
    wrong = gap.sigmoid()
    return softplus(gap), wrong, -wrong


def pick_all(logs: LogSum, positives: Tensor, count: Tensor | float) -> Finished:
    """log(sum e^z) - mean z_p."""
    one = torch.ones_like(positives)
    return logs.minus(positives / count), one, -one / count


def have_positives(relation: Relation) -> Tensor | None:
    """Which anchors have a positive; None: all."""
    return None if relation.one_positive else relation.n_positives() > 0


def have_both(relation: Relation) -> Tensor:
    """Which anchors have a positive and a negative."""
    return relation.n_positives() * relation.n_negatives() > 0


IDENTITY = affine(1.0, 0.0)
ONE = LogSumRule(pick_one, have_positives)
ALL = LogSumRule(pick_all, have_positives, with_positives=True, single=pick_one)
DECOUPLED = LogSumRule(pick_all, have_both)  # the log-sum-exp leaves the positives out


@over_processes
def clip_loss(
    x: ArrayLike,
    y: ArrayLike,
    *,
    scale: float | Tensor,
    similarity: Similarity = "inner_product",
    normalize: bool = True,
    decoupled: bool = False,
    ids: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    group: Group | None = None,
    precision: Precision | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Match two towers in both directions: softmax over the rows and over the columns.

    With :math:`z_{ij} = t\, x_i \cdot y_j`,

    .. math:: L = \frac{1}{2n} \sum_i \Bigl( -\log \frac{e^{z_{ii}}}{\sum_j e^{z_{ij}}}
                - \log \frac{e^{z_{ii}}}{\sum_j e^{z_{ji}}} \Bigr)

    computed as :math:`\log(1 + \sum_{j \ne i} e^{z_{ij} - z_{ii}})`, which stays accurate when the
    loss is near 0 and the scale is high.

    Args:
        x: (n, d) embeddings of the first tower, any floating dtype.
        y: (n, d) embeddings of the second; row i matches row i of `x` and no other.
        scale: t = 1 / temperature, above 0; the paper learns log t, from log(1 / 0.07) up to
            log 100: pass `log_t.exp()` in each step, to the function, not to the module.
        similarity: "inner_product", which is the cosine of normalized rows; "cosine", whatever
            `normalize` says; or "sqeuclidean", minus the squared Euclidean distance.
        normalize: scale all rows to length 1 first, so that inner products are cosines.
        decoupled: leave the match out of both denominators (Yeh et al. 2022).
        ids: (n,) integers, the item of each match: the rows of one item are no negatives of each
            other, and count as no pair. (n, k): several ids, of which two matches need one in
            common. -1 for none; None: every match is another item.
        weight: (n,) how much each match counts, 0 or more.
        group: the processes that the batch is spread over: "world", a process group, a dimension of
            a DeviceMesh, or `nearfar.distributed.over(...)` of one; None: this one has all of it.
        precision: of matrix products, "float32", "tf32", "bfloat16" or "float16"; None: that of the
            context `nearfar.precision`, or its default.
        reduction: "mean" over the n matches, "active" over those whose loss is not 0, (low, high)
            over those between; "sum", or "none" for one loss per match. The loss of a single match
            is 0.

    Returns:
        A scalar, or (n,) with reduction="none"; float32 or wider. Scale may be a tensor with one
        number, and gets its gradient.

    Raises:
        TypeError: an argument is not an array of numbers.
        ValueError: a shape, device or hyperparameter out of range.

    >>> clip_loss(torch.eye(3), torch.eye(3), scale=2.0)
    tensor(0.2395)
    >>> x = torch.tensor([[1.0, 0], [0.6, 0.8]])
    >>> clip_loss(x, torch.eye(2), scale=10.0, reduction="none")
    tensor([0.0091, 0.0636])

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language
    Supervision", ICML 2021, figure 3.
    """
    rows, columns = as_towers(x=x, y=y)
    relation = matched(len(rows), len(columns), rows.device, as_items(ids, rows, reduction))
    rule = DECOUPLED if switch("decoupled", decoupled) else ONE
    return run_by_similarity(
        partial(log_sum_loss, rule, both=True),
        rows,
        columns,
        relation,
        similarity=similarity,
        normalize=normalize,
        reduction=reduction,
        precision=precision,
        group=group,
        scale=above_zero("scale", scale),
        weight=weight,
    )


@over_processes
def sup_con_loss(
    x: ArrayLike,
    labels: ArrayLike | None,
    *,
    temperature: float | Tensor = 0.1,
    similarity: Similarity = "inner_product",
    normalize: bool = True,
    decoupled: bool = False,
    pairs: Pairs | None = None,
    weight: ArrayLike | None = None,
    reference: ReferenceLike | None = None,
    group: Group | None = None,
    precision: Precision | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Supervised contrast: each anchor against all other rows, with its whole class as positives.

    With :math:`z_{ij} = x_i \cdot x_j / \tau`, :math:`P(i)` the positives of i and :math:`A(i)`
    all rows but i,

    .. math:: \ell_i = -\frac{1}{|P(i)|} \sum_{p \in P(i)}
                \log \frac{e^{z_{ip}}}{\sum_{a \in A(i)} e^{z_{ia}}}

    Args:
        x: (n, d) embeddings, any floating dtype.
        labels: (n,) class ids, or (n, c) bool multi-labels; rows that share a label are similar.
            May be None with `pairs`.
        temperature: tau, above 0. A tensor with one number may be learned.
        similarity: "inner_product", which is the cosine of normalized rows; "cosine", whatever
            `normalize` says; or "sqeuclidean", minus the squared Euclidean distance.
        normalize: scale all rows to length 1 first, so that inner products are cosines.
        decoupled: leave the positives out of the denominator (Yeh et al. 2022).
        pairs: the only pairs that count, as a miner found them, or as (similar, dissimilar), each
            (k, 2) indices of an anchor and of another row of the batch or the reference; None: all.
            A pair counts as often as it is listed.
        weight: (n,) how much each anchor counts, 0 or more.
        reference: rows to compare with instead of the other rows of the batch.
        group: the processes that the batch is spread over: "world", a process group, a dimension of
            a DeviceMesh, or `nearfar.distributed.over(...)` of one; None: this one has all of it.
        precision: of matrix products, "float32", "tf32", "bfloat16" or "float16"; None: that of the
            context `nearfar.precision`, or its default.
        reduction: "mean" over the anchors that have a positive (decoupled: and a negative),
            "active" over those whose loss is not 0, (low, high) over those between; "sum", or
            "none", where the others are 0.

    Returns:
        A scalar, or (n,) with reduction="none"; float32 or wider.

    Raises:
        TypeError: labels that are not class ids or bool multi-labels.
        ValueError: a shape, length, device or hyperparameter out of range.

    >>> x = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1], [-0.6, 0.8]])
    >>> sup_con_loss(x, [0, 0, 1, 1], temperature=0.5)
    tensor(0.4302)
    >>> sup_con_loss(x, [0, 0, 1, 2], temperature=0.5, reduction="none")  # two have no positive
    tensor([0.2333, 0.6271, 0.0000, 0.0000])

    Source: Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, equation 2 (L_out).
    """
    rows, columns, relation = as_batch(x, labels, reference, reduction, pairs, group)
    rule = DECOUPLED if switch("decoupled", decoupled) else ALL
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
        scale=1 / above_zero("temperature", temperature),
        weight=weight,
    )


@over_processes
def nt_xent_loss(
    x: ArrayLike,
    labels: ArrayLike | None,
    *,
    temperature: float | Tensor = 0.5,
    similarity: Similarity = "inner_product",
    normalize: bool = True,
    decoupled: bool = False,
    pairs: Pairs | None = None,
    weight: ArrayLike | None = None,
    reference: ReferenceLike | None = None,
    group: Group | None = None,
    precision: Precision | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""One softmax per positive pair: the positive against the anchor's negatives.

    With :math:`z_{ij} = x_i \cdot x_j / \tau` and :math:`N(i)` the negatives of anchor i, the
    loss of a positive pair (i, p) is

    .. math:: \ell_{ip} = -\log \frac{e^{z_{ip}}}{e^{z_{ip}} + \sum_{n \in N(i)} e^{z_{in}}}

    In SimCLR every item has two views, so one positive. With more, the anchor's other positives are
    left out of the denominator.

    Args:
        x: (n, d) embeddings, any floating dtype.
        labels: (n,) class ids, or (n, c) bool multi-labels; rows that share a label are similar.
            For two views of n items, `torch.arange(n).repeat(2)`. May be None with `pairs`.
        temperature: tau, above 0. A tensor with one number may be learned.
        similarity: "inner_product", which is the cosine of normalized rows; "cosine", whatever
            `normalize` says; or "sqeuclidean", minus the squared Euclidean distance.
        normalize: scale all rows to length 1 first, so that inner products are cosines.
        decoupled: leave the positive out of its denominator (Yeh et al. 2022).
        pairs: the only pairs that count, as a miner found them, or as (similar, dissimilar), each
            (k, 2) indices of an anchor and of another row of the batch or the reference; None: all.
            A pair counts as often as it is listed.
        weight: (n,) how much each anchor counts, 0 or more.
        reference: rows to compare with instead of the other rows of the batch.
        group: the processes that the batch is spread over: "world", a process group, a dimension of
            a DeviceMesh, or `nearfar.distributed.over(...)` of one; None: this one has all of it.
        precision: of matrix products, "float32", "tf32", "bfloat16" or "float16"; None: that of the
            context `nearfar.precision`, or its default.
        reduction: "mean" over the positive pairs, "active" over those whose loss is not 0,
            (low, high) over those between; "sum", or "none" for (n,) sums, one per anchor. As in
            the paper, a positive pair whose anchor has no negatives has loss 0 and counts in the
            mean (decoupled: it is undefined and left out).

    Returns:
        A scalar, or (n,) with reduction="none"; float32 or wider.

    Raises:
        TypeError: labels that are not class ids or bool multi-labels.
        ValueError: a shape, length, device or hyperparameter out of range.

    >>> x = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1], [-0.6, 0.8]])
    >>> nt_xent_loss(x, [0, 0, 1, 1])
    tensor(0.4302)

    Source: Chen, Kornblith, Norouzi & Hinton, "A Simple Framework for Contrastive Learning of
    Visual Representations", ICML 2020, equation 1.
    """
    rule = LogSumRule(
        _each_decoupled if switch("decoupled", decoupled) else _each_positive,
        counts=lambda r: r.n_positives() * (r.n_negatives() > 0) if decoupled else r.n_positives(),
        per_positive=True,
        term="pick_decoupled" if decoupled else "pick",
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
        scale=1 / above_zero("temperature", temperature),
        weight=weight,
    )


@over_processes
def nca_loss(
    x: ArrayLike,
    labels: ArrayLike | None,
    *,
    scale: float | Tensor = 1.0,
    similarity: Similarity = "sqeuclidean",
    normalize: bool = True,
    pairs: Pairs | None = None,
    weight: ArrayLike | None = None,
    reference: ReferenceLike | None = None,
    group: Group | None = None,
    precision: Precision | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Neighbourhood components: the chance that an anchor picks one of its positives.

    An anchor picks one of all other rows by a softmax over minus the squared distances. With
    :math:`z_{ij} = -t\,|x_i - x_j|^2`, :math:`P(i)` the positives of i and :math:`A(i)` all rows
    but i,

    .. math:: \ell_i = -\log \frac{\sum_{p \in P(i)} e^{z_{ip}}}{\sum_{a \in A(i)} e^{z_{ia}}}

    One near positive is enough, where `sup_con_loss` asks for all of them.

    Args:
        x: (n, d) embeddings, any floating dtype.
        labels: (n,) class ids, or (n, c) bool multi-labels; rows that share a label are similar.
            May be None with `pairs`.
        scale: t, above 0; 1 in the paper. A tensor with one number may be learned.
        similarity: "sqeuclidean", minus the squared Euclidean distance; "inner_product", which is
            the cosine of normalized rows; or "cosine", whatever `normalize` says.
        normalize: scale all rows to length 1 first. The paper does not.
        pairs: the only pairs that count, as a miner found them, or as (similar, dissimilar), each
            (k, 2) indices of an anchor and of another row of the batch or the reference; None: all.
            A pair counts as often as it is listed.
        weight: (n,) how much each anchor counts, 0 or more.
        reference: rows to compare with instead of the other rows of the batch.
        group: the processes that the batch is spread over: "world", a process group, a dimension of
            a DeviceMesh, or `nearfar.distributed.over(...)` of one; None: this one has all of it.
        precision: of matrix products, "float32", "tf32", "bfloat16" or "float16"; None: that of the
            context `nearfar.precision`, or its default.
        reduction: "mean" over the anchors that have a positive, "active" over those whose loss is
            not 0, (low, high) over those between; "sum", or "none", where the others are 0.

    Returns:
        A scalar, or (n,) with reduction="none"; float32 or wider.

    Raises:
        TypeError: labels that are not class ids or bool multi-labels.
        ValueError: a shape, length, device or hyperparameter out of range.

    >>> x = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1], [-0.6, 0.8]])
    >>> nca_loss(x, [0, 0, 1, 1])
    tensor(0.4302)

    Source: Goldberger, Roweis, Hinton & Salakhutdinov, "Neighbourhood Components Analysis", NeurIPS
    2004, the logarithmic form of equation 5.
    """
    rule = LogSumRule(_pick_any, have_positives, near=IDENTITY)
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
        scale=above_zero("scale", scale),
        weight=weight,
    )


def _pick_any(negatives: LogSum, near: Tensor, _: None) -> Finished:
    """log(1 + sum_n e^(z_n) / sum_p e^(z_p)) of each anchor."""
    some = near != -inf  # the others do not count
    gap = negatives.minus(near.where(some, 0))
    wrong = gap.sigmoid().where(some, 0)
    return softplus(gap), wrong, -wrong


def _each_positive(negatives: LogSum, z: Tensor, _: None) -> Finished:
    """log(1 + sum_n e^(z_n - z_p)) of each positive."""
    gap = negatives.minus(z)
    wrong = gap.sigmoid()
    return softplus(gap), wrong, -wrong


def _each_decoupled(negatives: LogSum, z: Tensor, _: None) -> Finished:
    """log(sum_n e^(z_n)) - z_p of each positive, 0 for anchors without negatives."""
    some = negatives.value != -inf
    one = some.to(z.dtype)
    return negatives.minus(z).where(some, 0), one, -one
