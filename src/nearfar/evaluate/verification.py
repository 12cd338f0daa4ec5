"""How well a score separates similar from dissimilar pairs, at every threshold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, inf
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nearfar.engine.meeting import Group, over_processes
from nearfar.evaluate.intervals import (
    FEWEST_IDENTITIES,
    FiguresOf,
    Interval,
    check_average,
    check_draws,
    intervals,
)
from nearfar.evaluate.scores import Floats, checked
from nearfar.evaluate.tally import Average, Tally, tally_of
from nearfar.inputs import ArrayLike, rates
from nearfar.plain import number, plain
from nearfar.tabulate import Table

# Doddington's rule of 30: from 30 errors, an error rate is known to within 30 %, 9 times in 10. At
# a false-accept rate f, 30 errors take 30 / f dissimilar pairs.
ERRORS_NEEDED = 30


@dataclass(frozen=True)
class Best:
    """The best value of a figure over all thresholds; optimistic for other pairs.

    Attributes:
        value: the value.
        threshold: a pair is accepted as the same if its score is at least this close.
    """

    value: float
    threshold: float


@dataclass(frozen=True, eq=False)
class Curve:
    """One point for each distinct score, from strict to loose.

    Attributes:
        threshold: (s,) a pair is accepted as the same if its score is at least this close.
        far: (s,) false-accept rate. Plotted with `tar`, it gives the ROC curve.
        tar: (s,) true-accept rate.
        frr: (s,) false-reject rate, 1 - `tar`. Plotted with `far`, it gives the DET curve.
    """

    threshold: Floats
    far: Floats
    tar: Floats
    frr: Floats

    def det(self) -> tuple[Tensor, Tensor]:
        """(p,) normal deviates of `far` and `frr`, the axes of a DET plot, where both are finite.

        Source: Martin et al., "The DET curve in assessment of detection task performance", 1997.
        """
        far, frr = torch.from_numpy(self.far), torch.from_numpy(self.frr)
        inside = (far > 0) & (far < 1) & (frr > 0) & (frr < 1)
        return torch.special.ndtri(far[inside]), torch.special.ndtri(frr[inside])

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: plain(getattr(self, name)) for name in ("threshold", "far", "tar", "frr")}


@dataclass(frozen=True)
class Intervals:
    """Where the figures are likely to lie for other identities.

    Attributes:
        level: confidence level of the intervals.
        n_identities: number of identities among the similar or the dissimilar pairs, whichever is
            smaller.
        auc: interval of the area under the ROC curve.
        eer: interval of the equal error rate.
        tar_at_far: false-accept rate -> interval of the true-accept rate; None if there is no
            figure.
    """

    level: float
    n_identities: int
    auc: Interval
    eer: Interval
    tar_at_far: Mapping[float, Interval | None]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        tar = {far: span and vars(span) for far, span in self.tar_at_far.items()}
        held = {**vars(self), "auc": vars(self.auc), "eer": vars(self.eer), "tar_at_far": tar}
        found: dict[str, Any] = plain(held)
        return found


@dataclass(frozen=True)
class Verification:
    """Figures of a score over labelled pairs, without a fixed threshold.

    Attributes:
        n_similar: number of similar pairs.
        n_dissimilar: number of dissimilar pairs.
        auc: area under the ROC curve: how often a similar pair is closer than a dissimilar one.
        eer: equal error rate, where the false-accept and the false-reject rate are equal.
        tar_at_far: false-accept rate -> true-accept rate at that rate; None if `n_trials` is too
            small for it.
        best_accuracy: the best mean of the true-accept and the true-reject rate.
        best_f1: the best F1 of the similar pairs; it depends on their share of all pairs.
        intervals: None without `groups`, or with fewer than 30 identities among the similar or
            among the dissimilar pairs.
        n_trials: number of dissimilar pairs; or of pairs of identities, if rates are averages over
            those.
        curve: the points of the ROC and the DET curve.
    """

    n_similar: int
    n_dissimilar: int
    auc: float
    eer: float
    tar_at_far: dict[float, float | None]
    best_accuracy: Best
    best_f1: Best
    intervals: Intervals | None = None
    n_trials: int = field(kw_only=True)
    curve: Curve = field(repr=False, compare=False, kw_only=True)

    def table(self) -> Table:
        """Each figure, with its interval or the reason why there is none."""
        known = self.intervals
        level = f"{100 * known.level:g}% interval" if known else "interval"
        rows = [
            ("AUC", number(self.auc), str(known.auc) if known else "-"),
            ("EER", number(self.eer), str(known.eer) if known else "-"),
            *(self._tar_row(far) for far in self.tar_at_far),
            ("best accuracy", number(self.best_accuracy.value), _at(self.best_accuracy)),
            ("best F1", number(self.best_f1.value), _at(self.best_f1)),
        ]
        return Table(("figure", "value", level), rows)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without the curve: see `curve.as_dict()`."""
        held = {name: value for name, value in vars(self).items() if name != "curve"}
        held["dissimilar_needed"] = {far: needed(far) for far in self.tar_at_far}
        for name in ("best_accuracy", "best_f1"):
            held[name] = vars(held[name])
        if self.intervals:
            held["intervals"] = self.intervals.as_dict()
        found: dict[str, Any] = plain(held)
        return found

    def __str__(self) -> str:
        pairs = f"{self.n_similar} similar and {self.n_dissimilar} dissimilar pairs"
        return f"{pairs}\n{self.table().plain()}"

    def _tar_row(self, far: float) -> tuple[str, str, str]:
        name, tar = f"TAR at FAR {far:g}", self.tar_at_far[far]
        if tar is None:
            return name, "-", self.too_few(far)
        span = self.intervals.tar_at_far[far] if self.intervals else None
        return name, number(tar), str(span) if span else "-"

    def too_few(self, far: float) -> str:
        """Why there is no true-accept rate at this false-accept rate."""
        least, trials = needed(far), "dissimilar pairs"
        wants = "more than any number of" if least is None else f"{least:,}"
        if self.n_trials != self.n_dissimilar:
            trials = "pairs of identities"
        return f"too few: needs {wants} {trials}, has {self.n_trials:,}"


