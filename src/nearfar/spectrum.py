"""How many directions embeddings use, from their singular values."""

import torch
from torch import Tensor


def effective_rank(singular_values: Tensor) -> float:
    r"""The number of directions in use, as the exponential of an entropy; 0 if all values are 0.

    .. math:: \exp\Big(-\sum_k p_k \log p_k\Big), \qquad p_k = \sigma_k / \sum_j \sigma_j

    Args:
        singular_values: (k,) singular values on any scale, all 0 or more.

    >>> round(effective_rank(torch.tensor([1.0, 1.0, 0.0])), 6)
    2.0

    Source: Roy & Vetterli, "The Effective Rank", EUSIPCO 2007; Garrido et al., "RankMe", ICML 2023.
    """
    total = singular_values.sum()
    if total == 0:
        return 0.0
    return float(torch.special.entr(singular_values / total).sum().exp())
