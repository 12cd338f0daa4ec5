"""Which items belong together."""

import numpy as np
import torch
from torch import Tensor


def connected(n: int, a: Tensor, b: Tensor, joined: Tensor) -> Tensor:
    """(n,) int64: which of the sets connected by the joined pairs each of n items lies in."""
    from scipy.sparse import coo_array  # type: ignore[import-untyped]
    from scipy.sparse.csgraph import connected_components  # type: ignore[import-untyped]

    edges = (np.ones(int(joined.sum())), (a[joined].numpy(), b[joined].numpy()))
    _, component = connected_components(coo_array(edges, shape=(n, n)), directed=False)
    return torch.from_numpy(component.astype(np.int64))
