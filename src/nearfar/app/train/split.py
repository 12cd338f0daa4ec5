"""Identities into train, calibration and test: never pairs, never items."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nearfar.app.errors import InputError
from nearfar.app.train.data import Items, Pairs
from nearfar.app.train.groups import connected
from nearfar.app.train.names import KEEP, LEAVE_OUT

FEWEST = 2  # identities of a side: with one there is no dissimilar pair
SIDES = ("train", "calibration", "test")
Bools = npt.NDArray[np.bool_]


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


def split_items(
    items: Items, *, calibration: float, test: float, seed: int, single: str | None = None
) -> Split:
    """Split the identities by seed; what `items.split_groups` binds together stays together.

    Args:
        items: what to split.
        calibration: share of the identities that this side gets.
        test: likewise.
        seed: of the choice.
        single: what becomes of identities with a single item: "keep" gives each side its share of
            them, "leave-out" leaves them on no side, "refuse" or None refuses them.

    Raises:
        InputError: an identity with a single item, or too few identities for three sides.
    """
    alone = singles(items)
    if single not in (KEEP, LEAVE_OUT):
        _refuse_singles(items, alone)
    taken = (~alone).nonzero()[:, 0] if single == LEAVE_OUT else torch.arange(len(alone))
    bundles = np.array(_bundles(items))[taken.numpy()]
    similar = items.can_be_similar()[taken].numpy()
    # Bundles that cannot show what is the same are shared out by themselves, so that no side is
    # left with nothing else.
    telling = np.isin(bundles, bundles[similar])
    fewest = FEWEST if telling.all() else 1
    shares = {"test": test, "calibration": calibration}
    sides = np.full(len(bundles), "train", dtype=object)
    sides[telling] = _share_out(
        bundles[telling], similar[telling, None], shares, seed, fewest=fewest
    )
    nothing = np.zeros((int((~telling).sum()), 0), dtype=bool)
    sides[~telling] = _share_out(bundles[~telling], nothing, shares, seed, fewest=0)
    split = Split(**{side: taken[torch.from_numpy(sides == side)] for side in SIDES})
    _refuse_few(len(taken), split, items)
    _refuse_untelling(split, items)
    return split


def split_pairs(pairs: Pairs, *, calibration: float, test: float, seed: int) -> Split:
    """Split what the similar pairs connect; what `pairs.items.split_groups` binds stays together.

    A dissimilar pair across two sides belongs to neither and is lost. So the identities that
    dissimilar pairs join into a cluster, such as the genuine and the forged signatures of one
    writer, go to one side wherever such clusters can give each of three sides similar and
    dissimilar pairs; see `_share_out`. Where they cannot, identities are split one by one.

    So they are where whole clusters leave next to nothing to measure on, a tenth of what one by one
    leaves: of pairs drawn at random among many identities, nearly all are in one cluster.

    Raises:
        InputError: labels of one class only, or a side without similar or dissimilar pairs.
    """
    similar = pairs.is_similar()
    if similar.all() or not similar.any():
        only, other = ("similar", "dissimilar") if similar.any() else ("dissimilar", "similar")
        raise InputError(f"every pair is labelled {only}. Add {other} pairs, or check the labels.")
    shares = {"test": test, "calibration": calibration}
    kinds = _kinds(pairs)
    whole = _of_sides(_share_out(np.array(_clusters(pairs)), kinds, shares, seed))
    found = _of_sides(_share_out(np.array(_bundles(pairs.items)), kinds[:, :1], shares, seed))
    if _fills(pairs, whole) and 10 * _measured(pairs, whole) >= _measured(pairs, found):
        return whole
    turned = _turned_round(pairs)
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
    """(i,) bool: the identities with a single item."""
    return torch.bincount(items.identity, minlength=len(items.identities)) < 2


def rows_within(pairs: Pairs, identities: Tensor) -> Tensor:
    """(m,) rows of the pairs whose two items both belong to these identities."""
    inside = torch.isin(pairs.items.identity, identities)
    return (inside[pairs.a] & inside[pairs.b]).nonzero()[:, 0]


def rows_to_measure(pairs: Pairs, identities: Tensor) -> Tensor:
    """(m,) those of `rows_within` that are no pairs within one group, which are never measured."""
    rows = rows_within(pairs, identities)
    return rows[pairs.items.comparable(pairs.a[rows], pairs.b[rows])]


def _refuse_singles(items: Items, alone: Tensor) -> None:
    if not alone.any():
        return
    identity = int(alone.nonzero()[0])
    name = items.names[int((items.identity == identity).nonzero()[0])]
    raise InputError(
        f"identity {items.identities[identity]!r} has a single item ({name}), so no pair can show "
        f"what is the same about it ({int(alone.sum())} of {len(alone)} identities). Add an item; "
        f"or say --single {KEEP}, to use it as a dissimilar example, or --single {LEAVE_OUT}."
    )


def _refuse_few(n: int, split: Split, items: Items) -> None:
    """Refuse a side of too few identities, of n that there are."""
    grouped = " in groups that stay together" * (items.split_groups is not None)
    for side in SIDES:
        members = getattr(split, side)
        if len(members) < FEWEST:
            raise InputError(
                f"{n} identities{grouped} are too few to split into train, calibration and test, "
                f"which share none: {side} would get {len(members)} and needs {FEWEST}. Give at "
                f"least {3 * FEWEST} identities; a useful verifier needs dozens."
            )


def _refuse_untelling(split: Split, items: Items) -> None:
    """Refuse a side of identities none of which can show what is the same about it."""
    able = items.can_be_similar()
    of = " of different groups" * (items.groups is not None)
    for side in SIDES:
        if not able[getattr(split, side)].any():
            raise InputError(
                f"{side} would get no identity with two items{of}, so no pair could show what is "
                f"the same: {int(able.sum())} of {len(able)} identities have two, and each of "
                "train, calibration and test needs one. Add items."
            )


def _turned_round(pairs: Pairs) -> str:
    """A sentence for an error where most items are one identity; empty elsewhere."""
    n, most = len(pairs.items.x), int(pairs.items.identity.bincount().max())
    if most <= n / 2:
        return ""
    return (
        f" But {most:,} of {n:,} items are one identity, by similar pairs that connect them: the "
        "labels may be the other way round; check --similar-label."
    )


def _counts(pairs: Pairs, split: Split, side: str) -> tuple[int, int]:
    """How many similar and dissimilar pairs a side trains on, or measures."""
    within = rows_within if side == "train" else rows_to_measure
    similar = pairs.is_similar()[within(pairs, getattr(split, side))]
    return int(similar.sum()), int((~similar).sum())


def _fills(pairs: Pairs, split: Split) -> bool:
    """Whether each side has identities enough, and pairs of both kinds."""
    return all(
        len(getattr(split, side)) >= FEWEST and min(_counts(pairs, split, side)) > 0
        for side in SIDES
    )


def _measured(pairs: Pairs, split: Split) -> int:
    """How many dissimilar pairs the poorer one of calibration and test has."""
    return min(_counts(pairs, split, side)[1] for side in ("calibration", "test"))


def _kinds(pairs: Pairs) -> Bools:
    """(i, 2): whether an identity has similar pairs, and dissimilar ones, that may be measured."""
    items, similar = pairs.items, pairs.is_similar()
    comparable = items.comparable(pairs.a, pairs.b)
    kinds = torch.zeros(len(items.identities), 2, dtype=torch.bool)
    for kind, rows in enumerate((similar & comparable, ~similar & comparable)):
        for end in (pairs.a, pairs.b):
            kinds[items.identity[end[rows]], kind] = True
    return kinds.numpy()


def _clusters(pairs: Pairs) -> list[str]:
    """For each identity, the name of what pairs or `split_groups` connect it with."""
    names: dict[str, int] = {}
    bundle = torch.tensor([names.setdefault(name, len(names)) for name in _bundles(pairs.items)])
    n = len(bundle)
    identity = torch.arange(n)
    a = torch.cat([pairs.items.identity[pairs.a], identity])
    b = torch.cat([pairs.items.identity[pairs.b], n + bundle])
    cluster = connected(2 * n, a, b, torch.ones(len(a), dtype=torch.bool))[:n]
    return [str(int(c)) for c in cluster]


def _bundles(items: Items) -> list[str]:
    """For each identity, the name of what must stay on its side; its own where nothing must."""
    if items.split_groups is None:
        return [str(i) for i in range(len(items.identities))]
    return [name or f" {i}" for i, name in enumerate(items.split_groups)]  # no name begins so


def _of_sides(sides: npt.NDArray[np.object_]) -> Split:
    return Split(**{side: torch.from_numpy(np.flatnonzero(sides == side)) for side in SIDES})


def _share_out(
    bundles: npt.NDArray[np.str_],
    brings: Bools,
    shares: Mapping[str, float],
    seed: int,
    *,
    fewest: int = FEWEST,
) -> npt.NDArray[np.object_]:
    """(n,) the side of each identity.

    The bundles are shuffled, and each goes to the first of test and calibration that it still fits
    in, or else to train. Where this leaves a side without what it needs, each side is given some
    bundles first that bring it, its founders; the others follow as before. What no way of doing so
    fills comes back as it is.

    Args:
        bundles: (n,) the name of what an identity stays together with.
        brings: (n, k) bool, which of the k things that a side needs an identity brings.
        shares: of the identities, that test and calibration get.
        seed: of the shuffling.
        fewest: identities of a side.
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
    """The side of each bundle: that of the founders, then the first that a bundle still fits in."""
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
    """Bundles that bring each side what it needs, as far as there are any.

    Those that fit in come first, then those that bring all at once (the other way round without
    `fitting`); of those that do not fit, the smallest, and else by `order`.
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
