"""The threshold of a search, at which strangers are rarely taken for somebody in the gallery.

A threshold for pairs accepts a share of all different pairs. A stranger is compared with everybody
in a gallery, so among M identities it is taken for one of them nearly M times as often. Here the
rate is that of searches: the false-positive identification rate of ISO/IEC 19795-1.

The probability that a query shows an identity is fitted to the same distances.
"""

from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nearfar.app.errors import InputError
from nearfar.app.train.calibration import Calibration
from nearfar.distance import Distance
from nearfar.engine.search import Ready, as_distance
from nearfar.evaluate.probability import PlattProbability, platt_of
from nearfar.evaluate.tally import Tally

Floats = npt.NDArray[np.float64]

_PROBES = 1000  # items that are searched for, at most
_MOST_IDENTITIES = 4000
_FEWEST_IDENTITIES = 5
_FEWEST_EVENTS = 3  # identities, or pairs of them, that a rate must stand for
_FEWEST_FOUND = 20  # identities of which the share that is found means something
_STEPS = 4096  # of distance, to which a curve rounds
_NEAREST = 50  # strangers of a probe that count as its tail, at most


@dataclass(frozen=True)
class OpenSet:
    """The threshold of searches in a gallery of some size, and what to expect of it.

    Attributes:
        threshold: the largest distance at which somebody is found.
        far: the share of strangers that it was fitted to take for somebody, about.
        n_identities: how many identities the gallery has.
        how: "measured" in galleries of that size, made of calibration identities; "extrapolated"
            from smaller ones.
        n_calibration: how many calibration identities there are.
        detected: the share of searches for enrolled identities that find them, first of all;
            None if no calibration identity has two items.
    """

    threshold: float
    far: float
    n_identities: int
    how: str
    n_calibration: int
    detected: float | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dict(vars(self))

    def __str__(self) -> str:
        plural = "identity" if self.n_identities == 1 else "identities"
        words = (
            f"threshold {self.threshold:.4f}, fitted to take {self.far:.3g} of strangers for one "
            f"of {self.n_identities:,} {plural} ({self.how} from {self.n_calibration:,} "
            "calibration identities)"
        )
        if self.detected is not None and self.n_calibration >= _FEWEST_FOUND:
            digits = 0 if self.n_calibration < 1000 else 1
            words += f"; finds {100 * self.detected:.{digits}f} % of those enrolled"
        return words

    @property
    def warning(self) -> str:
        """A note for the user if the threshold is a guess; empty if it is none."""
        n_pairs = self.n_calibration * (self.n_calibration - 1) // 2
        if n_pairs * self.far >= _FEWEST_EVENTS:
            return ""
        return (
            f"the threshold is a guess: {self.n_calibration} calibration identities are {n_pairs} "
            f"different pairs, and a rate of {self.far:.3g} needs about "
            f"{_FEWEST_EVENTS / self.far:,.0f}. Train on more identities, or with a larger "
            "--calibration-share."
        )


