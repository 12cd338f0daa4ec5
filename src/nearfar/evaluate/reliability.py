"""Whether probabilities of "same" hold: what was claimed, and what was seen on other pairs."""

from dataclasses import asdict, dataclass, replace
from math import inf, log
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from nearfar.engine.meeting import Group, over_processes
from nearfar.evaluate.intervals import (
    FEWEST_IDENTITIES,
    Interval,
    check_average,
    check_draws,
    intervals,
)
from nearfar.evaluate.scores import Floats, Integers, checked
from nearfar.evaluate.tally import Average, Tally, tally_at, weights_of
from nearfar.inputs import ArrayLike
from nearfar.plain import number, plain
from nearfar.tabulate import Table

# Likelihood ratios between the bins. They are finer at both ends than bins of equal width, since
# small priors turn ratios of 100 and of 1,000 into very different probabilities.
EDGES = np.array([1 / 1000, 1 / 100, 1 / 10, 1 / 3, 1, 3, 10, 100, 1000])
BINS = len(EDGES) + 1


class Probability(Protocol):
    """A fitted probability of "same": `PlattProbability` or `IsotonicProbability`."""

    @property
    def prior(self) -> float: ...
    def __call__(self, scores: ArrayLike) -> Tensor: ...
    def likelihood_ratio(self, scores: ArrayLike) -> Tensor: ...


@dataclass(frozen=True)
class ReliabilityBin:
    """The pairs whose likelihood ratio lies between two numbers.

    Attributes:
        least: the smaller number.
        most: the larger one; infinity in the last bin.
        n_similar: number of similar pairs.
        n_dissimilar: number of dissimilar pairs.
        share: the share of all pairs that is in the bin.
        claimed: the mean probability of "same" of these pairs.
        seen: the share of them that is similar.
        interval: of `seen`; None without `groups`, or with fewer than 30 identities or pairs in the
            bin.
    """

    least: float
    most: float
    n_similar: int
    n_dissimilar: int
    share: float
    claimed: float
    seen: float
    interval: Interval | None = None


