"""What singular values say of how many directions embeddings use."""

import torch
from torch import Tensor


def effective_rank(singular_values: Tensor) -> float:
    r"""In how many directions, as the exponential of an entropy; of all zeros, 0.

    :math:`\exp(-\sum_k p_k \log p_k)` with :math:`p_k` the share of a value in their sum.

    Args:
        singular_values: (k,) of any scale, 0 or more.

    >>> round(effective_rank(torch.tensor([1.0, 1.0, 0.0])), 6)
    2.0

    Source: Roy & Vetterli, "The Effective Rank", EUSIPCO 2007; Garrido et al., "RankMe", ICML 2023.
    """
    total = singular_values.sum()
    if total == 0:
        return 0.0
    return float(torch.special.entr(singular_values / total).sum().exp())
