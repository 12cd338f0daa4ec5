"""Sums over the hinges between two numbers, from sums over all hinges at other margins.

A hinge h = max(0, v + m) is above `low` where v + m - low is above 0: there, it is the hinge of the
margin m - low, plus `low`. So the hinges above `low` are the non-zero ones at that margin, and the
derivatives of the two are the same. Those that are not below `high` are taken away again. None of
this lists a hinge, so what is fast for all of them stays fast.
"""

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from nearfar.reduction import Between


@dataclass(eq=False)
class Part:
    """A sum over hinges at some margin.

    Attributes:
        sign: 1, or -1 where it is taken away.
        margin: of the hinges.
        closed: whether a hinge that is exactly satisfied counts as non-zero.
        start: what is added to each non-zero hinge.
        every: whether the others count, too.
    """

    sign: int
    margin: float
    closed: bool = False
    start: float = 0.0
    every: bool = False


def parts_of(margin: float, kept: Between | None) -> list[Part]:
    """The sums that together are the sum over the hinges that count; the first has sign 1."""
    if kept is None:
        return [Part(1, margin, every=True)]
    above = _above(margin, kept.low, 1, closed=False)
    return [above] if kept.high == inf else [above, _above(margin, kept.high, -1, closed=True)]


def _above(margin: float, start: float, sign: int, *, closed: bool) -> Part:
    if start < 0:  # as no hinge is
        return Part(sign, margin, every=True)
    return Part(sign, margin - start, closed, start)


def in_range(loss: Tensor, counts: Tensor, kept: Between | None) -> Tensor:
    """Sums of hinges that count, of which there are so many; rounding may have moved them."""
    if kept is None or kept.high == inf:
        return loss
    counts = counts.to(loss.dtype)
    return loss.clamp(max(kept.low, 0.0) * counts, max(kept.high, 0.0) * counts)


def thresholds(d: Tensor, part: Part) -> Tensor:
    """Below these distances of negatives the hinges are non-zero; overwrites those of positives."""
    threshold = d.add_(part.margin)
    if not part.closed:
        return threshold
    # A comparison with the next larger number includes equality.
    largest = torch.full_like(threshold, torch.finfo(threshold.dtype).max)
    return threshold.nextafter(largest).where(threshold > -inf, threshold)