@dataclass(frozen=True)
class Reliability:
    """How well probabilities of "same" hold on some pairs; see `reliability`.

    Attributes:
        prior: the share of similar pairs for which all figures hold.
        calibration_error: the expected calibration error, the mean over bins, weighted by their
            shares, of how far the claimed share is from the one seen.
        log_loss: the mean of -log2 of the probability of what the pair is, in bits.
        log_loss_of_prior: the log loss of the prior alone, which is the same for all pairs.
        bins: the bins that hold pairs, from the least to the largest likelihood ratio.
    """

    prior: float
    calibration_error: float
    log_loss: float
    log_loss_of_prior: float
    bins: tuple[ReliabilityBin, ...]

    def table(self) -> Table:
        """Each bin, with its interval."""
        rows = [
            (
                f"{bin_.least:.3g} to {bin_.most:.3g}",
                f"{bin_.n_similar}",
                f"{bin_.n_dissimilar}",
                number(bin_.claimed),
                number(bin_.seen),
                str(bin_.interval or "-"),
            )
            for bin_ in self.bins
        ]
        head = ("likelihood ratio", "similar", "dissimilar", "claimed", "seen", "interval")
        return Table(head, rows)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `most` of the last bin is None."""
        found: dict[str, Any] = plain(asdict(self))
        return found

    def __str__(self) -> str:
        return (
            f"calibration error {self.calibration_error:.4f}, log loss {self.log_loss:.4f} bits "
            f"({self.log_loss_of_prior:.4f} by the prior alone), at a prior of {self.prior:g}\n"
            f"{self.table().plain()}"
        )


@over_processes
def reliability(
    scores: ArrayLike,
    similar: ArrayLike,
    probability: Probability,
    *,
    groups: ArrayLike | None = None,
    average: Average = "pairs",
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    group: Group | None = None,
) -> Reliability:
    r"""Compare the probability of "same" with how often pairs are the same.

    Pairs are weighted so that the share of similar ones is the prior of the probability. They are
    sorted into bins by their likelihood ratio, whose edges are 1/1000, 1/100, 1/10, 1/3, 1, 3, 10,
    100 and 1000. With the weights :math:`w_b` of the bins, which sum to 1,

    .. math:: E = \sum_b w_b\, |\mathrm{claimed}_b - \mathrm{seen}_b|

    is the expected calibration error. The log loss is that of each pair, in bits,

    .. math:: L = -\pi\, \overline{\log_2 P}_+ - (1 - \pi)\, \overline{\log_2 (1 - P)}_-

    and that of the prior alone is its entropy: 1 bit for a prior of 1/2, where :math:`L` is the
    cost of log-likelihood ratios, Cllr. Above that, the probabilities are worse than none.

    Args:
        scores: (n,) of pairs of other identities than those that the probability was fitted on.
        similar: (n,) bool.
        probability: from `platt_probability` or `isotonic_probability`.
        groups: (n, 2) or (n,) identities of the pairs, for intervals; as in `verification`.
        average: what shares are averaged over, as in `verification`.
        level: confidence level of the intervals.
        resamples: number of resamples in the bootstrap over identities.
        seed: of the bootstrap.
        group: the processes that the pairs are spread over, as in a loss. Their scores are gathered
            on each, and the figures are those of all pairs. None: this one has all.

    Raises:
        TypeError: labels that are not bool, identities that are not integers.
        ValueError: no similar or no dissimilar pairs, scores that are not finite, wrong shapes.

    >>> from nearfar.evaluate import PlattProbability
    >>> probability = PlattProbability(slope=-8.0, intercept=4.0, share=0.5, prior=0.5)
    >>> d, same = [0.1, 0.2, 0.6, 0.4, 0.7, 0.9], [True, True, True, False, False, False]
    >>> print(reliability(d, same, probability))
    calibration error 0.2849, log loss 0.6475 bits (1.0000 by the prior alone), at a prior of 0.5
    likelihood ratio  similar  dissimilar  claimed    seen  interval
    ----------------  -------  ----------  -------  ------  --------
    0.01 to 0.1             0           1   0.0392  0.0000  -
    0.1 to 0.333            0           1   0.1680  0.0000  -
    0.333 to 1              1           0   0.3100  1.0000  -
    1 to 3                  0           1   0.6900  0.0000  -
    10 to 100               2           0   0.9388  1.0000  -

    Sources: Naeini, Cooper & Hauskrecht, "Obtaining well calibrated probabilities using Bayesian
    binning", 2015, there with bins of equal width; Brümmer & du Preez, "Application-independent
    evaluation of speaker detection", 2006, for the log loss.
    """
    check_draws(level, resamples)
    check_average(average, groups)
    values, same, known = checked(scores, similar, True, groups, group)
    sums = Sums(probability)
    weight, step = weights_of(known, same, average), np.zeros(len(same), dtype=np.int64)
    for kind, those in enumerate((~same, same)):
        step[those] = sums.add(kind, values[those], weight[those])
    tally = tally_at(np.arange(BINS, dtype=np.float64), step, same, known, average)
    return reliability_of(sums, tally, level=level, resamples=resamples, seed=seed)


class Sums:
    """What is added up over pairs: (2, b) each, for dissimilar and similar pairs in each bin.

    Bins are numbered from the largest likelihood ratio to the least, as the steps of a `Tally`.

    Attributes:
        probability: the probability that is examined.
        count: number of pairs.
        weight: their weight.
        claimed: sum of their probabilities of "same", weighted.
        lost: sum of their log losses in bits, weighted.
    """

    def __init__(self, probability: Probability) -> None:
        self.probability = probability
        self.count, self.weight, self.claimed, self.lost = np.zeros((4, 2, BINS))

    def add(self, kind: int, scores: ArrayLike, weight: Floats) -> Integers:
        """Add pairs of one kind, 0: dissimilar, 1: similar; returns (n,) their bins."""
        claimed = self.probability(scores).numpy()
        ratio = self.probability.likelihood_ratio(scores).numpy()
        bins: Integers = BINS - 1 - np.searchsorted(EDGES, ratio, side="right")
        right = np.maximum(claimed if kind else 1 - claimed, 1e-300)
        for sums, values in (
            (self.count, None),
            (self.weight, weight),
            (self.claimed, weight * claimed),
            (self.lost, weight * -np.log2(right)),
        ):
            sums[kind] += np.bincount(bins, values, minlength=BINS)
        return bins


def reliability_of(
    sums: Sums, tally: Tally, *, level: float, resamples: int, seed: int
) -> Reliability:
    """The figures of pairs counted in bins; the steps of the tally are the bins."""
    prior = sums.probability.prior
    # The weight of a pair of each kind, so that similar pairs have the share `prior` of all.
    each = np.array([1 - prior, prior]) / sums.weight.sum(1)
    share = each @ sums.weight
    held = [k for k in reversed(range(BINS)) if share[k] > 0]
    ends = np.concatenate([[0.0], EDGES, [inf]])
    options = {"level": level, "resamples": resamples, "seed": seed}
    bins = tuple(
        ReliabilityBin(
            least=float(ends[BINS - 1 - k]),
            most=float(ends[BINS - k]),
            n_similar=int(sums.count[1, k]),
            n_dissimilar=int(sums.count[0, k]),
            share=float(share[k]),
            claimed=float(each @ sums.claimed[:, k] / share[k]),
            seen=float(each[1] * sums.weight[1, k] / share[k]),
            interval=_interval(tally, k, sums.count[:, k].sum(), prior, **options),  # type: ignore[arg-type]
        )
        for k in held
    )
    return Reliability(
        prior,
        float(sum(one.share * abs(one.claimed - one.seen) for one in bins)),
        float(each @ sums.lost.sum(1)),
        -(prior * log(prior) + (1 - prior) * log(1 - prior)) / log(2),
        bins,
    )


def _interval(
    tally: Tally, k: int, n_pairs: float, prior: float, *, level: float, resamples: int, seed: int
) -> Interval | None:
    """Of the share of similar pairs in a bin; None with too few identities or pairs in it."""
    known = tally.by_identity
    if known is None:
        return None
    here = sum(int((part[:, :, k] > 0).any(1).sum()) for part in known.parts)
    n = min(known.n, here, int(n_pairs))
    if n < FEWEST_IDENTITIES:
        return None

    def seen(false: Floats, true: Floats) -> Floats:
        here = [np.diff(rates, axis=1, prepend=0)[:, [k]] for rates in (false, true)]
        with np.errstate(invalid="ignore"):  # a resample may leave the bin empty
            found: Floats = prior * here[1] / (prior * here[1] + (1 - prior) * here[0])
        return found

    estimate = seen(*(rate[None] for rate in tally.rates()))[0]
    of_bin = replace(tally, by_identity=replace(known, n=n))
    (found,) = intervals(seen, of_bin, estimate, level=level, resamples=resamples, seed=seed)
    return found
