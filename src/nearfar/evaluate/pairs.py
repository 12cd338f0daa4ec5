"""Balanced pairs of labelled items, drawn by seed."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nearfar.inputs import ArrayLike, tensor


def sample_pairs(identity: ArrayLike, n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """n pairs of items by seed, half of them similar, all distinct.

    Where there are fewer than n / 2 similar (or dissimilar) pairs, all there are.

    Args:
        identity: (m,) int64, which identity each item shows.
        n: how many pairs.
        seed: of the choice.

    Returns:
        a, b: (p,) int64, the rows of each pair, a != b. similar: (p,) bool.

    >>> a, b, similar = sample_pairs([0, 0, 1, 1], 4, seed=0)
    >>> similar
    tensor([ True,  True, False, False])
    >>> a[:2], b[:2]
    (tensor([0, 2]), tensor([1, 3]))
    """
    labels = tensor("identity", identity).cpu().numpy()
    random = np.random.default_rng([seed, 2])
    near = _similar_pairs(labels, n // 2, random)
    far = _dissimilar_pairs(labels, n // 2, random)
    a, b = torch.from_numpy(np.concatenate([near, far])).unbind(1)
    return a, b, torch.arange(len(a)) < len(near)


def _similar_pairs(
    labels: npt.NDArray[Any], n: int, random: np.random.Generator
) -> npt.NDArray[np.int64]:
    """(min(n, all), 2). The pairs of all identities are numbered, then numbers are drawn."""
    order = np.argsort(labels, kind="stable")
    _, first, counts = np.unique(labels[order], return_index=True, return_counts=True)
    ends = np.cumsum(counts * (counts - 1) // 2)
    total = int(ends[-1]) if len(ends) else 0
    numbers = np.sort(random.choice(total, size=min(n, total), replace=False))
    which = np.searchsorted(ends, numbers, side="right")
    within = numbers - (ends - counts * (counts - 1) // 2)[which]
    # Pair number k of an identity is (i, j), i < j, with k = j (j - 1) / 2 + i.
    j = ((1 + np.sqrt(1 + 8 * within)) // 2).astype(np.int64)
    j -= j * (j - 1) // 2 > within  # the square root of a large number may round up
    i = within - j * (j - 1) // 2
    pairs: npt.NDArray[np.int64] = order[np.stack([first[which] + i, first[which] + j], 1)]
    return pairs


def _dissimilar_pairs(
    labels: npt.NDArray[Any], n: int, random: np.random.Generator
) -> npt.NDArray[np.int64]:
    """(min(n, all), 2), by drawing pairs until enough distinct ones are dissimilar."""
    m = len(labels)
    _, counts = np.unique(labels, return_counts=True)
    total = int(m * (m - 1) // 2 - (counts * (counts - 1) // 2).sum())
    if total <= 4 * n:
        a, b = np.triu_indices(m, k=1)
        numbers = np.flatnonzero(labels[a] != labels[b])
        chosen = np.sort(random.choice(numbers, size=min(n, total), replace=False))
        return np.stack([a[chosen], b[chosen]], 1).astype(np.int64)
    found = np.zeros((0, 2), dtype=np.int64)
    while len(found) < n:
        drawn = np.sort(random.integers(0, m, size=(2 * n, 2)), axis=1)
        drawn = drawn[labels[drawn[:, 0]] != labels[drawn[:, 1]]]
        found = np.concatenate([found, drawn])
        _, earliest = np.unique(found, axis=0, return_index=True)
        found = found[np.sort(earliest)]
    return found[:n]