def needed(far: float) -> int | None:
    """How many dissimilar trials a false-accept rate takes; None if no number is enough.

    >>> needed(0.001)
    30000
    """
    return None if far <= 0 else ceil(ERRORS_NEEDED / far - 1e-6)


@over_processes
def verification(
    scores: ArrayLike,
    similar: ArrayLike,
    *,
    higher_is_closer: bool,
    far: Sequence[float] = (0.1, 0.01, 0.001),
    groups: ArrayLike | None = None,
    average: Average = "pairs",
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    group: Group | None = None,
) -> Verification:
    """AUC, EER, TAR at each FAR, best accuracy and F1, the curves, and intervals.

    Args:
        scores: (n,) distances or similarities.
        similar: (n,) bool.
        higher_is_closer: True for similarities, False for distances.
        far: false-accept rates at which to give the true-accept rate. It is that of the loosest
            threshold whose false-accept rate on these pairs is at most `far`; nothing is
            interpolated, and pairs of equal score are accepted or rejected together. A rate f takes
            30 / f dissimilar pairs, or pairs of identities if rates are averages over those
            (Doddington's rule of 30); with fewer, the figure is None.
        groups: (n, 2) integers, the two identities of each pair (the same one twice for pairs of
            one identity); or (n,) if a pair has only one. With it, figures have intervals, by
            bootstrap over identities. Pairs that share an identity are not independent; intervals
            that treat them as independent are too narrow, often by half. See
            `nearfar.evaluate.intervals.intervals`.
        average: what rates are averaged over: "pairs"; or "identities", where the pairs of an
            identity have a total weight of 1, and so do those of any two identities, so that an
            identity with many items does not dominate. "identities" needs `groups`.
        level: confidence level of the intervals.
        resamples: number of resamples in the bootstrap.
        seed: of the bootstrap.
        group: the processes that the pairs are spread over, as in a loss. Their scores are gathered
            on each, and the figures are those of all pairs. None: this one has all.

    Raises:
        TypeError: labels that are not bool, identities that are not integers.
        ValueError: no similar or no dissimilar pairs, scores that are not finite, wrong shapes, a
            rate in `far` that is below 0, or 1 or more.

    >>> d, same = [0.1, 0.4, 0.3, 0.9], [True, True, False, False]
    >>> print(verification(d, same, higher_is_closer=False, far=(0.1,)))
    2 similar and 2 dissimilar pairs
    figure          value   interval
    --------------  ------  ------------------------------------------
    AUC             0.7500  -
    EER             0.5000  -
    TAR at FAR 0.1  -       too few: needs 300 dissimilar pairs, has 2
    best accuracy   0.7500  at 0.1
    best F1         0.8000  at 0.4

    Sources: Doddington et al., "The NIST speaker recognition evaluation", 2000; for the intervals
    see `nearfar.evaluate.intervals.intervals`.
    """
    check_draws(level, resamples)
    check_average(average, groups)
    closeness, same, known = checked(scores, similar, higher_is_closer, groups, group)
    tally = tally_of(-closeness, same, known, average)
    sign = -1 if higher_is_closer else 1
    return figures_of(tally, far, level=level, resamples=resamples, seed=seed, sign=sign)


