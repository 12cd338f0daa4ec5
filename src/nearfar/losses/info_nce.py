"""InfoNCE: pick the positive out of the negatives, listed ones or the rest of the batch."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from nearfar.distance import sqeuclidean, unit
from nearfar.engine.closeness import Closeness, Euclidean
from nearfar.engine.log_sums import log_sum_loss
from nearfar.engine.meeting import Group, over_processes
from nearfar.engine.observe import force_visitors, measured
from nearfar.engine.precision import Precision, chosen, rounded
from nearfar.engine.relation import Items, Relation, matched
from nearfar.engine.step import Answer, Executor, Request
from nearfar.inputs import (
    ArrayLike,
    above_zero,
    batch,
    embeddings,
    lift,
    matrix,
    same_device,
    switch,
    tensor,
    tracing,
)
from nearfar.labels import class_ids
from nearfar.listed import Pairs
from nearfar.losses.batch import as_batch, as_items, as_towers, row_weight
from nearfar.losses.contrast import DECOUPLED, ONE
from nearfar.losses.similarity import Similarity, by_similarity, run_by_similarity
from nearfar.losses.softmax import pick
from nearfar.reduction import Reduction, reduce


@over_processes
def info_nce_loss(
    query: ArrayLike,
    positive: ArrayLike,
    negatives: ArrayLike | None = None,
    *,
    temperature: float | Tensor = 0.07,
    similarity: Similarity = "inner_product",
    normalize: bool = True,
    symmetric: bool = False,
    decoupled: bool = False,
    hard_negatives: ArrayLike | None = None,
    ids: ArrayLike | None = None,
    hard_ids: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    group: Group | None = None,
    precision: Precision | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Pick the positive out of the negatives: softmax cross-entropy over similarities.

    With :math:`s^+_i = q_i \cdot p_i / \tau` and :math:`s^-_{ij} = q_i \cdot n_{ij} / \tau`,

    .. math:: \ell_i = -\log \frac{e^{s^+_i}}{e^{s^+_i} + \sum_j e^{s^-_{ij}}}
                     = \log\Bigl(1 + \sum_j e^{s^-_{ij} - s^+_i}\Bigr)

    computed in the second form, which stays accurate when the loss is near 0 and cannot saturate
    when it is large.

    Args:
        query: (n, d) embeddings, any floating dtype.
        positive: (n, d) embeddings; row i is the match of row i of `query`.
        negatives: (m, d), shared by all queries; (n, m, d), m for each query; or None: the other
            rows of `positive` are the negatives of row i, in memory linear in n.
        temperature: tau, above 0; a smaller one weighs the nearest negatives more. A tensor with
            one number may be learned.
        similarity: "inner_product", which is the cosine of normalized rows; "cosine", whatever
            `normalize` says; or "sqeuclidean", minus the squared Euclidean distance.
        normalize: scale all rows to length 1 first, so that inner products are cosines.
        symmetric: without `negatives`, the mean of both directions: each positive also picks its
            query out of all queries.
        decoupled: leave the positive out of the denominator (Yeh et al. 2022).
        hard_negatives: (m, d) or (n, m, d), further negatives for every query besides the other
            rows of `positive`; cannot be combined with `negatives`.
        ids: (n,) integers, the item of each query and its positive: the positives of one item are
            no negatives of its queries, and are left out. (n, k): several ids, of which two rows
            need one in common. -1 for none; None: every row is another item.
        hard_ids: (m,) or (n, m), the items of `hard_negatives`, which are left out for the queries
            of the same item; None: they are other items.
        weight: (n,) how much each query counts, 0 or more.
        group: the processes that the batch is spread over: "world", a process group, a dimension of
            a DeviceMesh, or `nearfar.distributed.over(...)` of one; None: this one has all of it.
        precision: of matrix products, "float32", "tf32", "bfloat16" or "float16"; None: that of the
            context `nearfar.precision`, or its default.
        reduction: "mean" over the queries, "active" over those whose loss is not 0, (low, high)
            over those between; "sum", or "none" for one loss per query. With `symmetric` and
            `hard_negatives`, the mean of the two directions.

    Returns:
        A scalar, or (n,) losses with reduction="none"; float32 or wider. The loss of a query
        without negatives is 0 and counts in the mean (decoupled: it is undefined and left out).

    Raises:
        TypeError: an argument is not an array of numbers.
        ValueError: a shape, device or hyperparameter out of range, or options that exclude each
            other.

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

    >>> info_nce_loss(torch.eye(3), torch.eye(3), temperature=0.5, ids=[7, 7, 8])
    tensor(0.1645)

    Source: van den Oord, Li & Vinyals, "Representation Learning with Contrastive Predictive
    Coding", 2018; with hard negatives, Karpukhin et al., "Dense Passage Retrieval", EMNLP 2020.
    """
    switch("symmetric", symmetric)
    switch("decoupled", decoupled)
    temperature = above_zero("temperature", temperature)
    if negatives is not None:
        of_batch = (hard_negatives, ids, hard_ids)
        _refuse_beside_listed(symmetric or any(x is not None for x in of_batch), group)
        return _against_listed(
            *(query, positive, negatives, temperature, similarity),
            *(normalize, decoupled, weight, reduction, precision),
        )
    rows, columns = as_towers(query=query, positive=positive)
    one_way = partial(
        _in_batch,
        temperature=temperature,
        similarity=similarity,
        normalize=normalize,
        decoupled=decoupled,
        weight=weight,
        reduction=reduction,
        group=group,
    )
    if hard_negatives is None:
        items = as_items(ids, rows, reduction, hard_ids=hard_ids)
        return one_way(rows, columns, items, precision=precision, both=symmetric)
    given = tensor("hard_negatives", hard_negatives, beside=(rows,))
    hard = _negatives("hard_negatives", given, rows)
    items = as_items(ids, rows, reduction, hard=hard, hard_ids=hard_ids)
    hard = hard.flatten(0, 1) if hard.ndim == 3 else hard
    # Lifted here, so that neither direction rounds or saturates them in between.
    precision = chosen(precision, by_similarity(similarity).rounding, rows, columns, given)
    rows, columns = lift("query", rows), lift("positive", columns)
    there = one_way(rows, torch.cat([columns, hard]), items, precision=precision)
    if not symmetric:
        return there
    items = as_items(ids, rows, reduction)
    return (there + one_way(columns, rows, items, precision=precision)) / 2


