"""Losses against one learned proxy per class, computed without a matrix of logits."""

from collections.abc import Callable
from math import cos, pi, sin

import torch
from torch import Tensor

from nearfar.engine.closeness import Product
from nearfar.engine.log_sum_rule import Finished, LogSum, LogSumRule
from nearfar.engine.log_sums import log_sum_loss
from nearfar.engine.positives import EachPositive
from nearfar.engine.relation import Relation
from nearfar.engine.segments import log_sum
from nearfar.engine.step import run
from nearfar.inputs import ArrayLike, above_zero, batch, between, positive_number
from nearfar.labels import class_ids
from nearfar.losses.batch import row_weight, snapshot
from nearfar.losses.contrast import DECOUPLED, ONE, have_positives, pick_one
from nearfar.losses.terms import softplus
from nearfar.reduction import Reduction


def proxy_softmax_loss(
    x: ArrayLike,
    proxies: ArrayLike,
    labels: ArrayLike,
    *,
    scale: float | Tensor = 64.0,
    angle_margin: float = 0.0,
    cosine_margin: float = 0.0,
    weight: ArrayLike | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Softmax over cosines to one proxy per class, with an optional margin on the right one.

    With :math:`\theta_{ij}` the angle between row i and proxy j, :math:`t` the scale, and
    :math:`y_i` the class of row i,

    .. math:: \ell_i = \log\Bigl(1 + \sum_{j \ne y_i}
                e^{t \cos\theta_{ij} - t (\cos(\theta_{i y_i} + m_a) - m_c)}\Bigr)

    Without a margin this is the normalised softmax; the angle margin :math:`m_a` is ArcFace's (0.5
    there), the cosine margin :math:`m_c` CosFace's (0.35 there). Beyond :math:`\theta = \pi - m_a`,
    where the cosine would rise again, it continues linearly as in the reference implementation. The
    angle is computed from the cosine, which in float32 cannot tell angles below 3e-4 from 0.

    Args:
        x: (n, d) embeddings, any floating dtype.
        proxies: (c, d), one per class, learned; rows and proxies are scaled to length 1.
        labels: (n,) class ids from 0 to c - 1.
        scale: t, above 0.
        angle_margin: radians, from 0 to pi / 2.
        cosine_margin: from 0 to 1.
        weight: (n,) how much each row counts, 0 or more; for one weight per class,
            `class_weight[labels]`.
        reduction: "mean" over the rows, "sum", or "none" for one loss per row.

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

    Source: Deng et al., "ArcFace", CVPR 2019; Wang et al., "CosFace", CVPR 2018; Wang et al.,
    "NormFace", ACM MM 2017.
    """
    scale = above_zero("scale", scale)
    between("angle_margin", angle_margin, 0, pi / 2, ", radians")
    between("cosine_margin", cosine_margin, 0, 1)
    rows, columns, own = _to_proxies(x, proxies, labels, reduction)
    rule = ONE
    if angle_margin or cosine_margin:
        if isinstance(scale, Tensor) and scale.requires_grad:
            raise ValueError("scale cannot be learned together with a margin; pass a number.")
        finish = _with_margins(scale, angle_margin, cosine_margin, rows.dtype)
        rule = LogSumRule(finish, have_positives)
    return run(
        log_sum_loss(rule, Product(), _each_to(own, columns)),
        rows,
        columns,
        normalize=True,
        reduction=reduction,
        scale=scale,
        weight=row_weight(weight, rows),
    )


def proxy_nca_loss(
    x: ArrayLike,
    proxies: ArrayLike,
    labels: ArrayLike,
    *,
    scale: float | Tensor = 1.0,
    weight: ArrayLike | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Neighbourhood components with proxies: each row nearer to its own than to all others.

    With rows and proxies at length 1 and :math:`d` their squared distance, :math:`t` the scale,

    .. math:: \ell_i = -\log \frac{e^{-t\,d(x_i, p_{y_i})}}{\sum_{j \ne y_i} e^{-t\,d(x_i, p_j)}}

    The denominator leaves out the row's own proxy, so the loss can be negative.

    Args:
        x: (n, d) embeddings, any floating dtype.
        proxies: (c, d), one per class, learned; rows and proxies are scaled to length 1.
        labels: (n,) class ids from 0 to c - 1.
        scale: t, above 0; 1 in the paper.
        weight: (n,) how much each row counts, 0 or more.
        reduction: "mean" over the rows, "sum", or "none" for one loss per row.

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
    rows, columns, own = _to_proxies(x, proxies, labels, reduction)
    return run(
        log_sum_loss(DECOUPLED, Product(), _each_to(own, columns)),
        rows,
        columns,
        normalize=True,
        reduction=reduction,
        # At length 1, -d = 2 cos - 2, and the constant cancels.
        scale=2 * above_zero("scale", scale),
        weight=row_weight(weight, rows),
    )


def proxy_anchor_loss(
    x: ArrayLike,
    proxies: ArrayLike,
    labels: ArrayLike,
    *,
    margin: float = 0.1,
    scale: float = 32.0,
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
        reduction: "mean", the formula; "sum" of all its logarithms, or "none" for (c,) sums, one
            per proxy, without the two means.

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
    rows, columns, own = _to_proxies(x, proxies, labels, reduction)
    classes = torch.arange(len(columns), device=rows.device)
    relation = Relation(len(columns), len(rows), rows.device, classes, own)
    near_weight = far_weight = 1.0
    if reduction == "mean":
        near_weight = 1 / max(int((relation.n_positives() > 0).sum()), 1)
        far_weight = 1 / max(len(columns), 1)

    def finish(negatives: LogSum, s: Tensor, anchor: Tensor) -> Finished:
        far = negatives.value
        near, share = log_sum(-scale * (s - margin), anchor, len(far))
        loss = near_weight * softplus(near) + far_weight * softplus(far)
        pull = -scale * near_weight * near.sigmoid()
        return loss, far_weight * far.sigmoid(), pull.index_select(0, anchor) * share

    rule = LogSumRule(
        finish,
        counts=lambda relation: None,
        positives=EachPositive,
        exponent=lambda s: (s + margin).mul_(scale),
        slope=scale,
        steepness=scale,
        offset=scale * margin,
    )
    over_rows: Reduction = "sum" if reduction == "mean" else reduction
    return run(
        log_sum_loss(rule, Product(), relation),
        columns,
        rows,
        normalize=True,
        reduction=over_rows,
    )


def _to_proxies(
    x: ArrayLike, proxies: ArrayLike, labels: ArrayLike, reduction: Reduction
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, proxies, and (n,) the proxy of each row."""
    rows = batch("x", x, other=proxies)
    columns = batch("proxies", proxies, like=rows)
    return (
        rows,
        columns,
        class_ids(snapshot(labels, reduction), like=rows, n_classes=columns.shape[0]),
    )


def _each_to(own: Tensor, proxies: Tensor) -> Relation:
    """Each row is similar to its own proxy and to no other."""
    return Relation(own.shape[0], proxies.shape[0], own.device, one_positive=True, match=own)


def _with_margins(
    scale: float | Tensor, angle: float, cosine: float, dtype: torch.dtype
) -> Callable[[LogSum, Tensor, Tensor | float], Finished]:
    """The softmax whose positive is scale * (cos(theta + angle) - cosine).

    Cosines have the precision of `dtype`, and at least that of float32.
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
        loss, by_negatives, by_total = pick_one(negatives, scale * (turned - cosine), count)
        return loss, by_negatives, by_total * slope

    return finish
