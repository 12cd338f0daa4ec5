"""Identities into train, calibration and test: never pairs, never items."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nearfar.errors import InputError
from nearfar.train.data import Items, Pairs
from nearfar.train.groups import connected

FEWEST = 2  # identities of a side: with one there is no dissimilar pair
SIDES = ("train", "calibration", "test")


@dataclass(frozen=True, eq=False)
class Split:
    """Which identities each side has; no two sides share one.

    Attributes:
        train: (i,) int64 identities.
        calibration: (j,) int64.
        test: (k,) int64.
    """

    train: Tensor
    calibration: Tensor
    test: Tensor


def split_items(items: Items, *, calibration: float, test: float, seed: int) -> Split:
    """Split the identities by seed; what `items.groups` binds together stays together.

    Raises:
        InputError: an identity with a single item, or too few identities for three sides.
    """
    counts = torch.bincount(items.identity, minlength=len(items.identities))
    if (counts < 2).any():
        alone = int((counts < 2).nonzero()[0])
        name = items.names[int((items.identity == alone).nonzero()[0])]
        raise InputError(
            f"identity {items.identities[alone]!r} has a single item ({name}), so no pair can show "
            f"what is the same about it ({int((counts < 2).sum())} of {len(counts)} identities). "
            "Add an item or remove it."
        )
    groups = items.groups or [str(i) for i in range(len(counts))]
    return _split(groups, calibration=calibration, test=test, seed=seed)


def split_pairs(pairs: Pairs, *, calibration: float, test: float, seed: int) -> Split:
    """Split what the similar pairs connect; see `_clusters` for what stays together.

    Raises:
        InputError: labels of one class only, or a side without similar or dissimilar pairs.
    """
    similar = pairs.is_similar()
    if similar.all() or not similar.any():
        only, other = ("similar", "dissimilar") if similar.any() else ("dissimilar", "similar")
        raise InputError(f"every pair is labelled {only}. Add {other} pairs, or check the labels.")
    turned = _turned_round(pairs)
    try:
        found = _split(_clusters(pairs), calibration=calibration, test=test, seed=seed)
    except InputError as error:
        raise InputError(f"{error}{turned}") from None
    for side in SIDES:
        rows = rows_within(pairs, getattr(found, side))
        for kind, n in (
            ("similar", int(similar[rows].sum())),
            ("dissimilar", int((~similar[rows]).sum())),
        ):
            if not n:
                raise InputError(
                    f"the {side} identities are left without a {kind} pair: the {len(similar)} "
                    f"pairs form {len(pairs.items.identities)} identities, and pairs across the "
                    f"split are dropped. Add pairs, or try another --seed.{turned}"
                )
    return found


def _turned_round(pairs: Pairs) -> str:
    """A sentence for an error where most items are one identity; empty elsewhere."""
    n, most = len(pairs.items.x), int(pairs.items.identity.bincount().max())
    if most <= n / 2:
        return ""
    return (
        f" But {most:,} of {n:,} items are one identity, by similar pairs that connect them: the "
        "labels may be the other way round; check --similar-label."
    )


def rows_within(pairs: Pairs, identities: Tensor) -> Tensor:
    """(m,) rows of the pairs whose two items both belong to these identities."""
    inside = torch.isin(pairs.items.identity, identities)
    return (inside[pairs.a] & inside[pairs.b]).nonzero()[:, 0]


def _clusters(pairs: Pairs) -> list[str]:
    """For each identity, the name of what must stay on its side.

    A dissimilar pair across two sides belongs to neither and is lost. Where the dissimilar pairs
    join the identities into many small clusters, whole clusters are split and nothing is lost.
    """
    everything = torch.ones(len(pairs.a), dtype=torch.bool)
    cluster = connected(len(pairs.items.x), pairs.a, pairs.b, everything)
    of_identity = torch.zeros(len(pairs.items.identities), dtype=torch.long)
    of_identity[pairs.items.identity] = cluster
    if of_identity.bincount().max() <= len(of_identity) / 10:
        return [str(int(c)) for c in of_identity]
    return [str(i) for i in range(len(of_identity))]


def _split(groups: Sequence[str], *, calibration: float, test: float, seed: int) -> Split:
    """Shuffle the groups; each goes to the first of test and calibration it still fits in."""
    n = len(groups)
    names, index, sizes = np.unique(np.array(groups), return_inverse=True, return_counts=True)
    room = {"test": max(test * n, FEWEST), "calibration": max(calibration * n, FEWEST)}
    side_of = dict.fromkeys(range(len(names)), "train")
    for group in np.random.default_rng([seed, 1]).permutation(len(names)).tolist():
        for side in room:
            if sizes[group] <= room[side] + 0.5:
                side_of[group] = side
                room[side] -= int(sizes[group])
                break
    sides = [side_of[int(i)] for i in index]
    chosen = {side: torch.tensor([i for i in range(n) if sides[i] == side]) for side in SIDES}
    for side, members in chosen.items():
        if len(members) < FEWEST:
            raise InputError(
                f"{n} identities are too few to split into train, calibration and test, which "
                f"share none: {side} would get {len(members)} and needs {FEWEST}. Give at least "
                f"{3 * FEWEST} identities; a useful verifier needs dozens."
            )
    return Split(**chosen)
