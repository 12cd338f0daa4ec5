"""The probability that two items are the same, from their distance."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nearfar.engine.meeting import Group, over_processes
from nearfar.evaluate.intervals import check_average
from nearfar.evaluate.scores import Floats, as_floats, checked
from nearfar.evaluate.tally import Average, Tally, tally_of
from nearfar.inputs import ArrayLike, between
from nearfar.plain import plain


@dataclass(frozen=True)
class PlattProbability:
    """A logistic curve fitted to calibration pairs; call it on scores.

    Attributes:
        slope: slope of the log-odds over the score.
        intercept: the log-odds at score 0.
        share: the share of similar pairs among the calibration pairs.
        prior: the share of similar pairs for which the probability holds.
        low: the smallest probability, for the share of similar pairs in `share`.
        high: the largest one.
    """

    slope: float
    intercept: float
    share: float
    prior: float
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        _check_shares(self.share, self.prior)

    def __call__(self, scores: ArrayLike) -> Tensor:
        """(n,) float64 probabilities of "same"."""
        return torch.sigmoid(self._log_odds(scores) + _shift(self.share, self.prior))

    def likelihood_ratio(self, scores: ArrayLike) -> Tensor:
        """(n,) float64, how many times as likely a score is for similar as for dissimilar pairs."""
        return (self._log_odds(scores) - _logit(self.share)).exp()

    @property
    def limits(self) -> tuple[float, float]:
        """The smallest and the largest likelihood ratio."""
        least, most = (exp(_logit(end) - _logit(self.share)) for end in (self.low, self.high))
        return least, most

    def _log_odds(self, scores: ArrayLike) -> Tensor:
        """(n,) for the share of similar pairs in `share`."""
        line = self.slope * torch.from_numpy(as_floats("scores", scores)) + self.intercept
        return line.clamp(_logit(self.low), _logit(self.high))

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `PlattProbability(**plain)` reads it back."""
        found: dict[str, Any] = plain(vars(self))
        return found


