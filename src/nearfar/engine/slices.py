"""Parts of a tensor, one after the other."""

from collections.abc import Iterator

import torch
from torch import Tensor


def joined(parts: list[Tensor], like: Tensor) -> Tensor:
    """One after the other; of none, nothing of the dtype of `like`."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else like.new_zeros(0)


def part(x: Tensor, at: slice) -> Tensor:
    """x[at], and `x` itself where that is all of it: a small batch feels every view."""
    return x if at.start == 0 and at.stop == x.shape[0] else x[at]


def spans(size: int, step: int) -> Iterator[slice]:
    """Consecutive slices of `step` that cover 0 .. size - 1."""
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))
