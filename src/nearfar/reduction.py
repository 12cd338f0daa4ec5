"""Reduce one loss per row to the value that the caller asked for."""

from typing import Literal, get_args

import torch
from torch import Tensor

Reduction = Literal["mean", "sum", "none"]
_REDUCTIONS = get_args(Reduction)


def reduce(
    per_row: Tensor,
    reduction: Reduction,
    weight: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """The mean or sum of the losses, or the losses themselves; 0 for the mean or sum of no rows.

    Args:
        per_row: (n,) losses, 0 for rows that do not count.
        reduction: "mean", "sum" or "none".
        weight: (n,) weights of the rows; None for 1.
        counts: (n,) multiplies the weight of each row in the denominator of the mean; 0 for a row
            that does not count.

    Raises:
        ValueError: an unknown reduction; the message lists the choices.
    """
    check_reduction(reduction)
    if weight is not None:
        per_row = per_row * weight
    if reduction == "mean":
        if weight is None and counts is None and per_row.shape[0]:
            return per_row.mean()
        return per_row.sum() / total_weight(weight, counts, per_row)
    if reduction == "sum":
        return per_row.sum()
    return per_row


def check_reduction(reduction: str) -> None:
    """Refuse an unknown reduction."""
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}.")


def total_weight(
    weight: Tensor | None, counts: Tensor | float | None, per_row: Tensor
) -> Tensor | float:
    """The denominator of the mean: the total weight of the rows that count."""
    if weight is None:
        if counts is None:
            return max(per_row.shape[0], 1)
        if not isinstance(counts, Tensor):
            return counts or 1
        if not counts.is_floating_point():
            return counts.sum(dtype=per_row.dtype).clamp(min=1)
        total = counts.sum(dtype=per_row.dtype)
    else:
        total = (weight if counts is None else weight * counts).sum()
    return torch.where(total > 0, total, 1)


def sum_dtype(x: Tensor) -> torch.dtype:
    """The dtype that sums are kept in: float64, or float32 on devices that have no float64."""
    return torch.float32 if x.is_mps else torch.float64
