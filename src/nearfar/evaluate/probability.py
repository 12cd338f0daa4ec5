"""The probability that two items are the same, from their distance."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nearfar.engine.meeting import Group, over_processes
from nearfar.evaluate.scores import Bools, Floats, as_floats, checked
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
        at_share = torch.from_numpy(np.interp(as_floats("scores", scores), self.knots, self.values))
        return torch.sigmoid(torch.logit(at_share) + _shift(self.share, self.prior))

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
    group: Group | None = None,
) -> PlattProbability:
    r"""Fit the probability of "same" as a logistic curve over the score.

    .. math:: P = \sigma(a s + b + \mathrm{logit}\,\pi - \mathrm{logit}\,\pi_0)

    where :math:`\pi_0` is the share of similar pairs in the calibration data and :math:`\pi` the
    prior. Better than `isotonic_probability` with few pairs, or if the curve should be smooth. The
    targets are Platt's, :math:`(N_+ + 1) / (N_+ + 2)` and :math:`1 / (N_- + 2)`, so the slope stays
    finite even if a threshold separates the pairs without error.

    Args:
        scores: (n,) distances or similarities of calibration pairs, not used in training.
        similar: (n,) bool.
        higher_is_closer: True for similarities, False for distances.
        prior: the share of similar pairs in use, between 0 and 1. None: the share in the
            calibration data, which for sampled pairs is far too high for most uses.
        group: the processes that the pairs are spread over, as in a loss; the curve is fitted to
            the pairs of all, on each. None: this one has all.

    Raises:
        TypeError: labels that are not bool.
        ValueError: no similar or no dissimilar pairs, scores that are not finite, wrong shapes, a
            prior out of range; scores that are closer for dissimilar pairs, to which no such curve
            can be fitted.

    >>> d, same = [0.1, 0.2, 0.6, 0.4, 0.7, 0.9], [True, True, True, False, False, False]
    >>> platt_probability(d, same, higher_is_closer=False)([0.1, 0.5, 0.9]).round(decimals=3)
    tensor([0.7660, 0.4870, 0.2150], dtype=torch.float64)

    Source: Platt, "Probabilistic outputs for support vector machines", 1999; the shift for another
    prior: Saerens, Latinne & Decaestecker, 2002. Fitted by scikit-learn's LogisticRegression.
    """
    from sklearn.linear_model import LogisticRegression

    closeness, same, _ = checked(scores, similar, higher_is_closer, group=group)
    share, low, high = _targets(same)
    prior = share if prior is None else prior
    # Each pair is in both classes, weighted by its target.
    target = np.where(same, high, low)
    centre, scale = closeness.mean(), closeness.std() or 1.0
    x = np.tile((closeness - centre) / scale, 2)[:, None]
    y = np.repeat([True, False], len(same))
    model = LogisticRegression(C=np.inf).fit(x, y, np.concatenate([target, 1 - target]))
    steep = float(model.coef_[0, 0])
    if steep < 0:
        raise ValueError(
            "Similar pairs are farther apart than dissimilar ones, so no threshold separates them. "
            f"Check the labels, and higher_is_closer={higher_is_closer}."
        )
    sign = 1 if higher_is_closer else -1
    intercept = float(model.intercept_[0] - steep * centre / scale)
    return PlattProbability(sign * steep / float(scale), intercept, share, prior)


@over_processes
def isotonic_probability(
    scores: ArrayLike,
    similar: ArrayLike,
    *,
    higher_is_closer: bool,
    prior: float | None = None,
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

    closeness, same, _ = checked(scores, similar, higher_is_closer, group=group)
    share, low, high = _targets(same)
    prior = share if prior is None else prior
    model = IsotonicRegression(y_min=low, y_max=high).fit(closeness, same.astype(float))
    knots: Floats = model.X_thresholds_
    values: Floats = model.y_thresholds_
    if not higher_is_closer:
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


def _targets(same: Bools) -> tuple[float, float, float]:
    """The share of similar pairs, and Platt's targets for dissimilar and for similar pairs."""
    n_similar, n_dissimilar = int(same.sum()), int((~same).sum())
    return float(same.mean()), 1 / (n_dissimilar + 2), (n_similar + 1) / (n_similar + 2)


def _check_shares(share: float, prior: float) -> None:
    between("share", share, 1e-12, 1 - 1e-12, ", that of similar calibration pairs")
    between("prior", prior, 1e-12, 1 - 1e-12, ", the share of similar pairs")


def _shift(share: float, prior: float) -> float:
    """The change of the log-odds due to a different share of similar pairs."""
    return float(np.log(prior / (1 - prior)) - np.log(share / (1 - share)))
