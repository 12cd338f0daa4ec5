"""Losses against learned proxies of classes, computed without a matrix of logits."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import cos, inf, pi, sin

import torch
from torch import Tensor

from nearfar.distance import unit
from nearfar.engine.budget import block, current_limits
from nearfar.engine.closeness import Closeness, LargestProduct, Product
from nearfar.engine.log_sum_rule import Finished, LogSum, LogSumRule, affine
from nearfar.engine.log_sums import log_sum_loss
from nearfar.engine.meeting import Group, over_processes
from nearfar.engine.precision import Precision
from nearfar.engine.relation import Relation
from nearfar.engine.slices import joined, spans
from nearfar.engine.step import Answer, Request, run
from nearfar.inputs import (
    ArrayLike,
    above_zero,
    batch,
    between,
    lift,
    positive_number,
    readable,
    switch,
    tensor,
)
from nearfar.labels import class_ids
from nearfar.losses.batch import row_weight, snapshot
from nearfar.losses.contrast import DECOUPLED, ONE, have_positives, pick_one
from nearfar.losses.terms import softplus
from nearfar.reduction import Between, Reduction, split, sum_dtype


@over_processes
def proxy_softmax_loss(
    x: ArrayLike,
    proxies: ArrayLike,
    labels: ArrayLike,
    *,
    scale: float | Tensor = 64.0,
    angle_margin: float = 0.0,
    cosine_margin: float = 0.0,
    normalize: bool = True,
    weight: ArrayLike | None = None,
    group: Group | None = None,
    precision: Precision | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Softmax over cosines to learned proxies of classes, with a margin on the right one if asked.

    With :math:`\theta_{ij}` the angle between row i and proxy j, :math:`t` the scale, and
    :math:`y_i` the class of row i,

    .. math:: \ell_i = \log\Bigl(1 + \sum_{j \ne y_i}
                e^{t \cos\theta_{ij} - t (\cos(\theta_{i y_i} + m_a) - m_c)}\Bigr)

    Without a margin this is the normalised softmax; the angle margin :math:`m_a` is ArcFace's (0.5
    there), the cosine margin :math:`m_c` CosFace's (0.35 there). Beyond :math:`\theta = \pi - m_a`,
    where the cosine would rise again, it continues linearly as in the reference implementation. The
    angle is computed from the cosine, which in float32 cannot tell angles below 3e-4 from 0.

    A class may have k proxies, its sub-centres. Its cosine is then the largest of theirs, so that
    rows that fit none of the others, such as mislabelled ones, gather around one of their own.

    Args:
        x: (n, d) embeddings, any floating dtype.
        proxies: (c, d), one per class, or (c, k, d), k sub-centres per class; learned.
        labels: (n,) class ids from 0 to c - 1.
        scale: t, above 0. A tensor with one number may be learned.
        angle_margin: radians, from 0 to pi / 2.
        cosine_margin: from 0 to 1.
        normalize: scale rows and proxies to length 1 first, so that the products are cosines;
            without it there is no margin.
        weight: (n,) how much each row counts, 0 or more; for one weight per class,
            `class_weight[labels]`.
        group: the processes that the batch is spread over: "world", a process group, a dimension of
            a DeviceMesh, or `nearfar.distributed.over(...)` of one; None: this one has all of it.
        precision: of matrix products, "float32", "tf32", "bfloat16" or "float16"; None: that of the
            context `nearfar.precision`, or its default.
        reduction: "mean" over the rows, "active" over those whose loss is not 0, (low, high) over
            those between; "sum", or "none" for one loss per row.

    Returns:
        A scalar, or (n,) with reduction="none"; float32 or wider.

    Raises:
        TypeError: labels that are not class ids.
        ValueError: a shape, length, device, class id or hyperparameter out of range.

    >>> proxies = torch.eye(3)
    >>> x = torch.tensor([[1.0, 0.2, 0], [0, 1, 1]])
    >>> proxy_softmax_loss(x, proxies, [0, 1], scale=10.0, reduction="none")
    tensor([4.4688e-04, 6.9357e-01])
    >>> proxy_softmax_loss(x, proxies, [0, 1], scale=10.0, angle_margin=0.5, reduction="none")
    tensor([3.7942e-03, 4.2706e+00])
    >>> centers = torch.tensor([[[1.0, 0, 0], [0, 0, 1]], [[0, 1, 0], [0, 1, 0]]])  # two each
    >>> proxy_softmax_loss(x, centers, [0, 1], scale=10.0, reduction="none")
    tensor([3.9177e-04, 6.9315e-01])

    Source: Deng et al., "ArcFace", CVPR 2019; Wang et al., "CosFace", CVPR 2018; Wang et al.,
    "NormFace", ACM MM 2017; Deng et al., "Sub-center ArcFace", ECCV 2020.
    """
    scale = above_zero("scale", scale)
    between("angle_margin", angle_margin, 0, pi / 2, ", radians")
    between("cosine_margin", cosine_margin, 0, 1)
    switch("normalize", normalize)
    rows, columns, closeness, relation = _each_to_its_class(x, proxies, labels, reduction)
    rule: LogSumRule = ONE
    learned: tuple[Tensor, ...] = ()
    if angle_margin or cosine_margin:
        if not normalize:
            raise ValueError(
                "angle_margin and cosine_margin are margins of a cosine, and normalize=False "
                "leaves none: leave out the margins, or normalize=False."
            )
        learned = (scale,) if isinstance(scale, Tensor) and scale.requires_grad else ()
        finish = _with_margins(scale, angle_margin, cosine_margin, rows.dtype, bool(learned))
        rule = LogSumRule(finish, have_positives, learned=bool(learned))
    return run(
        partial(log_sum_loss, rule, closeness),
        rows,
        columns,
        relation,
        closeness=closeness,
        normalize=normalize,
        reduction=reduction,
        precision=precision,
        group=group,
        scale=scale,
        weight=row_weight(weight, rows),
        learned=learned,
    )


