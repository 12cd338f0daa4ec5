"""What training gained: the figures of the embeddings next to those of the raw input."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nearfar.app.train.measure import MeasuredPairs, RawDistance
from nearfar.evaluate import (
    AtThreshold,
    Difference,
    PlattProbability,
    Reliability,
    Verification,
)
from nearfar.evaluate.intervals import FEWEST_IDENTITIES
from nearfar.evaluate.verification import ERRORS_NEEDED
from nearfar.plain import number
from nearfar.tabulate import Table


@dataclass(frozen=True)
class Thresholds:
    """Thresholds fitted on the same calibration pairs, at the same false-accept rate.

    Attributes:
        learned: threshold for the distance of the embeddings.
        raw: threshold for the distance of the raw input.
        far: the false-accept rate.
        raw_distance: the distance by which the raw input is compared.
    """

    learned: float
    raw: float
    far: float
    raw_distance: RawDistance = "euclidean"


@dataclass(frozen=True)
class Comparison:
    """Figures of the embeddings and of the raw input on the same pairs.

    Attributes:
        n_identities: the number of identities in the pairs.
        learned: figures of the distance of the embeddings.
        raw: figures of the distance of the raw input.
        learned_at: figures of the embeddings at their fitted threshold.
        raw_at: figures of the raw input at its fitted threshold.
        fitted_far: the false-accept rate at which both thresholds were fitted.
        raw_distance: the distance by which the raw input is compared.
        gain: the figures less those of the pretrained network before training, if it is one.
        reliability: whether the probability of "same" holds, for equally many same and different
            pairs; None if the run has none.
    """

    n_identities: int
    learned: Verification
    raw: Verification
    learned_at: AtThreshold
    raw_at: AtThreshold
    fitted_far: float
    raw_distance: RawDistance
    gain: Difference | None
    reliability: Reliability | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "n_identities": self.n_identities,
            "n_similar": self.learned.n_similar,
            "n_dissimilar": self.learned.n_dissimilar,
            "n_identity_pairs": self.learned.n_trials,
            "fitted_far": self.fitted_far,
            "learned": _figures(self.learned, self.learned_at),
            "raw": {"distance": self.raw_distance, **_figures(self.raw, self.raw_at)},
            "gain": self.gain and _gain(self.gain),
            "reliability": self.reliability and self.reliability.as_dict(),
        }

    def render(self) -> list[str | Table]:
        """For a terminal."""
        pairs = (
            f"\n{self.learned.n_similar:,} similar and {self.learned.n_dissimilar:,} dissimilar "
            f"pairs of {self.n_identities:,} identities; "
            f"threshold {self.learned_at.threshold:.4f}, fitted at FAR {self.fitted_far:.3g}"
        )
        notes = [dashes(self), self._gain(), self._probability()]
        return [pairs, table(self), *filter(None, notes)]

    def _gain(self) -> str:
        """What training has added to a pretrained network; empty if it was none."""
        return "" if self.gain is None else "\n" + gained(_gain(self.gain))

    def _probability(self) -> str:
        """How well the probability of "same" holds; empty if the run has none."""
        found = self.reliability
        if found is None:
            return ""
        # Chance alone makes it large where there are few identities.
        error = f"- (needs {FEWEST_IDENTITIES} identities)"
        if self.learned.intervals:
            error = number(found.calibration_error)
        return (
            f'\nprobability of "same", if half of the pairs are: calibration error '
            f"{error}, log loss {found.log_loss:.4f} bits (saying nothing costs 1)"
        )


def fit(calibration: MeasuredPairs, far: float) -> Thresholds:
    """Fit both thresholds on the calibration pairs."""
    learned, raw = (side.fit_threshold(far=far) for side in (calibration.learned, calibration.raw))
    return Thresholds(learned, raw, far, calibration.raw_distance)


def compare(
    test: MeasuredPairs, thresholds: Thresholds, probability: PlattProbability | None
) -> Comparison:
    """All figures of both distances, with intervals if there are enough identities."""
    return Comparison(
        test.n_identities,
        test.learned.verification(),
        test.raw.verification(),
        test.learned.at_threshold(thresholds.learned),
        test.raw.at_threshold(thresholds.raw),
        thresholds.far,
        thresholds.raw_distance,
        None if test.untrained is None else test.learned.difference(test.untrained),
        None if probability is None else test.learned.reliability(probability),
    )


def table(found: Comparison) -> Table:
    """Each figure of the embeddings with its interval, and the same figure of the raw input.

    A dash stands for a figure that would take more identities than there are.
    """
    learned, raw = found.learned, found.raw
    at, raw_at = found.learned_at, found.raw_at
    of, of_at = learned.intervals, at.intervals
    figures = [
        ("AUC", learned.auc, of and of.auc, raw.auc),
        ("EER", learned.eer, of and of.eer, raw.eer),
        *(
            (f"TAR at FAR {far:.3g}", tar, of and of.tar_at_far[far], raw.tar_at_far[far])
            for far, tar in learned.tar_at_far.items()
        ),
        ("FAR at the threshold", at.far, of_at and of_at.far, raw_at.far),
        ("TAR at the threshold", at.tar, of_at and of_at.tar, raw_at.tar),
        ("accuracy at the threshold", at.accuracy, of_at and of_at.accuracy, raw_at.accuracy),
    ]
    rows = [
        (name, number(value), str(span or "-"), number(other))
        for name, value, span, other in figures
    ]
    level = f"{100 * of.level:g}% interval" if of else "interval"
    return Table(("figure", "learned", level, f"raw input, {found.raw_distance}"), rows)


def dashes(found: Comparison) -> str:
    """A line that explains the dashes of `table`; empty if there are none."""
    if found.learned.intervals and None not in found.learned.tar_at_far.values():
        return ""
    return (
        f"-: too few to tell. An interval needs {FEWEST_IDENTITIES} identities among the similar "
        f"and {FEWEST_IDENTITIES} among the dissimilar pairs, a rate at FAR f needs "
        f"{ERRORS_NEEDED} / f pairs of identities."
    )


def _figures(found: Verification, at: AtThreshold) -> Mapping[str, Any]:
    """The figures that do not depend on a threshold chosen on the test pairs themselves."""
    figures = found.as_dict()
    chosen = ("auc", "eer", "tar_at_far", "intervals")
    return {**{name: figures[name] for name in chosen}, "at_threshold": at.as_dict()}


def _gain(gain: Difference) -> dict[str, Any]:
    """The figures before training, and by how much they changed, with intervals."""
    figures = gain.as_dict()
    chosen = ("auc", "eer", "tar_at_far", "intervals")
    before = {name: figures["b"][name] for name in chosen}
    return {"before": before, **{name: figures[name] for name in chosen}}


def gained(gain: Mapping[str, Any]) -> str:
    """What training has added to a pretrained network, in a sentence.

    Args:
        gain: as in the summary of a run.

    >>> figures = {"eer": -0.03, "intervals": {"level": 0.95, "eer": {"low": -0.04, "high": -0.02}}}
    >>> print(gained({"before": {"eer": 0.1}, **figures}))
    training lowered the equal error rate of the pretrained network, 10.00 %, by 3.00 percentage
    points (95 % interval: 2.00 to 4.00)
    """
    change, before, spans = 100 * gain["eer"], 100 * gain["before"]["eer"], gain.get("intervals")
    sign, did = (1, "raised") if change > 0 else (-1, "lowered")
    if abs(change) < 0.005:
        return f"training left the pretrained network's equal error rate as it was, {before:.2f} %"
    words = (
        f"training {did} the equal error rate of the pretrained network, {before:.2f} %, by "
        f"{sign * change:.2f} percentage points"
    )
    if not spans:
        return f"{words}, on too few identities for an interval"
    low, high = sorted(100 * sign * spans["eer"][end] for end in ("low", "high"))
    words += f" ({100 * spans['level']:g} % interval: {low:.2f} to {high:.2f})"
    return f"{words}: it may be chance" if low <= 0 <= high else words