@dataclass(frozen=True)
class IsotonicProbability:
    """A monotone curve fitted to calibration pairs, linear between its knots; call it on scores.

    Attributes:
        knots: increasing scores. Outside of the first and the last, the probability is constant.
        values: the probability at each knot, for the share of similar pairs in `share`.
        share: the share of similar pairs among the calibration pairs.
        prior: the share of similar pairs for which the probability holds.
    """

    knots: tuple[float, ...]
    values: tuple[float, ...]
    share: float
    prior: float

    def __post_init__(self) -> None:
        _check_shares(self.share, self.prior)

    def __call__(self, scores: ArrayLike) -> Tensor:
        """(n,) float64 probabilities of "same"."""
        return torch.sigmoid(self._log_odds(scores) + _shift(self.share, self.prior))

    def likelihood_ratio(self, scores: ArrayLike) -> Tensor:
        """(n,) float64, how many times as likely a score is for similar as for dissimilar pairs."""
        return (self._log_odds(scores) - _logit(self.share)).exp()

    def _log_odds(self, scores: ArrayLike) -> Tensor:
        """(n,) for the share of similar pairs in `share`."""
        at_share = np.interp(as_floats("scores", scores), self.knots, self.values)
        return torch.logit(torch.from_numpy(at_share))

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `IsotonicProbability(**plain)` reads it back."""
        found: dict[str, Any] = plain(vars(self))
        return found


@over_processes
def platt_probability(
    scores: ArrayLike,
    similar: ArrayLike,
    *,
    higher_is_closer: bool,
    prior: float | None = None,
    groups: ArrayLike | None = None,
    average: Average = "pairs",
    group: Group | None = None,
) -> PlattProbability:
    r"""Fit the probability of "same" as a logistic curve over the score.

    .. math:: P = \sigma(a s + b + \mathrm{logit}\,\pi - \mathrm{logit}\,\pi_0)

    where :math:`\pi_0` is the share of similar pairs in the calibration data and :math:`\pi` the
    prior. Better than `isotonic_probability` with few pairs, or if the curve should be smooth. The
    targets are Platt's, :math:`(N_+ + 1) / (N_+ + 2)` and :math:`1 / (N_- + 2)`, so the slope stays
    finite even if a threshold separates the pairs without error. Before the prior is applied, the
    probability stays between them, since no finite sample makes anything certain: a distance is
    at most about :math:`N_-` times as likely for similar pairs as for dissimilar ones, and at least
    :math:`1 / N_+` times.

    Args:
        scores: (n,) distances or similarities of calibration pairs, not used in training.
        similar: (n,) bool.
        higher_is_closer: True for similarities, False for distances.
        prior: the share of similar pairs in use, between 0 and 1. None: the share in the
            calibration data, which for sampled pairs is far too high for most uses.
        groups: (n, 2) or (n,) identities of the pairs; needed for `average="identities"`.
        average: what counts the same: each of the "pairs"; or each of the "identities", and each
            two of them, as in `verification`. :math:`N_+` and :math:`N_-` count those too.
        group: the processes that the pairs are spread over, as in a loss; the curve is fitted to
            the pairs of all, on each. None: this one has all.

    Raises:
        TypeError: labels that are not bool.
        ValueError: no similar or no dissimilar pairs, scores that are not finite, wrong shapes, a
            prior out of range; scores that are closer for dissimilar pairs, to which no such curve
            can be fitted.

    >>> d, same = [0.1, 0.2, 0.6, 0.4, 0.7, 0.9], [True, True, True, False, False, False]
    >>> fitted = platt_probability(d, same, higher_is_closer=False)
    >>> fitted([0.1, 0.5, 0.9]).round(decimals=3)
    tensor([0.7660, 0.4870, 0.2150], dtype=torch.float64)
    >>> fitted.likelihood_ratio([0.1, 0.5, 0.9]).round(decimals=3)
    tensor([3.2780, 0.9490, 0.2750], dtype=torch.float64)

    Source: Platt, "Probabilistic outputs for support vector machines", 1999; the shift for another
    prior: Saerens, Latinne & Decaestecker, 2002. Fitted by scikit-learn's LogisticRegression.
    """
    tally = tally_of_scores(scores, similar, higher_is_closer, groups, average, group)
    slope, intercept = _line(tally)
    if slope > 0:
        raise ValueError(
            "Similar pairs are farther apart than dissimilar ones, so no threshold separates them. "
            f"Check the labels, and higher_is_closer={higher_is_closer}."
        )
    share, low, high = _targets(tally)
    prior = share if prior is None else prior
    sign = -1 if higher_is_closer else 1
    return PlattProbability(sign * slope, intercept, share, prior, low, high)


def platt_of(tally: Tally, prior: float) -> PlattProbability:
    """The logistic curve of counted pairs, over their distance.

    If similar pairs are farther apart than dissimilar ones, no distance tells anything: all have
    the same probability.
    """
    share, low, high = _targets(tally)
    slope, intercept = _line(tally)
    if slope > 0:
        slope, intercept = 0.0, _logit(share)
    return PlattProbability(slope, intercept, share, prior, low, high)


@over_processes
def isotonic_probability(
    scores: ArrayLike,
    similar: ArrayLike,
    *,
    higher_is_closer: bool,
    prior: float | None = None,
    groups: ArrayLike | None = None,
    average: Average = "pairs",
    group: Group | None = None,
) -> IsotonicProbability:
    r"""Fit the probability of "same" as a monotone curve over the score.

    Of all curves that never fall as pairs get closer, this is the one nearest to the labels. It
    follows any shape, and needs about a thousand pairs. It stays between Platt's targets,
    :math:`1 / (N_- + 2)` and :math:`(N_+ + 1) / (N_+ + 2)`, since no finite sample makes anything
    certain.

    Args:
        scores: (n,) distances or similarities of calibration pairs, not used in training.
        similar: (n,) bool.
        higher_is_closer: True for similarities, False for distances.
        prior: the share of similar pairs in use, between 0 and 1. None: the share in the
            calibration data, which for sampled pairs is far too high for most uses.
        groups: (n, 2) or (n,) identities of the pairs; needed for `average="identities"`.
        average: what counts the same, as in `platt_probability`.
        group: the processes that the pairs are spread over, as in a loss; the curve is fitted to
            the pairs of all, on each. None: this one has all.

    Raises:
        TypeError: labels that are not bool.
        ValueError: no similar or no dissimilar pairs, scores that are not finite, wrong shapes, a
            prior out of range.

    >>> d, same = [0.1, 0.2, 0.6, 0.4, 0.7, 0.9], [True, True, True, False, False, False]
    >>> isotonic_probability(d, same, higher_is_closer=False)([0.1, 0.5, 0.9])
    tensor([0.8000, 0.5000, 0.2000], dtype=torch.float64)

    Source: Zadrozny & Elkan, "Transforming classifier scores into accurate multiclass probability
    estimates", 2002; the shift for another prior: Saerens, Latinne & Decaestecker, 2002. Fitted by
    scikit-learn's IsotonicRegression.
    """
    from sklearn.isotonic import IsotonicRegression

    tally = tally_of_scores(scores, similar, higher_is_closer, groups, average, group)
    share, low, high = _targets(tally)
    prior = share if prior is None else prior
    weight = tally.similar + tally.dissimilar
    model = IsotonicRegression(y_min=low, y_max=high, increasing=False)
    model.fit(tally.distance, tally.similar / weight, weight)
    knots: Floats = model.X_thresholds_
    values: Floats = model.y_thresholds_
    if higher_is_closer:
        knots, values = -knots[::-1], values[::-1]
    return IsotonicProbability(tuple(knots.tolist()), tuple(values.tolist()), share, prior)


def probability_from(plain: Mapping[str, Any]) -> PlattProbability | IsotonicProbability:
    """The probability that was saved by `as_dict` of either class.

    >>> probability_from({"slope": -2.0, "intercept": 1.0, "share": 0.5, "prior": 0.5})([0.5])
    tensor([0.5000], dtype=torch.float64)
    """
    if "knots" not in plain:
        return PlattProbability(**plain)
    return IsotonicProbability(
        tuple(plain["knots"]), tuple(plain["values"]), plain["share"], plain["prior"]
    )


def tally_of_scores(
    scores: ArrayLike,
    similar: ArrayLike,
    higher_is_closer: bool,
    groups: ArrayLike | None,
    average: Average,
    group: Group | None,
) -> Tally:
    """The calibration pairs, counted; similarities are negated."""
    check_average(average, groups)
    closeness, same, known = checked(scores, similar, higher_is_closer, groups, group)
    return tally_of(-closeness, same, known, average)


def _line(tally: Tally) -> tuple[float, float]:
    """Slope and intercept of the log-odds over the distance."""
    from sklearn.linear_model import LogisticRegression

    _, low, high = _targets(tally)
    # Each pair is in both classes, weighted by its target.
    as_similar = high * tally.similar + low * tally.dissimilar
    weight = tally.similar + tally.dissimilar
    centre = np.average(tally.distance, weights=weight)
    scale = np.average((tally.distance - centre) ** 2, weights=weight) ** 0.5 or 1.0
    x = np.tile((tally.distance - centre) / scale, 2)[:, None]
    y = np.repeat([True, False], len(weight))
    model = LogisticRegression(C=np.inf, tol=1e-9).fit(
        x, y, np.concatenate([as_similar, weight - as_similar])
    )
    slope = float(model.coef_[0, 0] / scale)
    return slope, float(model.intercept_[0] - slope * centre)


def _targets(tally: Tally) -> tuple[float, float, float]:
    """The share of similar pairs, and Platt's targets for dissimilar and for similar pairs."""
    n_similar, n_dissimilar = float(tally.similar.sum()), float(tally.dissimilar.sum())
    share = n_similar / (n_similar + n_dissimilar)
    return share, 1 / (n_dissimilar + 2), (n_similar + 1) / (n_similar + 2)


def _check_shares(share: float, prior: float) -> None:
    between("share", share, 1e-12, 1 - 1e-12, ", that of similar calibration pairs")
    between("prior", prior, 1e-12, 1 - 1e-12, ", the share of similar pairs")


def _shift(share: float, prior: float) -> float:
    """The change of the log-odds due to a different share of similar pairs."""
    return _logit(prior) - _logit(share)


def _logit(probability: float) -> float:
    return float(torch.logit(torch.tensor(probability, dtype=torch.float64)))
