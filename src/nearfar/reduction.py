"""Reduce the losses of rows, pairs or tuples to the value that the caller asked for."""

from dataclasses import dataclass
from math import inf
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor

# (low, high): the mean over the terms between the two.
Reduction = Literal["mean", "active", "sum", "none"] | tuple[float, float]
# What is left once the terms that count are known.
Total = Literal["mean", "sum", "none"]


class _EachPair:
    """What `per_pair` passes as `reduction`: one loss per listed pair or triplet."""


EACH_PAIR: Any = _EachPair()


@dataclass(frozen=True)
class Between:
    """Which terms of a loss count in its mean: those above `low` and below `high`."""

    low: float
    high: float

    def outside(self, terms: Tensor) -> Tensor:
        """Bool, the terms that do not count. NaN counts, so that it is not hidden."""
        return (terms <= self.low) | (terms >= self.high)


ACTIVE = Between(0.0, inf)


def split(reduction: Reduction) -> tuple[Total, Between | None]:
    """Mean, sum or none, and which terms count in the mean; None: all.

    Raises:
        ValueError: an unknown reduction; the message lists the choices.
    """
    if reduction == "active":
        return "mean", ACTIVE
    if reduction is EACH_PAIR:
        return "none", None
    if isinstance(reduction, str) and reduction in get_args(Total):
        return reduction, None
    if isinstance(reduction, tuple) and len(reduction) == 2:
        low, high = reduction
        if isinstance(low, Real) and isinstance(high, Real) and low < high:
            return "mean", Between(float(low), float(high))
    raise ValueError(
        'reduction must be "mean", "active", "sum", "none", or two numbers (low, high), low < '
        f"high, for the mean over the terms between them; got {reduction!r}."
    )


def reduce(
    terms: Tensor,
    reduction: Reduction,
    weight: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """The mean or sum of losses, or the losses themselves; 0 for the mean or sum of none.

    Args:
        terms: (n,) losses, 0 for rows that do not count.
        reduction: see `Reduction`.
        weight: (n,) weights of the rows; None for 1.
        counts: (n,) multiplies the weight of each row in the denominator of the mean; 0 for a row
            that does not count.

    Raises:
        ValueError: an unknown reduction; the message lists the choices.
    """
    total, kept = split(reduction)
    if kept is not None:
        outside = kept.outside(terms.detach())
        terms = terms.masked_fill(outside, 0)
        counts = ~outside if counts is None else counts * ~outside
    if weight is not None:
        terms = terms * weight
    if total == "mean":
        if weight is None and counts is None and terms.shape[0]:
            return terms.mean()
        return terms.sum() / above_0(weight_sum(weight, counts, terms))
    if total == "sum":
        return terms.sum()
    return terms


def weight_sum(
    weight: Tensor | None, counts: Tensor | float | None, per_row: Tensor
) -> Tensor | float:
    """The total weight of the rows that count; a mean's denominator is `above_0` of it."""
    if weight is not None:
        return (weight if counts is None else weight * counts).sum()
    if counts is None:
        return per_row.shape[0]
    return counts.sum(dtype=per_row.dtype) if isinstance(counts, Tensor) else counts


def above_0(total: Tensor | float) -> Tensor | float:
    """A denominator: 1 in place of 0, where nothing counts."""
    return torch.where(total > 0, total, 1) if isinstance(total, Tensor) else total or 1


def sum_dtype(x: Tensor) -> torch.dtype:
    """The dtype that sums are kept in: float64, or float32 on devices that have no float64."""
    return torch.float32 if x.is_mps else torch.float64
