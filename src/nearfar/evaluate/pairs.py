"""Balanced pairs of labelled items, drawn by seed."""

from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nearfar.inputs import ArrayLike, tensor

_EVEN = 20  # rounds in which identities are drawn first; later rounds draw items directly


def sample_pairs(identity: ArrayLike, n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw n pairs of items by seed, half of them similar, all distinct.

    Identities are drawn first, then items, so an identity with many items has no more pairs than
    the others, unless those run out of pairs. If there are fewer than n / 2 similar (or dissimilar)
    pairs, all of them are returned.

    Args:
        identity: (m,) int64, the identity of each item.
        n: how many pairs.
        seed: of the draw.

    Returns:
        Three tensors `a`, `b`, `similar`. The first two are (p,) int64, the two rows of each pair,
        which always differ; the third is (p,) bool.

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
    """(min(n, all), 2), by numbering the pairs of each identity and drawing numbers."""
    order, first, counts = _in_order(labels)
    there = counts * (counts - 1) // 2
    wanted = _equal_shares(there, n, random)
    drawn = [
        np.sort(random.choice(there[i], wanted[i], replace=False)) for i in wanted.nonzero()[0]
    ]
    within = np.concatenate([np.zeros(0, dtype=np.int64), *drawn])
    # Pair number k of an identity is (i, j), i < j, with k = j (j - 1) / 2 + i.
    j = ((1 + np.sqrt(1 + 8 * within)) // 2).astype(np.int64)
    j -= j * (j - 1) // 2 > within  # the square root of a large number may be rounded up
    i = within - j * (j - 1) // 2
    start = np.repeat(first, wanted)
    pairs: npt.NDArray[np.int64] = order[np.stack([start + i, start + j], 1)]
    return pairs


def _equal_shares(
    there: npt.NDArray[np.int64], n: int, random: np.random.Generator
) -> npt.NDArray[np.int64]:
    """How many to take of each, n in total: equally many, or all where there are fewer.

    >>> _equal_shares(np.array([1, 3, 100]), 8, np.random.default_rng(0)).tolist()
    [1, 3, 4]
    """
    n = min(n, int(there.sum()))
    low, high = 0, int(there.max(initial=0))  # the largest level that takes no more than n
    while low < high:
        level = (low + high + 1) // 2
        low, high = (level, high) if np.minimum(there, level).sum() <= n else (low, level - 1)
    taken = np.minimum(there, low)
    more = random.permutation((there > low).nonzero()[0])[: n - taken.sum()]
    taken[more] += 1
    return taken


def _dissimilar_pairs(
    labels: npt.NDArray[Any], n: int, random: np.random.Generator
) -> npt.NDArray[np.int64]:
    """(min(n, all), 2), by drawing two identities and an item of each until there are n pairs."""
    order, first, counts = _in_order(labels)
    m = len(labels)
    total = int(m * (m - 1) // 2 - (counts * (counts - 1) // 2).sum())
    if total <= 4 * n:
        size = np.repeat(counts, counts)  # of the identity of each item, in order
        a, b = np.triu_indices(m, k=1)
        who = np.repeat(np.arange(len(counts)), counts)
        apart = who[a] != who[b]
        a, b = a[apart], b[apart]
        even = 1 / (size[a] * size[b])
        chosen = random.choice(len(a), size=min(n, total), replace=False, p=even / even.sum())
        chosen.sort()
        listed: npt.NDArray[np.int64] = np.sort(order[np.stack([a[chosen], b[chosen]], 1)], 1)
        return listed
    found = np.zeros((0, 2), dtype=np.int64)
    for attempt in count():
        if attempt < _EVEN:
            who = random.integers(0, len(counts), size=(2 * n, 2))
            drawn = first[who] + (random.random(who.shape) * counts[who]).astype(np.int64)
        else:  # only pairs of a few identities are left
            drawn = random.integers(0, m, size=(2 * n, 2))
        drawn = np.sort(order[drawn], axis=1)
        drawn = drawn[labels[drawn[:, 0]] != labels[drawn[:, 1]]]
        found = np.concatenate([found, drawn])
        _, earliest = np.unique(found, axis=0, return_index=True)
        found = found[np.sort(earliest)]
        if len(found) >= n:
            break
    return found[:n]


def _in_order(
    labels: npt.NDArray[Any],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The rows sorted by identity, the first position of each identity, and its size."""
    order = np.argsort(labels, kind="stable")
    _, first, counts = np.unique(labels[order], return_index=True, return_counts=True)
    return order, first, counts