@over_processes
def proxy_nca_loss(
    x: ArrayLike,
    proxies: ArrayLike,
    labels: ArrayLike,
    *,
    scale: float | Tensor = 1.0,
    weight: ArrayLike | None = None,
    group: Group | None = None,
    precision: Precision | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Neighbourhood components with proxies: each row nearer to its own than to all others.

    With rows and proxies at length 1 and :math:`d` their squared distance, :math:`t` the scale,

    .. math:: \ell_i = -\log \frac{e^{-t\,d(x_i, p_{y_i})}}{\sum_{j \ne y_i} e^{-t\,d(x_i, p_j)}}

    The denominator leaves out the row's own proxy, so the loss can be negative. With the own proxy
    in it, as in some implementations, it is `proxy_softmax_loss` at twice the scale.

    Args:
        x: (n, d) embeddings, any floating dtype.
        proxies: (c, d), one per class, or (c, k, d), k sub-centres per class, of which the nearest
            counts; learned. Rows and proxies are scaled to length 1.
        labels: (n,) class ids from 0 to c - 1.
        scale: t, above 0; 1 in the paper. A tensor with one number may be learned.
        weight: (n,) how much each row counts, 0 or more.
        group: the processes that the batch is spread over: "world", a process group, a dimension of
            a DeviceMesh, or `nearfar.distributed.over(...)` of one; None: this one has all of it.
        precision: of matrix products, "float32", "tf32", "bfloat16" or "float16"; None: that of the
            context `nearfar.precision`, or its default.
        reduction: "mean" over the rows, "active" over those whose loss is above 0, (low, high) over
            those between; "sum", or "none" for one loss per row.

    Returns:
        A scalar, or (n,) with reduction="none"; float32 or wider. 0 if there is only one class.

    Raises:
        TypeError: labels that are not class ids.
        ValueError: a shape, length, device, class id or hyperparameter out of range.

    >>> proxy_nca_loss(torch.eye(3), torch.eye(3), [0, 1, 2])
    tensor(-1.3069)

    Source: Movshovitz-Attias et al., "No Fuss Distance Metric Learning using Proxies", ICCV 2017,
    equation 6.
    """
    rows, columns, closeness, relation = _each_to_its_class(x, proxies, labels, reduction)
    return run(
        partial(log_sum_loss, DECOUPLED, closeness),
        rows,
        columns,
        relation,
        closeness=closeness,
        normalize=True,
        reduction=reduction,
        precision=precision,
        group=group,
        # At length 1, -d = 2 cos - 2, and the constant cancels.
        scale=2 * above_zero("scale", scale),
        weight=row_weight(weight, rows),
    )


@over_processes
def proxy_anchor_loss(
    x: ArrayLike,
    proxies: ArrayLike,
    labels: ArrayLike,
    *,
    margin: float = 0.1,
    scale: float = 32.0,
    weight: ArrayLike | None = None,
    group: Group | None = None,
    precision: Precision | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Proxies as anchors: each pulls the rows of its class and pushes all others.

    With :math:`s_{cj}` the cosine of proxy c and row j, :math:`t` the scale, :math:`X_c^+` the rows
    of class c, :math:`X_c^-` the others, and :math:`P^+` the proxies that have a row in the batch,

    .. math:: L = \frac{1}{|P^+|} \sum_{c \in P^+}
                    \log\Bigl(1 + \sum_{j \in X_c^+} e^{-t (s_{cj} - m)}\Bigr)
                + \frac{1}{|P|} \sum_{c \in P}
                    \log\Bigl(1 + \sum_{j \in X_c^-} e^{t (s_{cj} + m)}\Bigr)

    Args:
        x: (n, d) embeddings, any floating dtype.
        proxies: (c, d), one per class, learned; rows and proxies are scaled to length 1.
        labels: (n,) class ids from 0 to c - 1.
        margin: m, from 0 to 1.
        scale: t (the paper's alpha), above 0.
        weight: (c,) how much each proxy counts in both means, 0 or more.
        group: the processes that the batch is spread over: "world", a process group, a dimension of
            a DeviceMesh, or `nearfar.distributed.over(...)` of one; None: this one has all of it.
        precision: of matrix products, "float32", "tf32", "bfloat16" or "float16"; None: that of the
            context `nearfar.precision`, or its default.
        reduction: "mean", the formula; "active", with means over the proxies whose logarithm is not
            0, or (low, high), over those whose logarithm is between; "sum" of all logarithms, or
            "none" for (c,) sums, one per proxy, without the two means.

    Returns:
        A scalar, or (c,) with reduction="none"; float32 or wider.

    Raises:
        TypeError: labels that are not class ids.
        ValueError: a shape, length, device, class id or hyperparameter out of range.

    >>> proxy_anchor_loss(torch.eye(3), torch.eye(3), [0, 1, 2])
    tensor(3.9133)

    Source: Kim, Kim, Cho & Kwak, "Proxy Anchor Loss for Deep Metric Learning", CVPR 2020.
    """
    between("margin", margin, 0, 1)
    scale = positive_number("scale", scale)
    total, kept = split(reduction)
    rows, columns, k = _beside(x, proxies)
    if k is not None:
        raise ValueError(
            "proxies must have shape (c, d), one per class; got "
            f"{(len(columns) // k, k, columns.shape[1])}. proxy_softmax_loss and proxy_nca_loss "
            "take sub-centres."
        )
    own = class_ids(snapshot(labels, reduction), like=rows, n_classes=len(columns))
    classes = torch.arange(len(columns), device=rows.device)
    relation = Relation(len(columns), len(rows), rows.device, classes, own, shared="rows")

    def execute(relation: Relation, request: Request) -> Answer:
        if total != "mean":
            shares: _Shares = 1.0, 1.0
        elif kept is None:
            shares = _shares(relation.n_positives() > 0, None, request)
        else:  # which proxies count must be known before the first force
            inside = [request.a.new_zeros(0, 2, dtype=torch.bool)]
            look = _by_proxy(margin, scale, (1.0, 1.0), kept, inside)
            log_sum_loss(look, Product(), relation)(replace(request, gradient=False))
            near, far = torch.cat(inside).unbind(1)
            shares = _shares(near, far, request)
        return log_sum_loss(_by_proxy(margin, scale, shares, kept), Product(), relation)(request)

    return run(
        lambda relation: partial(execute, relation),
        columns,
        rows,
        relation,
        closeness=Product(),
        normalize=True,
        reduction="sum" if total == "mean" else reduction,
        precision=precision,
        group=group,
        weight=row_weight(weight, columns, "proxy"),
    )


def class_logits(
    x: ArrayLike, proxies: ArrayLike, scale: float | Tensor, *, normalize: bool
) -> Tensor:
    """(n, c) the scale times the similarity of each row to each class; see `ProxyLossModule`."""
    rows, columns, k = _as_compared(x, proxies, normalize)
    return above_zero("scale", scale) * _similarity(rows, columns, k)


@torch.no_grad()
def nearest_class(x: ArrayLike, proxies: ArrayLike, *, normalize: bool) -> Tensor:
    """(n,) int64, the class of the proxy nearest to each row; see `ProxyLossModule`."""
    rows, columns, k = _as_compared(x, proxies, normalize)
    for name, some in (("x", rows), ("proxies", columns)):
        bad = ~some.isfinite().all(1)
        if bad.any():
            at = int(bad.nonzero()[0]) // (k or 1 if some is columns else 1)
            raise ValueError(f"{name}[{at}] is not finite, so the nearest class is not defined.")
    height = block(current_limits(), rows.device, rows.element_size(), _COPIES, len(columns))
    found = [_similarity(rows[at], columns, k).argmax(1) for at in spans(len(rows), height)]
    return joined(found, columns).long()


_COPIES = 3  # of a block of similarities


def _as_compared(
    x: ArrayLike, proxies: ArrayLike, normalize: bool
) -> tuple[Tensor, Tensor, int | None]:
    """Rows, proxies and k, see `_beside`; both prepared as the losses do, in one dtype."""
    rows, columns, k = _beside(x, proxies)
    rows, columns = lift("x", rows), lift("proxies", columns)
    wide = torch.promote_types(rows.dtype, columns.dtype)
    rows, columns = rows.to(wide), columns.to(wide)
    return (unit(rows), unit(columns), k) if normalize else (rows, columns, k)


def _similarity(rows: Tensor, columns: Tensor, k: int | None) -> Tensor:
    """(r, c) the products of rows and proxies, the largest of each class."""
    with torch.autocast(rows.device.type, enabled=False):
        products = rows @ columns.T
    if k is None:
        return products
    return products.view(len(rows), len(columns) // k, k).max(2).values


# What a proxy counts in the mean of each kind of logarithm.
_Shares = tuple[Tensor | float, Tensor | float]


def _by_proxy(
    margin: float,
    scale: float,
    shares: _Shares,
    kept: Between | None = None,
    inside: list[Tensor] | None = None,
) -> LogSumRule:
    """A proxy's pull on the rows of its class, plus its push on the others.

    Args:
        margin: see `proxy_anchor_loss`.
        scale: likewise.
        shares: what a proxy counts in each of the two.
        kept: which logarithms count; None: all.
        inside: where to note which of the two logarithms count: (r, 2) for some proxies at a time.
    """

    def finish(negatives: LogSum, near: Tensor, _: None) -> Finished:
        (near_share, far_share), far = shares, negatives.value
        pull, push = softplus(near), softplus(far)
        by_near, by_far = near.sigmoid(), far.sigmoid()
        if kept is not None:
            out_near, out_far = kept.outside(pull), kept.outside(push)
            pull, by_near = (t.masked_fill(out_near, 0) for t in (pull, by_near))
            push, by_far = (t.masked_fill(out_far, 0) for t in (push, by_far))
            if inside is not None:  # a proxy without rows has no pull
                inside.append(torch.stack([~out_near & (near != -inf), ~out_far], 1))
        return near_share * pull + far_share * push, far_share * by_far, near_share * by_near

    return LogSumRule(
        finish,
        counts=lambda relation: None,
        near=affine(-scale, scale * margin),
        far=affine(scale, scale * margin),
        steepness=scale,
        offset=scale * margin,
    )


def _shares(near: Tensor, far: Tensor | None, request: Request) -> _Shares:
    """Those of the mean over the proxies `near` (c,) bool, and over `far`; None: over all."""
    weight, together = request.weight, request.together
    if weight is None and together is None and readable(near):
        all_far = len(near) if far is None else int(far.sum())
        return 1 / max(int(near.sum()), 1), 1 / max(all_far, 1)
    far = torch.ones_like(near) if far is None else far
    counted = (near, far) if weight is None else (near * weight, far * weight)
    sums = torch.stack([each.sum(dtype=sum_dtype(each)) for each in counted])
    sums = sums if together is None else together.total(sums)
    of_near, of_far = torch.where(sums > 0, sums, 1).unbind()
    return 1 / of_near, 1 / of_far


def _each_to_its_class(
    x: ArrayLike, proxies: ArrayLike, labels: ArrayLike, reduction: Reduction
) -> tuple[Tensor, Tensor, Closeness, Relation]:
    """Rows, proxies, how close they are, and that a row is similar to no class but its own."""
    rows, columns, k = _beside(x, proxies)
    n_classes = columns.shape[0] // (k or 1)
    own = class_ids(snapshot(labels, reduction), like=rows, n_classes=n_classes)
    relation = Relation(
        own.shape[0], n_classes, own.device, one_positive=True, match=own, shared="columns"
    )
    closeness = Product() if k is None or k == 1 else LargestProduct(k)
    return rows, columns, closeness, relation


def _beside(x: ArrayLike, proxies: ArrayLike) -> tuple[Tensor, Tensor, int | None]:
    """Rows, proxies (c, d) or (c * k, d), and k, how many sub-centres a class has; None: none."""
    given = tensor("proxies", proxies, beside=(x,))
    rows = batch("x", x, other=given)
    if given.ndim != 3 or given.layout is not torch.strided:
        return rows, batch("proxies", given, like=rows), None
    if given.shape[1] == 0 or given.shape[2] != rows.shape[1]:
        raise ValueError(
            f"proxies must have shape (c, {rows.shape[1]}) or (c, k, {rows.shape[1]}), k at least "
            f"1, like the embeddings they are compared with; got {tuple(given.shape)}."
        )
    return rows, batch("proxies", given.flatten(0, 1), like=rows), given.shape[1]


def _with_margins(
    scale: float | Tensor, angle: float, cosine: float, dtype: torch.dtype, learned: bool
) -> Callable[[LogSum, Tensor, Tensor | float], Finished]:
    """The softmax whose positive is scale * (cos(theta + angle) - cosine).

    Args:
        scale: a number, or a tensor that holds one.
        angle: in radians.
        cosine: the margin of the cosine.
        dtype: cosines have its precision, and at least that of float32.
        learned: whether the scale is.
    """
    smallest_sine = torch.finfo(torch.promote_types(dtype, torch.float32)).eps ** 0.5

    def finish(negatives: LogSum, total: Tensor, count: Tensor | float) -> Finished:
        c = total / scale
        sine = (1 - c.square()).clamp(min=0).sqrt()
        inside = c > cos(pi - angle)
        turned = torch.where(inside, c * cos(angle) - sine * sin(angle), c - angle * sin(angle))
        # At theta = 0 the slope is infinite, but multiplied by 0; a floor keeps it finite.
        steep = c / sine.clamp(min=smallest_sine)
        slope = torch.where(inside, cos(angle) + steep * sin(angle), 1)
        target = turned - cosine
        loss, by_negatives, by_positive, *_ = pick_one(negatives, scale * target, count)
        if not learned:
            return loss, by_negatives, by_positive * slope
        # A closeness z holds the scale t too: of t (g(z / t) - m), this is what z leaves out.
        by_scale = by_positive * (target - c * slope)
        return loss, by_negatives, by_positive * slope, by_scale

    return finish