@over_processes
def n_pair_loss(
    x: ArrayLike,
    labels: ArrayLike,
    *,
    temperature: float | Tensor = 1.0,
    similarity: Similarity = "inner_product",
    normalize: bool = True,
    weight: ArrayLike | None = None,
    group: Group | None = None,
    precision: Precision | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""One anchor and one positive of each class: pick the positive out of those of all classes.

    With :math:`a_c` and :math:`p_c` the first two rows of class c, and
    :math:`s_{cj} = a_c \cdot p_j / \tau`,

    .. math:: \ell_c = \log\Bigl(1 + \sum_{j \ne c} e^{s_{cj} - s_{cc}}\Bigr)

    which is `info_nce_loss` of these rows. Other rows, and classes of a single row, do not count.
    The paper takes inner products, and keeps the lengths of rows small by a term of their squares.

    Args:
        x: (n, d) embeddings, any floating dtype.
        labels: (n,) class ids. Multi-labels do not divide rows into classes.
        temperature: tau, above 0; 1 in the paper. A tensor with one number may be learned.
        similarity: "inner_product", which is the cosine of normalized rows; "cosine", whatever
            `normalize` says; or "sqeuclidean", minus the squared Euclidean distance.
        normalize: scale all rows to length 1 first, so that inner products are cosines. The paper
            does not.
        weight: (n,) how much each anchor counts, 0 or more.
        group: the processes that the batch is spread over: "world", a process group, a dimension of
            a DeviceMesh, or `nearfar.distributed.over(...)` of one; None: this one has all of it.
        precision: of matrix products, "float32", "tf32", "bfloat16" or "float16"; None: that of the
            context `nearfar.precision`, or its default.
        reduction: "mean" over the classes with two rows, "active" over those whose loss is not 0,
            (low, high) over those between; "sum", or "none" for (n,) losses, 0 for rows that are
            not anchors.

    Returns:
        A scalar, or (n,) with reduction="none"; float32 or wider.

    Raises:
        TypeError: labels that are not class ids.
        ValueError: a shape, length, device or hyperparameter out of range.

    >>> x = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1], [-0.6, 0.8]])
    >>> n_pair_loss(x, [0, 0, 1, 1])
    tensor(0.4093)

    Source: Sohn, "Improved Deep Metric Learning with Multi-class N-pair Loss Objective", NeurIPS
    2016, equation 5 (N-pair-mc).
    """
    rows = batch("x", x)
    ids = class_ids(labels, like=rows)
    if force_visitors():  # who are to see which rows these are
        pairs = _against_all(*_first_two(ids))
        rows, columns, relation = as_batch(rows, None, None, reduction, pairs)
        executor: Callable[[Closeness, Relation], Executor] = partial(log_sum_loss, ONE)
    else:
        rows, columns, relation = as_batch(rows, ids, None, reduction)
        executor = _of_first_two
    return run_by_similarity(
        executor,
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


def _of_first_two(closeness: Closeness, relation: Relation) -> Executor:
    """The first row of each class picks the second out of those of all classes."""
    assert relation.column_labels is not None
    anchor, positive = _first_two(relation.column_labels)
    anchor = anchor - (relation.first or 0)
    (here,) = ((anchor >= 0) & (anchor < relation.n)).nonzero(as_tuple=True)
    row, n, m = anchor[here], len(here), len(positive)
    of_classes = Relation(n, m, relation.device, one_positive=True, match=here)
    pick = log_sum_loss(ONE, closeness, of_classes)

    def execute(request: Request) -> Answer:
        a, b = request.a, request.columns
        weight = None if request.weight is None else request.weight[row]
        answer = pick(
            replace(request, a=a[row], b=b[positive], weight=weight, finish=None, together=None)
        )
        per_row = a.new_zeros(len(a)).index_copy_(0, row, answer.per_row.to(a.dtype))
        counts = per_row.new_zeros(len(a), dtype=torch.bool)
        counts[row] = True if answer.counts is None else answer.counts > 0
        if answer.da is None or answer.db is None:
            return Answer(per_row, counts)
        da = torch.zeros_like(a).index_add_(0, row, answer.da)
        db = torch.zeros_like(b) if request.b is not None else da
        db.index_add_(0, positive, answer.db)
        return Answer(per_row, counts, da, None if request.b is None else db)

    return execute


def _first_two(labels: Tensor) -> tuple[Tensor, Tensor]:
    """(c,) the first and (c,) the second row of each class that has two."""
    ordered, order = labels.sort(stable=True)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = ordered.diff() != 0
    first = (new[:-1] & ~new[1:]).nonzero()[:, 0]
    return order[first], order[first + 1]


def _against_all(anchor: Tensor, positive: Tensor) -> Pairs:
    """Each anchor with its positive, and with the positives of all other anchors."""
    other = ~torch.eye(len(anchor), dtype=torch.bool, device=anchor.device)
    i, j = other.nonzero().unbind(1)
    similar, dissimilar = (anchor, positive), (anchor[i], positive[j])
    return torch.stack(similar, 1), torch.stack(dissimilar, 1)


def _in_batch(
    rows: Tensor,
    columns: Tensor,
    items: Items | None,
    *,
    temperature: float | Tensor,
    similarity: Similarity,
    normalize: bool,
    decoupled: bool,
    weight: ArrayLike | None,
    reduction: Reduction,
    precision: Precision | None,
    group: Group | None,
    both: bool = False,
) -> Tensor:
    """Row i picks column i out of all columns; with `both`, column i also picks row i."""
    relation = matched(len(rows), len(columns), rows.device, items)
    rule = DECOUPLED if decoupled else ONE
    return run_by_similarity(
        partial(log_sum_loss, rule, both=both),
        rows,
        columns,
        relation,
        similarity=similarity,
        normalize=normalize,
        reduction=reduction,
        precision=precision,
        group=group,
        scale=1 / temperature,
        weight=weight,
    )


def _refuse_beside_listed(of_batch: bool, group: Group | None) -> None:
    """Refuse what only a batch has, whose other rows are the negatives."""
    if of_batch:
        raise ValueError(
            "symmetric, hard_negatives, ids and hard_ids work only if the other rows are the "
            "negatives: leave negatives out, or pass them as hard_negatives."
        )
    if group is not None:
        raise ValueError(
            "group joins the rows of all processes as negatives, and negatives lists others: leave "
            "out one of the two, or pass hard_negatives, which are joined too."
        )


def _against_listed(
    query: ArrayLike,
    positive: ArrayLike,
    negatives: ArrayLike,
    temperature: float | Tensor,
    similarity: Similarity,
    normalize: bool,
    decoupled: bool,
    weight: ArrayLike | None,
    reduction: Reduction,
    precision: Precision | None,
) -> Tensor:
    """Each query picks its positive out of the positive and the negatives listed for it."""
    given = query, positive
    query, positive = embeddings(query=query, positive=positive)
    counted = row_weight(weight, query)
    others = _negatives("negatives", negatives, query)
    before = (tensor("embeddings", t, beside=given) for t in given)  # they were lifted
    precision = chosen(precision, by_similarity(similarity).rounding, *before, traced=True)
    if switch("normalize", normalize) or similarity == "cosine":
        query, positive, others = unit(query), unit(positive), unit(others)
    others = others.to(query.dtype)
    if precision != "float32":
        centred = similarity == "sqeuclidean"
        query, positive, others = _rounded(
            query, positive, others, precision=precision, centred=centred
        )
    if similarity == "sqeuclidean":
        near, far = _negated_squares(query, positive, others)
    else:
        near, far = _similarities(query, positive, others)
    near = measured("positive", "similarity", near) / temperature
    far = measured("negative", "similarity", far) / temperature
    if not decoupled:
        return reduce(pick(near, far), reduction, counted)
    if not far.shape[1]:  # nothing to compare: 0, or NaN for rows that are NaN
        nothing = near * 0 + far.sum(1)
        return reduce(nothing, reduction, counted, torch.zeros_like(near, dtype=torch.bool))
    return reduce((far - near[:, None]).logsumexp(1), reduction, counted)


def _rounded(*rows: Tensor, precision: Precision, centred: bool) -> Iterator[Tensor]:
    """The rows rounded, with the gradient of what they were; minus their centre if asked."""
    if centred:  # no distance changes, and shorter rows are rounded less
        centre = torch.cat([each.flatten(0, -2) for each in rows]).detach().mean(0)
        rows = tuple(each - centre for each in rows)
    for each in rows:
        yield each + (rounded(each.detach(), precision) - each.detach())


def _similarities(query: Tensor, positive: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) similarities to the positive and (n, m) to the negatives."""
    # Autocast would run the matrix product in half precision.
    with torch.autocast(query.device.type, enabled=False):
        shared = others.ndim == 2
        far = query @ others.T if shared else (others @ query[..., None])[..., 0]
    return (query * positive).sum(-1), far


