"""Split identities, never pairs or items, into train, calibration and test."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nearfar.app.data.groups import connected
from nearfar.app.data.items import Items, Pairs
from nearfar.app.errors import InputError
from nearfar.app.names import KEEP, LEAVE_OUT

FEWEST = 2  # identities per side: one alone has no dissimilar pair
SIDES = ("train", "calibration", "test")
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Split:
    """The identities of each side; no two sides share one.

    Attributes:
        train: (i,) int64 identities.
        calibration: (j,) int64.
        test: (k,) int64.
    """

    train: Tensor
    calibration: Tensor
    test: Tensor


def split_items(
    items: Items, *, calibration: float, test: float, seed: int, single: str | None = None
) -> Split:
    """Split the identities at random; those of one group in `items.split_groups` stay together.

    Args:
        items: the items whose identities are split.
        calibration: share of the identities for calibration.
        test: share of the identities for test.
        seed: random seed.
        single: what to do with identities that have a single item: "keep" gives each side its
            share of them, "leave-out" drops them, "refuse" or None raises an error.

    Raises:
        InputError: an identity has a single item, or there are too few identities for three sides.
    """
    alone = singles(items)
    if single not in (KEEP, LEAVE_OUT):
        _refuse_singles(items, alone)
    taken = (~alone).nonzero()[:, 0] if single == LEAVE_OUT else torch.arange(len(alone))
    bundles = np.array(_bundles(items))[taken.numpy()]
    similar = items.can_be_similar()[taken].numpy()
    # Bundles without any similar pair are distributed separately, so that no side gets only those.
    with_similar = np.isin(bundles, bundles[similar])
    fewest = FEWEST if with_similar.all() else 1
    shares = {"test": test, "calibration": calibration}
    sides = np.full(len(bundles), "train", dtype=object)
    sides[with_similar] = _distribute(
        bundles[with_similar], similar[with_similar, None], shares, seed, fewest=fewest
    )
    nothing = np.zeros((int((~with_similar).sum()), 0), dtype=bool)
    sides[~with_similar] = _distribute(bundles[~with_similar], nothing, shares, seed, fewest=0)
    split = Split(**{side: taken[torch.from_numpy(sides == side)] for side in SIDES})
    _refuse_few(len(taken), split, items)
    _refuse_without_similar(split, items)
    return split


def split_pairs(pairs: Pairs, *, calibration: float, test: float, seed: int) -> Split:
    """Split identities, the items that similar pairs connect; `split_groups` stay together.

    A dissimilar pair across two sides belongs to neither and is lost. Therefore identities that
    dissimilar pairs join into a cluster, such as the genuine and the forged signatures of one
    writer, go to the same side, provided that whole clusters can give each side similar and
    dissimilar pairs; see `_distribute`. Otherwise identities are split one by one.

    They are also split one by one if that leaves over ten times as many pairs to measure: pairs
    drawn at random among many identities nearly all join into one cluster.

    Raises:
        InputError: all labels are the same, or a side has no similar or no dissimilar pairs.
    """
    similar = pairs.is_similar()
    if similar.all() or not similar.any():
        only, other = ("similar", "dissimilar") if similar.any() else ("dissimilar", "similar")
        raise InputError(f"every pair is labelled {only}. Add {other} pairs, or check the labels.")
    shares = {"test": test, "calibration": calibration}
    kinds = _kinds(pairs)
    whole = _as_split(_distribute(np.array(_clusters(pairs)), kinds, shares, seed))
    found = _as_split(_distribute(np.array(_bundles(pairs.items)), kinds[:, :1], shares, seed))
    if _is_complete(pairs, whole) and 10 * _n_measured(pairs, whole) >= _n_measured(pairs, found):
        return whole
    turned = _labels_may_be_swapped(pairs)
    unmeasured = "; those within one group are not measured" * (pairs.items.groups is not None)
    try:
        _refuse_few(len(kinds), found, pairs.items)
    except InputError as error:
        raise InputError(f"{error}{turned}") from None
    for side in SIDES:
        for kind, n in zip(("similar", "dissimilar"), _counts(pairs, found, side), strict=True):
            if not n:
                raise InputError(
                    f"the {side} identities are left without a {kind} pair: the {len(similar)} "
                    f"pairs form {len(pairs.items.identities)} identities, and pairs across the "
                    f"split are dropped{unmeasured}. Add pairs, or try another --seed.{turned}"
                )
    return found


def singles(items: Items) -> Tensor:
    """(i,) bool: whether each identity has a single item."""
    return torch.bincount(items.identity, minlength=len(items.identities)) < 2


def rows_within(pairs: Pairs, identities: Tensor) -> Tensor:
    """(m,) rows of the pairs whose items both belong to these identities."""
    inside = torch.isin(pairs.items.identity, identities)
    return (inside[pairs.a] & inside[pairs.b]).nonzero()[:, 0]


def rows_to_measure(pairs: Pairs, identities: Tensor) -> Tensor:
    """(m,) rows of `rows_within`, without pairs inside one group, which are never measured."""
    rows = rows_within(pairs, identities)
    return rows[pairs.items.comparable(pairs.a[rows], pairs.b[rows])]


def _refuse_singles(items: Items, alone: Tensor) -> None:
    if not alone.any():
        return
    identity = int(alone.nonzero()[0])
    name = items.names[int((items.identity == identity).nonzero()[0])]
    raise InputError(
        f"identity {items.identities[identity]!r} has a single item ({name}), so it has no "
        f"similar pair ({int(alone.sum())} of {len(alone)} identities). Add an item; or use "
        f"--single {KEEP} to keep it as a dissimilar example, or --single {LEAVE_OUT}."
    )


def _refuse_few(n: int, split: Split, items: Items) -> None:
    """Refuse a split that has too few of the n identities on a side."""
    grouped = " in groups that stay together" * (items.split_groups is not None)
    for side in SIDES:
        members = getattr(split, side)
        if len(members) < FEWEST:
            raise InputError(
                f"{n} identities{grouped} are too few to split into train, calibration and test, "
                f"which share none: {side} would get {len(members)} and needs {FEWEST}. Give at "
                f"least {3 * FEWEST} identities; a useful verifier needs dozens."
            )


def _refuse_without_similar(split: Split, items: Items) -> None:
    """Refuse a split with a side on which no identity has a similar pair."""
    able = items.can_be_similar()
    of = " of different groups" * (items.groups is not None)
    for side in SIDES:
        if not able[getattr(split, side)].any():
            raise InputError(
                f"{side} would get no identity with two items{of}, and so no similar pair: "
                f"{int(able.sum())} of {len(able)} identities have two, and each of train, "
                "calibration and test needs one. Add items."
            )


def _labels_may_be_swapped(pairs: Pairs) -> str:
    """A hint for an error message if most items are one identity; empty otherwise."""
    n, most = len(pairs.items.names), int(pairs.items.identity.bincount().max())
    if most <= n / 2:
        return ""
    return (
        f" But similar pairs connect {most:,} of {n:,} items into one identity: the labels may be "
        "the other way round; check --similar-label."
    )


def _counts(pairs: Pairs, split: Split, side: str) -> tuple[int, int]:
    """The number of similar and of dissimilar pairs that a side trains on or measures."""
    within = rows_within if side == "train" else rows_to_measure
    similar = pairs.is_similar()[within(pairs, getattr(split, side))]
    return int(similar.sum()), int((~similar).sum())


def _is_complete(pairs: Pairs, split: Split) -> bool:
    """Whether each side has enough identities, and both similar and dissimilar pairs."""
    return all(
        len(getattr(split, side)) >= FEWEST and min(_counts(pairs, split, side)) > 0
        for side in SIDES
    )


def _n_measured(pairs: Pairs, split: Split) -> int:
    """The number of dissimilar pairs in calibration or test, whichever has fewer."""
    return min(_counts(pairs, split, side)[1] for side in ("calibration", "test"))


def _kinds(pairs: Pairs) -> Bools:
    """(i, 2) bool: whether each identity has similar, and dissimilar, pairs to measure."""
    items, similar = pairs.items, pairs.is_similar()
    comparable = items.comparable(pairs.a, pairs.b)
    kinds = torch.zeros(len(items.identities), 2, dtype=torch.bool)
    for kind, rows in enumerate((similar & comparable, ~similar & comparable)):
        for end in (pairs.a, pairs.b):
            kinds[items.identity[end[rows]], kind] = True
    return kinds.numpy()


def _clusters(pairs: Pairs) -> list[str]:
    """For each identity, the name of the cluster that pairs or `split_groups` connect it to."""
    names: dict[str, int] = {}
    bundle = torch.tensor([names.setdefault(name, len(names)) for name in _bundles(pairs.items)])
    n = len(bundle)
    identity = torch.arange(n)
    a = torch.cat([pairs.items.identity[pairs.a], identity])
    b = torch.cat([pairs.items.identity[pairs.b], n + bundle])
    cluster = connected(2 * n, a, b, torch.ones(len(a), dtype=torch.bool))[:n]
    return [str(int(c)) for c in cluster]


def _bundles(items: Items) -> list[str]:
    """For each identity, the name of its split group, or a name of its own if it has none."""
    if items.split_groups is None:
        return [str(i) for i in range(len(items.identities))]
    return [name or f" {i}" for i, name in enumerate(items.split_groups)]  # unlike any real name


def _as_split(sides: npt.NDArray[np.object_]) -> Split:
    return Split(**{side: torch.from_numpy(np.flatnonzero(sides == side)) for side in SIDES})


def _distribute(
    bundles: npt.NDArray[np.str_],
    brings: Bools,
    shares: Mapping[str, float],
    seed: int,
    *,
    fewest: int = FEWEST,
) -> npt.NDArray[np.object_]:
    """(n,) the side of each identity.

    The bundles are shuffled, and each goes to the first of test and calibration that has room for
    it, or else to train. If this leaves a side without something it needs, each side is first given
    some bundles that provide it, its founders, and the rest follow as before. If no attempt fills
    every side, the first one is returned.

    Args:
        bundles: (n,) the name of the bundle that each identity must stay with.
        brings: (n, k) bool, which of the k things that a side needs each identity provides.
        shares: share of the identities for test and for calibration.
        seed: random seed.
        fewest: the fewest identities a side may have.
    """
    names, index = np.unique(bundles, return_inverse=True)
    sizes = np.bincount(index, minlength=len(names))
    brought = np.zeros((len(names), brings.shape[1]), dtype=bool)
    np.logical_or.at(brought, index, brings)
    order = np.random.default_rng([seed, 1]).permutation(len(names)).tolist()
    room = {side: max(share * len(bundles), fewest) for side, share in shares.items()}

    def filled(sides: npt.NDArray[np.object_]) -> bool:
        of = [sides == side for side in SIDES]
        return all(sizes[own].sum() >= fewest and brought[own].any(0).all() for own in of)

    unaided = _follow(order, sizes, room, {})
    aided = (
        _follow(order, sizes, room, _founders(order, sizes, brought, room, fitting=fitting))
        for fitting in (True, False)
    )
    return next(filter(filled, chain([unaided], aided)), unaided)[index]


def _follow(
    order: Sequence[int],
    sizes: npt.NDArray[np.int64],
    room: Mapping[str, float],
    founders: Mapping[int, str],
) -> npt.NDArray[np.object_]:
    """The side of each bundle: founders are given, others go to the first side with room."""
    sides = np.full(len(sizes), "train", dtype=object)
    left = dict(room)
    for bundle, side in founders.items():
        sides[bundle] = side
        left[side] = left.get(side, 0) - int(sizes[bundle])
    for bundle in order:
        if bundle in founders:
            continue
        for side in room:
            if sizes[bundle] <= left[side] + 0.5:
                sides[bundle] = side
                left[side] -= int(sizes[bundle])
                break
    return sides


def _founders(
    order: Sequence[int],
    sizes: npt.NDArray[np.int64],
    brought: Bools,
    room: Mapping[str, float],
    *,
    fitting: bool,
) -> dict[int, str]:
    """Bundles that provide each side with what it needs, as far as there are any.

    Preferred are bundles that fit, then those that provide everything at once (in reverse without
    `fitting`), then the smallest among those that do not fit, then the first in `order`.
    """
    found: dict[int, str] = {}
    for side, space in {**room, "train": sizes.sum() - sum(room.values())}.items():
        lacking = np.ones(brought.shape[1], dtype=bool)
        while lacking.any():
            able = np.array(
                [b for b in order if b not in found and (brought[b] & lacking).any()], dtype=int
            )
            if not len(able):
                return found
            too_large = sizes[able] > space + 0.5
            partly = ~(brought[able] >= lacking).all(1)
            first, second = (too_large, partly) if fitting else (partly, too_large)
            best = int(able[np.lexsort((sizes[able] * too_large, second, first))[0]])
            found[best] = side
            space -= int(sizes[best])
            lacking &= ~brought[best]
    return found
