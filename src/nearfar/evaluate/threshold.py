"""Fitting a threshold, and its figures on other pairs."""

import warnings
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nearfar.engine.meeting import Group, over_processes
from nearfar.evaluate.intervals import (
    FEWEST_IDENTITIES,
    Interval,
    check_average,
    check_draws,
    intervals,
)
from nearfar.evaluate.scores import Floats, checked
from nearfar.evaluate.tally import Average, Tally, tally_at, tally_of
from nearfar.inputs import ArrayLike
from nearfar.plain import number, plain
from nearfar.tabulate import Table


@dataclass(frozen=True)
class DecisionIntervals:
    """Where the figures of a threshold are likely to lie for other identities.

    Attributes:
        level: confidence level of the intervals.
        n_identities: number of identities among the similar or the dissimilar pairs, whichever is
            smaller.
        far: interval of the false-accept rate.
        tar: interval of the true-accept rate.
        accuracy: interval of the accuracy.
    """

    level: float
    n_identities: int
    far: Interval
    tar: Interval
    accuracy: Interval


@dataclass(frozen=True)
class AtThreshold:
    """Figures of the decisions at one threshold.

    Attributes:
        threshold: a pair is accepted as the same if its score is at least this close.
        far: false-accept rate, the share of the dissimilar pairs that are accepted.
        tar: true-accept rate, the share of the similar pairs that are accepted.
        accuracy: the mean of `tar` and 1 - `far`, which is the share of right decisions if there
            were equally many pairs of both kinds.
        intervals: None without `groups`, or with fewer than 30 identities among the similar or
            among the dissimilar pairs.
    """

    threshold: float
    far: float
    tar: float
    accuracy: float
    intervals: DecisionIntervals | None = None

    def table(self) -> Table:
        """Each figure with its interval."""
        spans = vars(self.intervals) if self.intervals else {}
        level = f"{100 * self.intervals.level:g}% interval" if self.intervals else "interval"
        names = {"FAR": "far", "TAR": "tar", "accuracy": "accuracy"}
        rows = [
            (name, number(getattr(self, key)), str(spans.get(key, "-")))
            for name, key in names.items()
        ]
        return Table((f"at {self.threshold:.4g}", "value", level), rows)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found: dict[str, Any] = plain(asdict(self))
        return found

    def __str__(self) -> str:
        return self.table().plain()


@over_processes
def fit_threshold(
    scores: ArrayLike,
    similar: ArrayLike,
    *,
    higher_is_closer: bool,
    far: float,
    groups: ArrayLike | None = None,
    average: Average = "pairs",
    group: Group | None = None,
) -> float:
    """The loosest threshold whose false-accept rate on these pairs is at most `far`.

    A pair is accepted as the same if its score is at least as close as the threshold. Of n
    dissimilar pairs, floor(far * n) may be accepted, so the threshold is placed just short of the
    next one: at the nearest float64 number on the stricter side. Dissimilar pairs of equal score
    are accepted or rejected together, so ties never push the rate above `far`.

    Args:
        scores: (n,) distances or similarities of calibration pairs, whose identities are neither
            in the training nor in the test data.
        similar: (n,) bool.
        higher_is_closer: True for similarities, False for distances.
        far: the false-accept rate, 0 or more and below 1.
        groups: (n, 2) or (n,) identities of the pairs; needed for `average="identities"`.
        average: what the rate is averaged over, as in `verification`.
        group: the processes that the pairs are spread over, as in a loss. Their scores are gathered
            on each, and the figures are those of all pairs. None: this one has all.

    Raises:
        ValueError: no similar or no dissimilar pairs, scores that are not finite, wrong shapes.

    >>> d, same = [0.1, 0.2, 0.5, 0.6, 0.7], [True, True, False, False, False]
    >>> round(fit_threshold(d, same, higher_is_closer=False, far=0.0), 6)
    0.5
    >>> round(fit_threshold(d, same, higher_is_closer=False, far=0.34), 6)
    0.6
    """
    check_far(far)
    check_average(average, groups)
    closeness, same, known = checked(scores, similar, higher_is_closer, groups, group)
    tally = tally_of(-closeness, same, known, average)
    place = first_rejected(tally.dissimilar, far * tally.dissimilar.sum())
    threshold = float(np.nextafter(tally.distance[place], -np.inf))
    return -threshold if higher_is_closer else threshold


