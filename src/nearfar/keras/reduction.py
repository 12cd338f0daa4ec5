"""Reduce the losses of anchors to the value that the caller asked for."""

from typing import Any, Literal, get_args

from keras import ops

from nearfar.keras.checks import one_of

Reduction = Literal["mean", "sum", "none"]


def reduce(losses: Any, counts: Any, weight: Any, reduction: Reduction) -> Any:
    """The mean or sum of losses, or the losses themselves; 0 for the mean or sum of none.

    Args:
        losses: (n,) each anchor's sum of terms.
        counts: (n,) how many terms it has.
        weight: (n,) how much each anchor counts; None: 1.
        reduction: see `Reduction`.
    """
    one_of("reduction", reduction, get_args(Reduction))
    if weight is not None:
        losses, counts = losses * weight, counts * weight
    if reduction == "none":
        return losses
    total = ops.sum(losses)
    if reduction == "sum":
        return total
    divisor = ops.sum(counts)
    return total / ops.where(divisor > 0, divisor, 1.0)
