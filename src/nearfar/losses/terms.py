"""Formulas that several losses share."""

import torch
from torch import Tensor

from nearfar.engine.closeness import add_rows


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), accurate for large x; beyond 40 it equals x in float64."""
    return torch.nn.functional.softplus(x, threshold=40.0)


_MANY = 2**16  # with fewer values, finding the largest takes as long as the softplus


def softplus_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    """The softplus and its derivative, the sigmoid."""
    slope = x.sigmoid()
    # Up to 0 the softplus is -log(1 - sigmoid), which is accurate there and takes half as long.
    # Only on a CPU: reading the largest value would stall a GPU.
    if x.is_cpu and x.numel() >= _MANY and x.amax().item() <= 0:
        return slope.neg().log1p_().neg_(), slope
    return softplus(x), slope


def log_sum(terms: Tensor, anchor: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The log-sum-exp of each anchor's terms, and the share of each term in its sum.

    Args:
        terms: (k,), of all anchors.
        anchor: (k,) int64, the anchor of each.
        n: the number of anchors.

    Returns:
        (n,) sums, -inf without terms; (k,) shares, the derivatives of the sums.

    >>> log_sum(torch.tensor([0.0, 0.0, 5.0]), torch.tensor([0, 0, 2]), 3)
    (tensor([0.6931,   -inf, 5.0000]), tensor([0.5000, 0.5000, 1.0000]))
    """
    fixed = terms.detach()
    # The lowest finite number for anchors without terms: -inf - -inf would be NaN.
    lowest = torch.finfo(terms.dtype).min
    top = fixed.new_full((n,), lowest).scatter_reduce(0, anchor, fixed, "amax")
    # index_select takes half the time of top[anchor], which is noticeable in a small batch.
    powers = (terms - top.index_select(0, anchor)).exp()
    total = sum_of(powers, anchor, n)
    return top + total.log(), powers / total.index_select(0, anchor)


def sum_of(terms: Tensor, anchor: Tensor, n: int) -> Tensor:
    """(n,) the sum of each anchor's terms (k,)."""
    if terms.requires_grad:
        return terms.new_zeros(n).index_add(0, anchor, terms)
    total = terms.new_zeros(n)
    add_rows(total, anchor, terms)
    return total