def figures_of(
    tally: Tally, far: Sequence[float], *, level: float, resamples: int, seed: int, sign: int = 1
) -> Verification:
    """The figures of counted pairs; `sign` is -1 if their distances are negated similarities."""
    far = rates("far", far)
    enough = [tally.n_trials >= (needed(f) or inf) for f in far]

    def if_enough(values: Sequence[Any]) -> dict[float, Any]:
        return {f: v if known else None for f, v, known in zip(far, values, enough, strict=True)}

    false, true = tally.rates()
    rows = false[None], true[None]
    estimate = np.stack([_auc(*rows), _eer(*rows), *_tars(*rows, far, between=False)], 1)[0]
    found = None
    if tally.by_identity is not None and tally.by_identity.n >= FEWEST_IDENTITIES:
        options = {"level": level, "resamples": resamples, "seed": seed}
        auc, eer, *tars = intervals(figures_at(far), tally, estimate, **options)  # type: ignore[arg-type]
        found = Intervals(level, tally.by_identity.n, auc, eer, if_enough(tars))
    thresholds = sign * tally.distance
    n_similar, weight = float(tally.similar.sum()), float(tally.dissimilar.sum())
    return Verification(
        tally.n_similar,
        tally.n_dissimilar,
        float(estimate[0]),
        float(estimate[1]),
        if_enough(estimate[2:].tolist()),
        _best((true + 1 - false) / 2, thresholds),
        _best(_f1(false * weight, true * n_similar, n_similar), thresholds),
        found,
        n_trials=tally.n_trials,
        curve=Curve(thresholds, false, true, 1 - true),
    )


def figures_at(far: Sequence[float]) -> FiguresOf:
    """AUC, EER, and TAR at each FAR, of curves."""

    def figures(false: Floats, true: Floats) -> Floats:
        return np.stack([_auc(false, true), _eer(false, true), *_tars(false, true, far)], 1)

    return figures


def _auc(false: Floats, true: Floats) -> Floats:
    """The trapezoids under the curve from (0, 0); a tied pair counts half."""
    wide = np.diff(false, axis=1, prepend=0)
    high = true + np.concatenate([np.zeros_like(true[:, :1]), true[:, :-1]], 1)
    area: Floats = (wide * high).sum(1) / 2
    return area


def _eer(false: Floats, true: Floats) -> Floats:
    """Where the ROC curve, linear between its points, has equal false accepts and false rejects."""
    false, true = (np.pad(rates, ((0, 0), (1, 0))) for rates in (false, true))
    gap = false - (1 - true)  # rises from -1 to 1; NaN where a resample has pairs of one kind only
    after = np.maximum(np.argmax(gap >= 0, axis=1), 1)
    row, before = np.arange(len(gap)), after - 1
    share = -gap[row, before] / (gap[row, after] - gap[row, before])
    rate: Floats = false[row, before] + share * (false[row, after] - false[row, before])
    return rate


def _tars(
    false: Floats, true: Floats, far: Sequence[float], *, between: bool = True
) -> list[Floats]:
    """The true-accept rate at each false-accept rate: on the curve, or linear `between` bins."""
    false, true = (np.pad(rates, ((0, 0), (1, 0))) for rates in (false, true))
    row, found = np.arange(len(true)), []
    for f in far:
        before = (false <= f + 1e-12).sum(1) - 1
        reached = true[row, before]
        if between:
            after = np.minimum(before + 1, true.shape[1] - 1)
            wide = false[row, after] - false[row, before]
            share = np.divide(f - false[row, before], wide, out=np.zeros_like(wide), where=wide > 0)
            reached = reached + share * (true[row, after] - reached)
        found.append(reached)
    return found


def _f1(false_accepts: Floats, true_accepts: Floats, n_similar: float) -> Floats:
    return 2 * true_accepts / (true_accepts + false_accepts + n_similar)


def _best(values: Floats, thresholds: Floats) -> Best:
    """The largest value, and the strictest threshold that reaches it."""
    place = int(np.argmax(values))
    return Best(float(values[place]), float(thresholds[place]))


def _at(best: Best) -> str:
    return f"at {best.threshold:.4g}"
