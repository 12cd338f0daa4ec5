"""Sums over the terms of each anchor, where all terms are in one list."""

import torch
from torch import Tensor

from nearfar.engine.slices import add_rows


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
    top, total, powers = top_and_sum(terms, anchor, n)
    return top + total.log(), powers / total.index_select(0, anchor)


def top_and_sum(terms: Tensor, anchor: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """(n,) the largest term of each anchor, (n,) the sum of the powers e^(term - top), (k,) these.

    The top of an anchor without terms is the lowest number.
    """
    fixed = terms.detach()
    # The lowest finite number for anchors without terms: -inf - -inf would be NaN.
    lowest = torch.finfo(terms.dtype).min
    top = fixed.new_full((n,), lowest).scatter_reduce(0, anchor, fixed, "amax")
    # index_select takes half the time of top[anchor], which is noticeable in a small batch.
    powers = (terms - top.index_select(0, anchor)).exp()
    return top, sum_of(powers, anchor, n), powers


def sum_of(terms: Tensor, anchor: Tensor, n: int) -> Tensor:
    """(n,) the sum of each anchor's terms (k,)."""
    if terms.requires_grad:
        return terms.new_zeros(n).index_add(0, anchor, terms)
    total = terms.new_zeros(n)
    add_rows(total, anchor, terms)
    return total
