"""Labelled pairs counted from the closest to the farthest, and by identity.

All verification figures are computed from these counts, whether the pairs are given as arrays or
are all pairs of a set of embeddings, which are never held in memory at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nearfar.evaluate.scores import Bools, Floats, Integers

Average = Literal["pairs", "identities"]

BINS = 512  # for the contribution of each identity
_AT_A_TIME = 2**22 // (2 * BINS)  # identities, and resamples: 2**22 numbers


@dataclass(frozen=True, eq=False)
class Tally:
    """Pairs at each step of a threshold that moves from strict to loose.

    Attributes:
        distance: (s,) increasing distances; a threshold at a distance accepts the steps up to it.
        similar: (s,) weight of the similar pairs at each step.
        dissimilar: (s,) weight of the dissimilar pairs.
        n_similar: number of similar pairs.
        n_dissimilar: number of dissimilar pairs.
        n_trials: number of dissimilar pairs; or of pairs of identities, if rates are averages over
            those.
        by_identity: what each identity contributes; None if identities are not known.
    """

    distance: Floats
    similar: Floats
    dissimilar: Floats
    n_similar: int
    n_dissimilar: int
    n_trials: int
    by_identity: "ByIdentity | None" = None

    def rates(self) -> tuple[Floats, Floats]:
        """(s,) false-accept and (s,) true-accept rate of a threshold at each step."""
        return _cumulative_share(self.dissimilar), _cumulative_share(self.similar)


@dataclass(frozen=True, eq=False)
class ByIdentity:
    """The weight of the pairs that each identity takes part in, in bins of neighbouring steps.

    Attributes:
        ends: (c,) int64, the last step of each bin.
        parts: some identities at a time, (k, 2, c): the dissimilar, then the similar pairs.
        n: number of identities among the similar or the dissimilar pairs, whichever is smaller.
        crossed: whether any pair is of two identities.
    """

    ends: Integers
    parts: tuple[Floats, ...]
    n: int
    crossed: bool


def tally_of(distance: Floats, similar: Bools, groups: Integers | None, average: Average) -> Tally:
    """Count pairs that are given one by one.

    Args:
        distance: (n,) of the pairs.
        similar: (n,) bool.
        groups: (n, 2) int64 identities, numbered 0, 1, ...
        average: "pairs" for weight 1 per pair; "identities" for 1 per identity and per two of them.

    >>> found = tally_of(np.array([0.5, 0.1, 0.5]), np.array([True, True, False]), None, "pairs")
    >>> found.distance, found.similar, found.dissimilar
    (array([0.1, 0.5]), array([1., 1.]), array([0., 1.]))
    """
    distances, step = np.unique(distance, return_inverse=True)
    return tally_at(distances, step.astype(np.int64), similar, groups, average)


def tally_at(
    distances: Floats, step: Integers, similar: Bools, groups: Integers | None, average: Average
) -> Tally:
    """Count pairs whose steps are known: (n,) places in `distances`."""
    weight = weights_of(groups, similar, average)
    n_trials = int((~similar).sum())
    if average == "identities":  # the pairs of two identities weigh 1 together
        n_trials = round(weight[~similar].sum())
    n = len(distances)
    near = counted(step[similar], n, weight[similar])
    far = counted(step[~similar], n, weight[~similar])
    found = None
    if groups is not None:
        ends = bin_ends(near, far)
        found = _by_identity(groups, np.searchsorted(ends, step), similar, weight, ends)
    n_similar = int(similar.sum())
    return Tally(distances, near, far, n_similar, len(step) - n_similar, n_trials, found)


def bin_ends(similar: Floats, dissimilar: Floats) -> Integers:
    """(c,) the last step of each bin: all steps, or a choice that is finest where errors are few.

    The figures of a good verifier depend on few errors, so the bins are evenly spaced on a logistic
    scale of the share of each kind of pair.
    """
    n = len(similar)
    if n <= BINS:
        return np.arange(n)
    share = 1 / (1 + np.exp(-np.linspace(-9.5, 9.5, BINS // 2 - 1)))
    places = [
        np.searchsorted(_cumulative_share(weights), share)
        for weights in (similar, dissimilar)
        if weights.any()
    ]
    return np.unique(np.concatenate([*places, [n - 1]])).clip(max=n - 1)


def counted(places: Integers, n: int, weight: Floats | None = None) -> Floats:
    """(n,) the weight at each place; None: 1 each."""
    return np.bincount(places, weight, minlength=n).astype(np.float64)


def weights_of(groups: Integers | None, similar: Bools, average: Average) -> Floats:
    """(n,) 1 for each pair; or weights that sum to 1 per identity and per two identities.

    >>> groups = np.array([[0, 0], [0, 1], [1, 0]])
    >>> weights_of(groups, np.array([True, False, False]), "identities")
    array([1. , 0.5, 0.5])
    """
    if groups is None or average == "pairs":
        return np.ones(len(similar))
    low, high = groups.min(1), groups.max(1)
    cell = (low * (int(groups.max()) + 1) + high) * 2 + similar
    _, which, counts = np.unique(cell, return_inverse=True, return_counts=True)
    found: Floats = 1 / counts[which]
    return found


def _by_identity(
    groups: Integers, bins: Integers, similar: Bools, weight: Floats, ends: Integers
) -> ByIdentity:
    a, b = groups.T
    crossed = a != b
    who = np.concatenate([a, b[crossed]])
    order = np.argsort(who, kind="stable")
    who = who[order]
    place = bins + len(ends) * similar
    place = np.concatenate([place, place[crossed]])[order]
    weight = np.concatenate([weight, weight[crossed]])[order]
    size, n, parts = 2 * len(ends), int(groups.max()) + 1, []
    for start in range(0, n, _AT_A_TIME):
        stop = min(start + _AT_A_TIME, n)
        low, high = np.searchsorted(who, [start, stop])
        cell = (who[low:high] - start) * size + place[low:high]
        held = counted(cell, (stop - start) * size, weight[low:high])
        parts.append(held.reshape(stop - start, 2, len(ends)))
    return ByIdentity(ends, tuple(parts), n_identities(groups, similar), bool(crossed.any()))


def n_identities(groups: Integers, similar: Bools) -> int:
    """The identities among the similar or the dissimilar pairs, whichever is smaller."""
    return min(len(np.unique(groups[similar])), len(np.unique(groups[~similar])))


def replicates(tally: Tally, resamples: int, seed: int) -> Iterator[tuple[Floats, Floats]]:
    r"""(b, c) false- and true-accept rates at the ends of the bins, for b resamples at a time.

    Each resample draws how often each identity counts, :math:`w_i \sim` Poisson(1). A pair of i and
    j gets the weight :math:`1 + (w_i - 1) + (w_j - 1)`, and a pair within i the weight :math:`w_i`.
    The total weight is then a sum over identities, so no pair has to be visited again.

    Two tallies of the same pairs draw the same weights by the same seed, whatever their bins.
    """
    known = tally.by_identity
    assert known is not None
    random = np.random.default_rng([seed, 3])
    whole = np.stack(
        [
            np.add.reduceat(weights, np.append(0, known.ends[:-1] + 1))
            for weights in (tally.dissimilar, tally.similar)
        ]
    )
    c = len(known.ends)
    for start in range(0, resamples, _AT_A_TIME):
        n = min(_AT_A_TIME, resamples - start)
        total = np.broadcast_to(whole.reshape(-1), (n, 2 * c)).copy()
        for part in known.parts:
            drawn = random.poisson(1.0, (n, len(part))) - 1.0
            total += drawn @ part.reshape(len(part), -1)
        dissimilar, similar = total.reshape(n, 2, c).swapaxes(0, 1)
        # Negative weights could make a rate fall slightly; rates must not.
        yield tuple(np.maximum.accumulate(_cumulative_share(w), 1) for w in (dissimilar, similar))  # type: ignore[misc]


def _cumulative_share(weights: Floats) -> Floats:
    """The share of the weight up to each step; NaN if there is no weight."""
    total = np.cumsum(weights, -1)
    with np.errstate(invalid="ignore", divide="ignore"):
        share: Floats = total / total[..., -1:]
    return share
