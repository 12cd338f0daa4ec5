"""From a distance to the probability that two items are the same."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nearfar.evaluate.plain import plain
from nearfar.evaluate.scores import Bools, Floats, as_floats, checked
from nearfar.inputs import ArrayLike, between


@dataclass(frozen=True)
class PlattProbability:
    """The logistic curve through calibration pairs; call it on scores.

    Attributes:
        slope: of the log-odds over the score.
        intercept: the log-odds at score 0.
        share: of the similar pairs among the calibration pairs.
        prior: the share of similar pairs that the probability holds at.
    """

    slope: float
    intercept: float
    share: float
    prior: float

    def __post_init__(self) -> None:
        _check_shares(self.share, self.prior)

    def __call__(self, scores: ArrayLike) -> Tensor:
        """(n,) float64 probabilities of "same"."""
        log_odds = self.slope * torch.from_numpy(as_floats("scores", scores)) + self.intercept
        return torch.sigmoid(log_odds + _shift(self.share, self.prior))

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `PlattProbability(**plain)` reads it back."""
        found: dict[str, Any] = plain(vars(self))
        return found


@dataclass(frozen=True)
class IsotonicProbability:
    """The monotone curve through calibration pairs, straight between its knots; call it on scores.

    Attributes:
        knots: scores, rising. Beyond the first and the last the probability stays as it is there.
        values: the probability at each, at `share`.
        share: of the similar pairs among the calibration pairs.
        prior: the share of similar pairs that the probability holds at.
    """

    knots: tuple[float, ...]
    values: tuple[float, ...]
    share: float
    prior: float

    def __post_init__(self) -> None:
        _check_shares(self.share, self.prior)

    def __call__(self, scores: ArrayLike) -> Tensor:
        """(n,) float64 probabilities of "same"."""
        at_share = torch.from_numpy(np.interp(as_floats("scores", scores), self.knots, self.values))
        return torch.sigmoid(torch.logit(at_share) + _shift(self.share, self.prior))

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `IsotonicProbability(**plain)` reads it back."""
        found: dict[str, Any] = plain(vars(self))
        return found


def platt_probability(
    scores: ArrayLike, similar: ArrayLike, *, higher_is_closer: bool, prior: float | None = None
) -> PlattProbability:
    r"""The probability of "same" as a logistic curve over the score.

    .. math:: P = \sigma(a s + b + \mathrm{logit}\,\pi - \mathrm{logit}\,\pi_0)

    where :math:`\pi_0` is the share of similar pairs in the calibration data and :math:`\pi` the
    prior. With few pairs, or where the curve should not follow every bend of them, better than
    `isotonic_probability`. The targets are Platt's, :math:`(N_+ + 1) / (N_+ + 2)` and
    :math:`1 / (N_- + 2)`, so that pairs that a threshold tells apart without error leave the slope
    finite.

    Args:
        scores: (n,) distances or similarities of calibration pairs, not used in training.
        similar: (n,) bool.
        higher_is_closer: True for similarities, False for distances.
        prior: the share of similar pairs where it will be used, between 0 and 1. None: that of the
            calibration data, which sampled pairs make far too high for most uses.

    Raises:
        TypeError: labels that are not bool.
        ValueError: no similar or no dissimilar pairs, scores that are not finite, wrong shapes, a
            prior out of range; scores that are closer for dissimilar pairs, which no such curve
            fits.

    >>> d, same = [0.1, 0.2, 0.6, 0.4, 0.7, 0.9], [True, True, True, False, False, False]
    >>> platt_probability(d, same, higher_is_closer=False)([0.1, 0.5, 0.9]).round(decimals=3)
    tensor([0.7660, 0.4870, 0.2150], dtype=torch.float64)

    Source: Platt, "Probabilistic outputs for support vector machines", 1999; the shift for another
    prior: Saerens, Latinne & Decaestecker, 2002. Fitted by scikit-learn's LogisticRegression.
    """
    from sklearn.linear_model import LogisticRegression

    closeness, same = checked(scores, similar, higher_is_closer)
    share, low, high = _targets(same)
    prior = share if prior is None else prior
    # Each pair stands in both classes, weighted by its target.
    target = np.where(same, high, low)
    centre, scale = closeness.mean(), closeness.std() or 1.0
    x = np.tile((closeness - centre) / scale, 2)[:, None]
    y = np.repeat([True, False], len(same))
    model = LogisticRegression(C=np.inf).fit(x, y, np.concatenate([target, 1 - target]))
    steep = float(model.coef_[0, 0])
    if steep < 0:
        raise ValueError(
            "Similar pairs are farther apart than dissimilar ones, so no threshold tells them "
            f"apart. Check the labels, and higher_is_closer={higher_is_closer}."
        )
    sign = 1 if higher_is_closer else -1
    intercept = float(model.intercept_[0] - steep * centre / scale)
    return PlattProbability(sign * steep / float(scale), intercept, share, prior)


def isotonic_probability(
    scores: ArrayLike, similar: ArrayLike, *, higher_is_closer: bool, prior: float | None = None
) -> IsotonicProbability:
    r"""The probability of "same" as a monotone curve over the score.

    Of all curves that never fall as pairs get closer the one nearest to the labels. It follows any
    shape, and wants about a thousand pairs. It stays between Platt's targets,
    :math:`1 / (N_- + 2)` and :math:`(N_+ + 1) / (N_+ + 2)`, since a finite sample makes nothing
    certain.

    Args:
        scores: (n,) distances or similarities of calibration pairs, not used in training.
        similar: (n,) bool.
        higher_is_closer: True for similarities, False for distances.
        prior: the share of similar pairs where it will be used, between 0 and 1. None: that of the
            calibration data, which sampled pairs make far too high for most uses.

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

    closeness, same = checked(scores, similar, higher_is_closer)
    share, low, high = _targets(same)
    prior = share if prior is None else prior
    model = IsotonicRegression(y_min=low, y_max=high).fit(closeness, same.astype(float))
    knots: Floats = model.X_thresholds_
    values: Floats = model.y_thresholds_
    if not higher_is_closer:
        knots, values = -knots[::-1], values[::-1]
    return IsotonicProbability(tuple(knots.tolist()), tuple(values.tolist()), share, prior)


def probability_from(plain: Mapping[str, Any]) -> PlattProbability | IsotonicProbability:
    """What `as_dict` of either wrote.

    >>> probability_from({"slope": -2.0, "intercept": 1.0, "share": 0.5, "prior": 0.5})([0.5])
    tensor([0.5000], dtype=torch.float64)
    """
    if "knots" not in plain:
        return PlattProbability(**plain)
    return IsotonicProbability(
        tuple(plain["knots"]), tuple(plain["values"]), plain["share"], plain["prior"]
    )


def _targets(same: Bools) -> tuple[float, float, float]:
    """The share of similar pairs, and the probabilities nearest to 0 and 1 that they can show."""
    n_similar, n_dissimilar = int(same.sum()), int((~same).sum())
    return float(same.mean()), 1 / (n_dissimilar + 2), (n_similar + 1) / (n_similar + 2)


def _check_shares(share: float, prior: float) -> None:
    between("share", share, 1e-12, 1 - 1e-12, ", that of similar calibration pairs")
    between("prior", prior, 1e-12, 1 - 1e-12, ", the share of similar pairs")


def _shift(share: float, prior: float) -> float:
    """What another share of similar pairs adds to the log-odds."""
    return float(np.log(prior / (1 - prior)) - np.log(share / (1 - share)))
