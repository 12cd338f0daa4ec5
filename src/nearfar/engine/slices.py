"""Slicing tensors and joining parts of them."""

from collections.abc import Iterator

import torch
from torch import Tensor


def joined(parts: list[Tensor], like: Tensor) -> Tensor:
    """The parts concatenated; without parts, an empty tensor of the dtype of `like`."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else like.new_zeros(0)


def part(x: Tensor, at: slice) -> Tensor:
    """x[at], or `x` itself if that is all of it: a view takes noticeable time in a small batch."""
    return x if at.start == 0 and at.stop == x.shape[0] else x[at]


def spans(size: int, step: int) -> Iterator[slice]:
    """Consecutive slices of length `step` that cover range(size)."""
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def add_rows(to: Tensor, index: Tensor, rows: Tensor, by: float = 1) -> None:
    """Add by * rows[k] to to[index[k]], the same bits every time."""
    if to.is_cpu:
        to.index_add_(0, index, rows, alpha=by)
    else:  # there index_add_ adds in any order; this one sorts first
        to.index_put_((index,), rows * by, accumulate=True)
