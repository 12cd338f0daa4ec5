"""How sure a rate is: bootstrap over identities, since pairs that share one hang together."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from nearfar.evaluate.scores import Bools, Floats, Integers
from nearfar.inputs import ArrayLike, between, tensor

# (b, n) weights of the pairs -> (b, k) rates between 0 and 1, NaN where one has no pairs left.
Figures = Callable[[Floats], Floats]

# Below this many identities of a kind of pairs the spread between identities is hardly known.
FEWEST_IDENTITIES = 30
_ELEMENTS = 2**21  # weights drawn at a time


@dataclass(frozen=True)
class Interval:
    """Where a figure is likely to lie for other identities of the same kind.

    Attributes:
        low: its lower end.
        high: its upper end.
    """

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:.4f} to {self.high:.4f}"


def pair_groups(groups: ArrayLike, n: int) -> Integers:
    """(n, 2) the identities of each pair, named 0, 1, ...

    Raises:
        TypeError: identities that are not integers.
        ValueError: a wrong shape.
    """
    given = tensor("groups", groups).cpu().numpy()
    if given.dtype.kind not in "iu":
        raise TypeError(
            f"groups must hold identities as integers, got {given.dtype}. Text becomes numbers "
            "with np.unique(text, return_inverse=True)[1]."
        )
    if given.shape not in ((n,), (n, 2)):
        raise ValueError(
            f"groups must have shape ({n}, 2), the two identities of each pair, or ({n},) where a "
            f"pair has only one; got {given.shape}."
        )
    places = np.unique(given, return_inverse=True)[1].reshape(given.shape).astype(np.int64)
    return places if places.ndim == 2 else np.stack([places, places], 1)


def n_identities(groups: Integers, similar: Bools) -> int:
    """Of the similar or of the dissimilar pairs, whichever have fewer."""
    return min(len(np.unique(groups[similar])), len(np.unique(groups[~similar])))


def intervals(
    figures: Figures, groups: Integers, n: int, *, level: float, resamples: int, seed: int
) -> list[Interval]:
    r"""Intervals of several rates at once.

    Each resample draws how often each identity counts, :math:`w_i \sim` Poisson(1), which is
    drawing identities with replacement; a pair of i and j weighs :math:`w_i w_j`, a pair within i
    weighs :math:`w_i`. The variance :math:`V_1` of a rate over these resamples holds what is due
    to identities once, as it should, but what is due to a single pair of two identities three
    times (Owen 2007): once for each of the two, and once for their product. The last,
    :math:`V_2`, is what a second bootstrap finds, that draws pairs of identities on their own:

    .. math:: V = \frac{n (n - 1)}{(n - 2)(n - 3)}\, (V_1 - V_2)

    The remaining double count makes V err to the wide side, by :math:`V_2` at most, and keeps it
    above 0 (the two-term estimator of MacKinnon, Nielsen & Webb 2021); the factor makes up for
    what deviations from a mean over n identities lose of the variance of a mean over their pairs.
    The interval is Wilson's at the effective number of trials :math:`p(1-p)/V`, with Student's
    quantile: it stays between 0 and 1, and has a width at p = 0 and p = 1 too, where it counts
    identities as trials (Fogliato, Patil & Perona 2024, for error rates in 1:1 matching).

    In simulations with offsets of identities, from 50 identities on, intervals of 95 % held the
    truth in 89 to 98 % of samples for the AUC, the EER and the TAR at FAR 0.1, and in up to 99 %
    where nothing was due to identities. For the TAR at FAR 0.02 and identities as different as
    single pairs, where the few closest make all false accepts: in 83 to 92 %.

    Args:
        figures: see `Figures`.
        groups: (p, 2) int64 from `pair_groups`.
        n: how many identities there are to learn from, see `n_identities`.
        level: how often such an interval holds the truth.
        resamples: how many draws.
        seed: of the draws.

    Sources: Owen, "The pigeonhole bootstrap", 2007; Owen & Eckles, "Bootstrapping data arrays of
    arbitrary order", 2012; MacKinnon, Nielsen & Webb, "Wild bootstrap and asymptotic inference
    with multiway clustering", 2021; Fogliato, Patil & Perona, "Confidence intervals for error
    rates in 1:1 matching tasks", IJCV 2024.
    """
    a, b = groups.T
    within = a == b
    estimate = figures(np.ones((1, len(groups))))[0]
    random = np.random.default_rng([seed, 3])

    def by_identity() -> Iterator[Floats]:
        for drawn in _draws(random, int(groups.max()) + 1, resamples, len(groups)):
            yield figures(drawn[:, a] * np.where(within, 1, drawn[:, b]))

    def by_two() -> Iterator[Floats]:
        two, place = np.unique(np.sort(groups, 1), axis=0, return_inverse=True)
        for drawn in _draws(random, len(two), resamples, len(groups)):
            yield figures(np.where(within, 1, drawn[:, place.ravel()]))

    variance = _variance(by_identity())
    if not within.all():
        alone = _variance(by_two())
        unbiased = n * (n - 1) / ((n - 2) * (n - 3))
        variance = unbiased * np.maximum(variance - alone, alone)
    return [_wilson(float(p), float(v), n, level) for p, v in zip(estimate, variance, strict=True)]


def _draws(
    random: np.random.Generator, size: int, resamples: int, n_pairs: int
) -> Iterator[Floats]:
    """How often each of `size` things counts, a few resamples at a time."""
    step = max(1, _ELEMENTS // max(n_pairs, size))
    for start in range(0, resamples, step):
        shape = min(step, resamples - start), size
        yield random.poisson(1.0, shape).astype(np.float64)


def _variance(parts: Iterator[Floats]) -> Floats:
    """Of each figure over the resamples that left pairs of both kinds."""
    replicates = np.concatenate(list(parts))
    usable = replicates[np.isfinite(replicates).all(1)]
    return np.asarray(usable.var(0, ddof=1))


def _wilson(p: float, variance: float, n: int, level: float) -> Interval:
    # Rounding leaves a variance of 1e-33 where all resamples agree.
    trials = p * (1 - p) / variance if variance > 1e-18 and 0 < p < 1 else n
    t = _student(level, n - 1)
    centre = (p + t * t / (2 * trials)) / (1 + t * t / trials)
    half = t * (p * (1 - p) / trials + (t / (2 * trials)) ** 2) ** 0.5 / (1 + t * t / trials)
    return Interval(max(centre - half, 0.0), min(centre + half, 1.0))


def _student(level: float, freedom: int) -> float:
    """Student's two-sided quantile, to 0.02 % from 29 degrees of freedom on.

    Source: Abramowitz & Stegun 26.7.5.
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96)
    return float(z + sum(term / freedom**power for power, term in enumerate(terms, 1)))


def check_draws(level: float, resamples: int) -> None:
    """Refuse what no interval can be made of."""
    between("level", level, 0.5, 0.999)
    if not isinstance(resamples, int) or resamples < 100:
        raise ValueError(f"resamples must be an integer of at least 100, got {resamples!r}.")
