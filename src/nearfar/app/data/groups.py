"""Groups of items: which items similar pairs connect, and which must stay together in a split."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def connected(n: int, a: Tensor, b: Tensor, joined: Tensor) -> Tensor:
    """(n,) int64: the connected component of each of n items, joined by the pairs (a, b)."""
    from scipy.sparse import coo_array  # type: ignore[import-untyped]
    from scipy.sparse.csgraph import connected_components  # type: ignore[import-untyped]

    edges = (np.ones(int(joined.sum())), (a[joined].numpy(), b[joined].numpy()))
    _, component = connected_components(coo_array(edges, shape=(n, n)), directed=False)
    return torch.from_numpy(component.astype(np.int64))


def group_ids(names: Sequence[str]) -> Tensor:
    """(n,) int64 ids, equal where the names are; every empty name, no group, gets an id of its own.

    >>> group_ids(["left", "", "right", "left", ""])
    tensor([0, 2, 1, 0, 3])
    """
    known = {name: i for i, name in enumerate(dict.fromkeys(filter(None, names)))}
    alone = iter(range(len(known), len(known) + len(names)))
    numbers = [known[name] if name else next(alone) for name in names]
    return torch.tensor(numbers, dtype=torch.int64)


def merged_groups(identity: Tensor, names: Sequence[str], n_identities: int) -> list[str]:
    """For each identity, the name of the group it is split with; empty if it is in no group.

    An identity with items of two groups merges the two.

    Args:
        identity: (n,) int64, the identity of each item.
        names: the group of each item; empty if it has none.
        n_identities: the number of identities.

    >>> merged_groups(torch.tensor([0, 0, 1, 2, 3]), ["x", "y", "y", "z", ""], 4)
    ['x + y', 'x + y', 'z', '']
    """
    group = group_ids(names)
    there = torch.tensor([bool(name) for name in names])
    n = n_identities + (int(group.max()) + 1 if len(group) else 0)
    together = connected(n, identity, n_identities + group, there)
    members: dict[int, set[str]] = {}
    for component, name in zip(together[identity].tolist(), names, strict=True):
        members.setdefault(component, set()).update(filter(None, [name]))
    return [" + ".join(sorted(members.get(c, ()))) for c in together[:n_identities].tolist()]
