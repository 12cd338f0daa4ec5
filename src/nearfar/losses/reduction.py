"""From one loss a row to what the caller asked for."""

from typing import Literal

from torch import Tensor

Reduction = Literal["mean", "sum", "none"]


def reduce(per_row: Tensor, reduction: Reduction) -> Tensor:
    """The mean, the sum or the rows themselves; the mean and sum of no rows are 0.

    Raises:
        ValueError: an unknown reduction; the message lists the choices.
    """
    if reduction == "mean":
        return per_row.sum() / max(len(per_row), 1)
    if reduction == "sum":
        return per_row.sum()
    if reduction == "none":
        return per_row
    raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}.")
