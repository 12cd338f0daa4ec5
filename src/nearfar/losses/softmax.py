"""Softmax cross-entropy over classes."""

from math import inf, nan

from torch import Tensor
from torch.nn.functional import cross_entropy

from nearfar.engine.observe import measured, watched
from nearfar.inputs import ArrayLike, between, lift, readable, tensor
from nearfar.labels import class_ids
from nearfar.losses.batch import row_weight
from nearfar.reduction import Reduction, Total, reduce, split


def pick(chosen: Tensor, others: Tensor) -> Tensor:
    """(n,) log(1 + sum_j e^(others_j - chosen)) of (n,) and (n, m); others at -inf are left out.

    Computed from the differences, so that it stays accurate when all logits are large.
    """
    if not others.shape[1]:
        return chosen * 0
    gap = others - chosen[:, None]
    top = gap.detach().amax(1).clamp(min=0)
    return top + ((gap - top[:, None]).exp().sum(1) + (-top).expm1()).log1p()


def softmax_loss(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    label_smoothing: float = 0.0,
    weight: ArrayLike | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Softmax cross-entropy: pick the target class out of all classes.

    .. math:: \ell_i = -\log \frac{e^{z_{i t_i}}}{\sum_j e^{z_{ij}}}
                     = \log\Bigl(1 + \sum_{j \ne t_i} e^{z_{ij} - z_{i t_i}}\Bigr)

    computed in the second form, which stays accurate when the loss is near 0. With label
    smoothing :math:`\varepsilon` the target has weight :math:`1 - \varepsilon` and every class,
    itself included, :math:`\varepsilon / c` (Szegedy et al. 2016), which adds
    :math:`\varepsilon (z_{i t_i} - \tfrac{1}{c} \sum_j z_{ij})`.

    Args:
        logits: (n, c) scores, any floating dtype, not normalised.
        target: (n,) class ids from 0 to c - 1, any integer dtype.
        label_smoothing: epsilon, from 0 to 1.
        weight: (n,) how much each row counts, 0 or more; for one weight per class, pass
            `class_weight[target]`.
        reduction: "mean" over the losses of all rows, "active" over those that are not 0, (low,
            high) over those between; "sum", or "none" for one loss per row.

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
            f"logits must have shape (n, c), one score for each of c classes, "
            f"got {tuple(logits.shape)}."
        )
    ids = class_ids(target, like=logits, name="target")
    between("label_smoothing", label_smoothing, 0, 1)
    weights, (total, kept) = row_weight(weight, logits), split(reduction)
    if kept is None and readable(logits) and not watched():
        # Torch's fused formula is several times faster, and accurate unless the loss is near 0.
        try:
            if weights is not None:
                total = "none"
            fused = cross_entropy(
                logits,
                ids,
                reduction=total,
                label_smoothing=label_smoothing,
                ignore_index=_NO_CLASS,
            )
            if _smallest(fused, total, ids.shape[0]) > _NEAR_0:
                return fused if weights is None else reduce(fused, reduction, weights)
        except IndexError:
            pass  # a target out of range: the next line raises a better error
    ids = class_ids(target, like=logits, n_classes=logits.shape[1], name="target")
    return reduce(_pick_target(logits, ids, label_smoothing), reduction, weights)


_NO_CLASS = -(2**62)  # torch ignores one id, by default -100: this is no class
# A larger loss loses less than four bits when computed as the difference of two logits.
_NEAR_0 = 0.1


def _smallest(loss: Tensor, reduction: Total, n: int) -> float:
    """The smallest loss of a row, or the mean loss if it was reduced; NaN without rows."""
    if not n:
        return nan
    if reduction == "none":
        return loss.detach().amin().item()
    return loss.item() / (n if reduction == "sum" else 1)


def _pick_target(logits: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    """(n,) losses, accurate near 0."""
    of_target = measured("positive", "logit", logits.gather(1, target[:, None])[:, 0])
    of_others = measured("negative", "logit", logits.scatter(1, target[:, None], -inf))
    per_row = pick(of_target, of_others)
    if label_smoothing:
        gap = (of_target[:, None] - of_others).scatter(1, target[:, None], 0)
        per_row = per_row + label_smoothing * gap.mean(1)
    return per_row