@dataclass(frozen=True, eq=False)
class Strangers:
    r"""How near strangers come to calibration items, each of them a probe.

    A probe is compared with other identities as a query with those of a gallery: by the nearest of
    a few items of each. In a gallery of :math:`M` strangers, its nearest is within :math:`t` with
    probability :math:`1 - (1 - F_i(t))^M`, where :math:`F_i` is the distribution of probe i's
    distance to one of them. The rate of a gallery is the mean over probes, for they differ: some
    faces are near many others.

    Attributes:
        distances: (p, n) from each probe to the other identities, ascending; infinite where a
            probe is compared with fewer.
        weight: (p,) of the probes; those of one identity have the weight of one, together 1.
        own: (p,) distance to the nearest other item of the probe's identity; infinite if none.
        n_identities: how many calibration identities there are.
        per_identity: how many items of each were compared, at most.
    """

    distances: Floats
    weight: Floats
    own: Floats
    n_identities: int
    per_identity: float

    @classmethod
    def of(
        cls, calibration: Calibration, distance: Distance, per_identity: int, seed: int = 0
    ) -> "Strangers":
        """Measure them.

        Args:
            calibration: the calibration items.
            distance: by which embeddings are compared.
            per_identity: how many items an identity of the gallery has.
            seed: of the draw of items.

        Raises:
            InputError: there are too few calibration identities.
        """
        random = np.random.default_rng(seed)
        order, identity, rank = _drawn(calibration.identity.numpy(), random)
        n_identities = int(identity.max()) + 1 if len(identity) else 0
        if n_identities < _FEWEST_IDENTITIES:
            raise InputError(
                f"the run has {n_identities} calibration identities; a search needs at least "
                f"{_FEWEST_IDENTITIES} to know how near strangers come. Train on more identities."
            )
        probes = np.flatnonzero(rank < max(1, _PROBES // n_identities))
        columns = np.flatnonzero(rank <= per_identity)  # one more, for where the probe is one
        x = calibration.x[order]
        measured = _distances(x[probes], x[columns], distance)
        same = identity[probes][:, None] == identity[columns]
        if calibration.groups is not None:
            groups = calibration.groups.numpy()[order]
            measured[groups[probes][:, None] == groups[columns]] = inf
        other = measured.copy()
        other[same | (rank[columns] >= per_identity)] = inf
        starts = np.flatnonzero(np.diff(identity[columns], prepend=-1))
        nearest = np.sort(np.minimum.reduceat(other, starts, axis=1), axis=1)[:, :-1]
        # A probe that is among the items of its identity leaves a place for one more.
        used = per_identity + (rank[probes] < per_identity)[:, None]
        self_ = probes[:, None] == columns
        measured[~same | self_ | (rank[columns] >= used)] = inf
        weight = 1 / np.bincount(identity[probes])[identity[probes]]
        counts = np.minimum(np.bincount(identity), per_identity)
        return cls(
            nearest.astype(np.float64),
            weight / weight.sum(),
            measured.min(1).astype(np.float64),
            n_identities,
            float(counts.mean()),
        )

    def open_set(self, n_identities: int, n_rows: int, far: float) -> OpenSet:
        """The largest threshold at which at most `far` of strangers are taken for somebody.

        Args:
            n_identities: how many identities the gallery has.
            n_rows: how many items.
            far: the rate.
        """
        m = self.as_many(n_identities, n_rows)
        tail = self.tail
        measured = m <= self.counts.min() and far * self.n_identities >= _FEWEST_EVENTS

        def rate(t: float) -> float:
            at = np.full(len(self.weight), t)
            taken = self._taken(at, m) if measured else tail.taken(at, m)
            return float(self.weight @ taken)

        threshold = _largest(rate, far, float(self.distances[np.isfinite(self.distances)].max()))
        if measured:  # a distance that was seen: up to the next one, the rate would rise unseen
            seen = self.distances[self.distances <= threshold]
            threshold = float(seen.max()) if seen.size else 0.0
        missed = self._taken(self.own, m - 1) if measured else tail.taken(self.own, m - 1)
        found = (self.own <= threshold) * (1 - missed)
        known = np.isfinite(self.own)
        weight = self.weight * known
        return OpenSet(
            threshold,
            far,
            n_identities,
            "measured" if measured else "extrapolated",
            self.n_identities,
            float(weight @ found / weight.sum()) if known.any() else None,
        )

    def as_many(self, n_identities: int, n_rows: int) -> int:
        """How many of the identities that were compared are like those of a gallery.

        Where calibration identities have fewer items than those of the gallery, the others count
        as further strangers, which is more cautious than what they are.
        """
        return max(n_identities, round(n_rows / self.per_identity))

    @cached_property
    def probability(self) -> PlattProbability | None:
        """Of "same", over the distance to the nearest of a few items of an identity.

        A curve of single pairs would be wrong: the nearest of many items of a stranger is much
        nearer than one of them. None if no calibration identity has two items.
        """
        known = np.isfinite(self.own)
        if not known.any():
            return None
        finite = np.isfinite(self.distances)
        most = max(self.own[known].max(), self.distances[finite].max(), 1e-30)
        step = most / (_STEPS - 1)
        # Each identity counts the same, and each two of them, as in the curve of `verify`.
        similar = _weighed(self.own[known] / step, self.weight[known] * self.n_identities)
        each = self.weight / np.maximum(self.counts, 1)
        each *= self.n_identities * (self.n_identities - 1) / 2
        rows = np.nonzero(finite)[0]
        dissimilar = _weighed(self.distances[finite] / step, each[rows])
        taken = (similar + dissimilar) > 0
        tally = Tally(
            np.arange(_STEPS)[taken] * step,
            similar[taken],
            dissimilar[taken],
            int(known.sum()),
            len(rows),
            len(rows),
        )
        return platt_of(tally, prior=0.5)

    @cached_property
    def counts(self) -> Floats:
        """(p,) how many strangers each probe is compared with."""
        found: Floats = np.isfinite(self.distances).sum(1).astype(np.float64)
        return found

    @cached_property
    def tail(self) -> "Tail":
        return Tail.of(self)

    def _taken(self, at: Floats, m: int) -> Floats:
        """(p,) the share of all draws of m strangers that have one within this distance."""
        n, within = self.counts, (self.distances <= at[:, None]).sum(1)
        left = n - within - m  # of those that are farther; below 0, some draw is always near
        ways = _log_factorial(n - within) - _log_factorial(np.maximum(left, 0))
        ways -= _log_factorial(n) - _log_factorial(n - m)
        taken: Floats = np.where(left < 0, 1.0, -np.expm1(np.minimum(ways, 0)))
        return taken


@dataclass(frozen=True, eq=False)
class Tail:
    r"""The distribution of a probe's distance to one stranger, also below all that were measured.

    Each probe has a scale of its own, the distance :math:`u_i` to the k-th nearest of its
    strangers. In units of it, the nearer ones of all probes together follow one law, counted where
    there are enough and below that a power: :math:`F(t) \propto t^a`. Extreme value theory gives
    this form to the smallest of many distances, which cannot be below 0. The power is Hill's
    estimate less its standard error, so the rate is rather overestimated: far below what was
    measured, a small error of the power is a large one of the rate.

    Attributes:
        strangers: what was measured.
        k: the number of strangers that count as the tail of a probe.
        scale: (p,) the distance to the k-th.
        ratios: (r,) the nearer ones of all probes in units of their scale, ascending.
        join: how many of the ratios the power is fitted to.
        power: the exponent a.
    """

    strangers: Strangers
    k: int
    scale: Floats
    ratios: Floats
    join: int
    power: float

    @classmethod
    def of(cls, strangers: Strangers) -> "Tail":
        n = int(strangers.counts.min())
        if n < _FEWEST_IDENTITIES - 1:
            raise InputError(
                f"some calibration items may be compared with {n} other identities only; a search "
                "needs more to know how near strangers come. Train on more identities."
            )
        k = int(np.clip(n // 10, 3, _NEAREST))
        scale = np.maximum(strangers.distances[:, k - 1], 1e-30)
        ratios = np.sort((strangers.distances[:, : k - 1] / scale[:, None]).ravel())
        ratios = np.maximum(ratios, 1e-6)  # of duplicates, whose logarithm would be infinite
        # A pair of identities is measured from both, and from each probe of an identity.
        repeats = 2 * len(strangers.weight) / strangers.n_identities
        most = len(ratios)
        join = int(np.clip(most // 20, min(20 * repeats, most), min(200 * repeats, most)))
        logs = np.log(ratios[join - 1] / ratios[:join]).sum()
        power = float(join / max(logs, 1e-9))
        power *= 1 - (repeats / join) ** 0.5  # less its standard error
        return cls(strangers, k, scale, ratios, join, power)

    def taken(self, at: Floats, m: int) -> Floats:
        """(p,) how likely one of m strangers is within this distance of each probe."""
        found: Floats = -np.expm1(m * np.log1p(-np.minimum(self._one(at), 1 - 1e-16)))
        return found

    def _one(self, at: Floats) -> Floats:
        """(p,) how likely one stranger is."""
        strangers = self.strangers
        counted = (strangers.distances <= at[:, None]).sum(1) / (strangers.counts + 1)
        ratio = at / self.scale
        least = self.ratios[self.join - 1]
        among = np.searchsorted(self.ratios, ratio, side="right") / len(self.ratios)
        with np.errstate(invalid="ignore", over="ignore"):
            power = self.join / len(self.ratios) * (np.minimum(ratio, least) / least) ** self.power
        nearer = np.where(ratio < least, power, among)
        # k - 1 of the k nearest are nearer than the scale, which is the k-th itself.
        share = self.k / (strangers.counts + 1)
        found: Floats = np.where(ratio < 1, share * nearer, np.maximum(counted, share))
        return found


def _log_factorial(n: Floats) -> Floats:
    found: Floats = torch.lgamma(torch.from_numpy(n) + 1).numpy()
    return found


def _weighed(places: Floats, weights: Floats) -> Floats:
    """(s,) the weight at each step."""
    found: Floats = np.bincount(places.round().astype(int), weights, _STEPS).astype(np.float64)
    return found


def _drawn(
    identity: npt.NDArray[np.int64], random: np.random.Generator
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Items by identity, at random within each; their identities from 0; and the rank in it."""
    names = np.unique(identity)
    if len(names) > _MOST_IDENTITIES:
        names = np.sort(random.choice(names, _MOST_IDENTITIES, replace=False))
    order = random.permutation(np.flatnonzero(np.isin(identity, names)))
    order = order[np.argsort(identity[order], kind="stable")]
    number = np.searchsorted(names, identity[order])
    starts = np.searchsorted(number, np.arange(len(names)))
    return order, number, np.arange(len(order)) - starts[number]


def _distances(a: Tensor, b: Tensor, distance: Distance) -> npt.NDArray[np.float32]:
    """(n, m) from the first, the anchors, to the second."""
    ready = Ready.of(a, b, distance)
    parts = [
        as_distance(ready.measure(slice(i, i + 64), slice(None)), distance)
        for i in range(0, len(a), 64)
    ]
    found: npt.NDArray[np.float32] = torch.cat(parts).float().numpy()
    return found


def _largest(rate: Any, far: float, most: float) -> float:
    """The largest t, to float32's digits, at which a rising rate is at most `far`."""
    if rate(most) <= far:
        return most
    low, high = 0.0, most
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if rate(middle) <= far else (low, middle)
    return low