def _negated_squares(query: Tensor, positive: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Minus the squared distances: (n,) to the positive and (n, m) to the negatives."""
    near = -sqeuclidean(query, positive)
    if others.ndim == 3:
        return near, -sqeuclidean(query[:, None], others)
    # A common shift changes no distance, and short rows keep more digits.
    centre = torch.cat([query, others]).detach().mean(0)
    query, others = query - centre, others - centre
    sizes = query.square().sum(1)[:, None] + others.square().sum(1)
    with torch.autocast(query.device.type, enabled=False):
        far = (2 * query @ others.T - sizes).clamp(max=0)
    if tracing():  # which pairs are close is not known
        return near, far
    i, j = (far.detach() > -Euclidean.CANCELS * sizes.detach()).nonzero(as_tuple=True)
    return near, far.index_put((i, j), -sqeuclidean(query[i], others[j]))


def _negatives(name: str, negatives: ArrayLike, query: Tensor) -> Tensor:
    """(m, d) or (n, m, d), lifted and checked against the queries."""
    n, d = query.shape
    given = tensor(name, negatives, beside=(query,))
    if given.ndim == 2:
        return matrix(name, given, width=d, like=query)
    if given.ndim != 3 or given.shape[0] != n or given.shape[2] != d:
        raise ValueError(
            f"{name} must have shape (m, {d}), shared by all queries, or ({n}, m, {d}), "
            f"m for each query; got {tuple(given.shape)}."
        )
    same_device(name, given, "query", query)
    return lift(name, given)
