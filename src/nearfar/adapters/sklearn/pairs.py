# ruff: noqa: N803
"""Pairs of items in one array, (n, 2, n_features): their labels, their items, and their split."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_array  # type: ignore[import-untyped]
from scipy.sparse.csgraph import connected_components  # type: ignore[import-untyped]
from sklearn.utils import check_array

from nearfar.labels import SimilarLabel, pair_labels

Floats = npt.NDArray[np.floating[Any]]
Integers = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
DTYPES = [np.float64, np.float32]  # others become the first
ATTEMPTS = 20  # to draw identities that leave pairs of both kinds on both sides


def as_pairs(X: Any) -> Floats:
    """The pairs as an array of floats.

    Raises:
        ValueError: not of shape (n, 2, n_features), or not finite.
    """
    pairs: Floats = check_array(X, dtype=DTYPES, ensure_2d=False, allow_nd=True, input_name="X")
    if pairs.ndim != 3 or pairs.shape[1] != 2:
        fix = " For a single pair pass X[None]." if pairs.shape[:-1] == (2,) else ""
        if pairs.ndim == 2 and not fix:
            fix = " Pass np.stack([first, second], axis=1)."
        raise ValueError(
            "X must have shape (n, 2, n_features), the two items of each pair; got "
            f"{pairs.shape}.{fix}"
        )
    return pairs


def labels_of(y: Any, pairs: Floats, similar_label: SimilarLabel) -> Bools:
    """(n,) whether each pair is similar.

    Raises:
        TypeError: numbers without `similar_label`, or text.
        ValueError: a wrong shape, a label that is neither, or pairs of one kind only.
    """
    like = torch.empty(len(pairs), 0, dtype=torch.float64)
    degree = pair_labels(np.asarray(y), like=like, similar_label=similar_label).numpy()
    if not np.isin(degree, (0, 1)).all():
        raise ValueError("y must say of each pair whether it is similar; got degrees between.")
    similar: Bools = degree == 1
    if similar.all() or not similar.any():
        raise ValueError("y must hold similar and dissimilar pairs; got only one class of them.")
    return similar


def items_of(pairs: Floats) -> tuple[Floats, Integers]:
    """The items of pairs, equal rows once, and (n, 2) which two of them are each pair.

    >>> items, index = items_of(np.array([[[5.0], [7]], [[7], [6]]]))
    >>> items.ravel(), index.tolist()
    (array([5., 6., 7.]), [[0, 2], [2, 1]])
    """
    rows = pairs.reshape(-1, pairs.shape[2])
    items, index = np.unique(rows, axis=0, return_inverse=True)
    return items, index.reshape(-1, 2)


def joined(n: int, pairs: Integers) -> Integers:
    """(n,) the group of each of n things, of which those in one pair are in one group.

    >>> joined(4, np.array([[0, 2], [2, 3]])).tolist()
    [0, 1, 0, 0]
    """
    graph = coo_array((np.ones(len(pairs)), pairs.T), shape=(n, n))
    group: Integers = connected_components(graph, directed=False)[1].astype(np.int64)
    return group


def held_out(
    identity: Integers, similar: Bools, share: float, random: np.random.RandomState
) -> Bools:
    """(c,) which identities are kept out of the training, about a share of them.

    A dissimilar pair of an identity that is kept out and one that is not is lost. So identities
    that pairs join stay together, unless that would put less than half the share of the pairs
    aside: then each identity is drawn by itself.

    Args:
        identity: (n, 2) the identities of each pair, from 0 to c - 1.
        similar: (n,) bool.
        share: of the pairs, or of the identities where each is drawn by itself.
        random: for the draw.

    Raises:
        ValueError: no split was found that leaves similar and dissimilar pairs on both sides.
    """
    n = int(identity.max()) + 1
    cluster = joined(n, identity)
    clusters = _drawn(np.bincount(cluster[identity[:, 0]]), share * len(identity), random)[cluster]
    if _complete(clusters, identity, similar) and 2 * clusters[identity].all(1).mean() >= share:
        return clusters
    for _ in range(ATTEMPTS):
        # One identity alone has no dissimilar pair.
        alone = _drawn(np.ones(n, dtype=np.int64), max(share * n, 2), random)
        if _complete(alone, identity, similar):
            return alone
    raise ValueError(
        f"the {len(similar)} pairs of {n} identities are too few to fit a threshold on identities "
        "that the training has not seen: there must be similar and dissimilar pairs on both sides. "
        "Give more pairs, or another calibration_share or random_state."
    )


def _drawn(sizes: Integers, room: float, random: np.random.RandomState) -> Bools:
    """Which units are drawn: in random order, each for which there is still room."""
    drawn = np.zeros(len(sizes), dtype=np.bool_)
    for unit in random.permutation(len(sizes)):
        if sizes[unit] <= room:
            drawn[unit] = True
            room -= sizes[unit]
    return drawn


def _complete(out: Bools, identity: Integers, similar: Bools) -> bool:
    """Whether both sides have similar and dissimilar pairs."""
    sides = out[identity].all(1), ~out[identity].any(1)
    return all(similar[side].any() and (~similar[side]).any() for side in sides)