def check_far(far: float) -> None:
    """Refuse a rate at which no threshold can be fitted."""
    if not 0 <= far < 1:
        raise ValueError(f"far must be a rate, 0 or more and below 1, got {far!r}.")


def warn_of_rate(far: float, n_dissimilar: int, *, stacklevel: int = 2) -> None:
    """Warn of a rate that is less than one of the dissimilar pairs it would be fitted on."""
    if 0 < far * n_dissimilar < 1:
        warnings.warn(
            f"a false-accept rate of {far:g} is less than one of the {n_dissimilar} dissimilar "
            "pairs for calibration, so the threshold accepts none of them. Give more pairs, or "
            "raise far.",
            UserWarning,
            stacklevel=stacklevel + 1,
        )


def check_threshold(threshold: float) -> None:
    """Refuse NaN, which compares with no distance."""
    if np.isnan(threshold):
        raise ValueError("threshold must be a number, got nan; fit_threshold gives one.")


def first_rejected(weights: Floats, allowed: float) -> int:
    """The first place at which more than the allowed weight would be accepted.

    >>> first_rejected(np.ones(100), 0.29 * 100)  # which is 28.999999999999996
    29
    """
    return int(np.searchsorted(np.cumsum(weights), allowed * (1 + 1e-9), side="right"))


@over_processes
def at_threshold(
    scores: ArrayLike,
    similar: ArrayLike,
    threshold: float,
    *,
    higher_is_closer: bool,
    groups: ArrayLike | None = None,
    average: Average = "pairs",
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    group: Group | None = None,
) -> AtThreshold:
    """The figures of a threshold on these pairs.

    Args:
        scores: (n,) distances or similarities.
        similar: (n,) bool.
        threshold: from `fit_threshold` on other identities.
        higher_is_closer: True for similarities, False for distances.
        groups: (n, 2) or (n,) identities of the pairs, for intervals; as in `verification`.
        average: what rates are averaged over, as in `verification`.
        level: confidence level of the intervals.
        resamples: number of resamples in the bootstrap.
        seed: of the bootstrap.
        group: the processes that the pairs are spread over, as in a loss. Their scores are gathered
            on each, and the figures are those of all pairs. None: this one has all.

    >>> found = at_threshold([0.1, 0.4, 0.3, 0.9], [True, True, False, False], 0.35,
    ...                      higher_is_closer=False)
    >>> found
    AtThreshold(threshold=0.35, far=0.5, tar=0.5, accuracy=0.5, intervals=None)
    """
    check_draws(level, resamples)
    check_average(average, groups)
    check_threshold(threshold)
    closeness, same, known = checked(scores, similar, higher_is_closer, groups, group)
    cut = -threshold if higher_is_closer else threshold
    rejected = (-closeness > cut).astype(np.int64)
    tally = tally_at(np.array([cut, np.inf]), rejected, same, known, average)
    return decisions_of(tally, threshold, level=level, resamples=resamples, seed=seed)


def decisions_of(
    tally: Tally, threshold: float, *, level: float, resamples: int, seed: int
) -> AtThreshold:
    """The figures of pairs counted in two steps, accepted and rejected."""

    def figures(false: Floats, true: Floats) -> Floats:
        far, tar = false[:, 0], true[:, 0]
        return np.stack([far, tar, (tar + 1 - far) / 2], 1)

    estimate = figures(*(rate[None] for rate in tally.rates()))[0]
    found = None
    if tally.by_identity is not None and tally.by_identity.n >= FEWEST_IDENTITIES:
        options = {"level": level, "resamples": resamples, "seed": seed}
        spans = intervals(figures, tally, estimate, **options)  # type: ignore[arg-type]
        found = DecisionIntervals(level, tally.by_identity.n, *spans)
    far, tar, accuracy = estimate.tolist()
    return AtThreshold(threshold, far, tar, accuracy, found)
