"""Formulas that several losses share."""

import torch
from torch import Tensor

from nearfar.inputs import readable


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), accurate for large x; beyond 40 it equals x in float64."""
    return torch.nn.functional.softplus(x, threshold=40.0)


_MANY = 2**16  # with fewer values, finding the largest takes as long as the softplus


def softplus_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    """The softplus and its derivative, the sigmoid."""
    slope = x.sigmoid()
    # Up to 0 the softplus is -log(1 - sigmoid), which is accurate there and takes half as long.
    if x.numel() >= _MANY and readable(x) and x.amax().item() <= 0:
        return slope.neg().log1p_().neg_(), slope
    return softplus(x), slope
