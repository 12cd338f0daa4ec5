"""What can be wrong with what a loss sees, each rule with its evidence.

A rule reads `Evidence` and returns a `Finding`, or None where all is well. It must stay silent on
healthy data: each has a test for the alarm and one for the false alarm.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf, sqrt
from typing import Any

import torch
from torch import Tensor

from nearfar.distance import largest
from nearfar.observe import Measured


@dataclass(frozen=True)
class Finding:
    """Something wrong: what was seen, in numbers, what it usually means, and what to try."""

    name: str
    seen: str
    means: str
    advice: str

    def __str__(self) -> str:
        return f"{self.name}: {self.seen} {self.means} {self.advice}"


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a rule may look at.

    Attributes:
        measured: what the loss measured, by role.
        forces: for each of `measured`, the force on it: > 0 pulls together, < 0 pushes apart.
        per_row: (n,) the losses.
        active: (n,) bool, whether any force acts in the row.
        hyperparameters: what the loss was called with.
        row_lengths: (n,) lengths of the embeddings, where there are embeddings.
    """

    measured: Mapping[str, Measured]
    forces: Mapping[str, Tensor]
    per_row: Tensor
    active: Tensor
    hyperparameters: Mapping[str, Any]
    row_lengths: Tensor | None

    def similar_and_not(self) -> tuple[Tensor, Tensor]:
        """How far apart the similar and the dissimilar rows are (similarities negated), flat."""
        if "pair" in self.measured:
            pair = self.measured["pair"]
            assert pair.similar is not None
            similar = pair.similar if pair.similar.dtype is torch.bool else pair.similar >= 0.5
            return pair.values[similar], pair.values[~similar]
        sign = 1 if self.measured["positive"].closeness == "distance" else -1
        near, far = (sign * self.measured[role].values for role in ("positive", "negative"))
        return near, far[far < inf]

    def margin(self) -> float | None:
        margin = self.hyperparameters.get("margin")
        return None if margin is None else float(margin)


def not_a_number(evidence: Evidence) -> Finding | None:
    bad = evidence.per_row.isnan()
    if not bad.any():
        return None
    rows = ", ".join(str(int(row)) for row in bad.nonzero()[:5])
    return Finding(
        "not a number",
        f"The loss of {int(bad.sum())} of {len(bad)} rows is NaN (row {rows}).",
        "Their embeddings hold NaN or infinity: for finite ones no loss here is NaN.",
        "Look for these rows in the data and in the encoder's output.",
    )


def nothing_active(evidence: Evidence) -> Finding | None:
    if not len(evidence.active) or evidence.active.any() or evidence.per_row.isnan().any():
        return None
    return Finding(
        "nothing is learned",
        f"No force acts in any of {len(evidence.active)} rows: every gradient is 0.",
        "Similar rows coincide and dissimilar ones lie beyond the margin, or no row can move.",
        _way_out(evidence),
    )


def _way_out(evidence: Evidence) -> str:
    """The smallest margin that would make one row active."""
    margin = evidence.margin()
    if margin is None:
        return "Use harder negatives, or a larger temperature."
    if "pair" in evidence.measured:
        _, apart = evidence.similar_and_not()
        apart = apart[apart > 0]  # at distance 0 no margin gives a direction
    else:
        near, far = (evidence.measured[role].values for role in ("positive", "negative"))
        apart = far - near
    if not len(apart):
        return "Add dissimilar rows that differ: there is none a margin could act on."
    least = float(apart.min())
    if evidence.hyperparameters["loss"] == "cosine_loss":
        return f"A margin below {1 - least:.4g} would activate the closest dissimilar row."
    return f"A margin above {least:.4g} would activate the closest dissimilar row."


def flipped_labels(evidence: Evidence) -> Finding | None:
    similar, dissimilar = evidence.similar_and_not()
    n1, n2 = len(similar), len(dissimilar)
    if min(n1, n2) < 2 or not (similar.isfinite().all() and dissimilar.isfinite().all()):
        return None
    # Mann-Whitney: the share of (similar, dissimilar) rows where the similar one is the farther.
    ordered = dissimilar.sort().values
    below = torch.searchsorted(ordered, similar, right=False).double()
    not_above = torch.searchsorted(ordered, similar, right=True).double()
    share = float((below + not_above).sum()) / (2 * n1 * n2)
    surprise = (share - 0.5) / sqrt((n1 + n2 + 1) / (12 * n1 * n2))
    if share < 1 and (surprise < 3 or share < 0.6):
        return None
    return Finding(
        "labels look flipped",
        f"Similar rows are farther apart than dissimilar ones in {share:.0%} of comparisons "
        f"(median {_shown(evidence, similar)} against {_shown(evidence, dissimilar)}).",
        "Usually 0 and 1 are read the wrong way round, or two columns are swapped.",
        "Check what marks a similar pair, and similar_label."
        if "pair" in evidence.measured
        else "Check which argument is the positive.",
    )


def _shown(evidence: Evidence, apart: Tensor) -> str:
    measure = next(iter(evidence.measured.values()))
    sign = 1 if measure.closeness == "distance" else -1
    return f"{measure.closeness} {float(sign * apart.median()):.4g}"


def unreachable_margin(evidence: Evidence) -> Finding | None:
    margin, distance = evidence.margin(), evidence.hyperparameters.get("distance")
    if margin is None or distance is None:
        return None
    reach, why = largest(distance), f"{distance} distance never exceeds 2"
    if distance != "cosine" and _all_of_length_one(evidence.row_lengths):
        reach = 2.0 if distance == "euclidean" else 4.0
        why = f"all rows have length 1, where {distance} distance never exceeds {reach:g}"
    if margin <= reach:
        return None
    return Finding(
        "margin out of reach",
        f"The margin is {margin:g}, but {why}.",
        "No dissimilar row can ever be far enough apart, so the loss cannot reach 0.",
        f"Use a margin below {reach:g}.",
    )


def _all_of_length_one(lengths: Tensor | None) -> bool:
    return lengths is not None and len(lengths) > 0 and bool(((lengths - 1).abs() < 1e-3).all())


def collapsed(evidence: Evidence) -> Finding | None:
    _, dissimilar = evidence.similar_and_not()
    measure = next(iter(evidence.measured.values()))
    if len(dissimilar) < 2 or measure.closeness == "logit" or not dissimilar.isfinite().all():
        return None
    apart, scale = float(dissimilar.median()), _scale(evidence)
    if measure.closeness == "similarity":
        # Cosines, or products of embeddings of this length: 1 - cos.
        apart = 1 + apart / scale**2
    else:
        power = {"euclidean": 1, "sqeuclidean": 2, "cosine": 0}
        apart /= scale ** power[evidence.hyperparameters.get("distance", "cosine")]
    threshold = 0.01 if evidence.hyperparameters.get("distance") == "euclidean" else 1e-4
    if apart > threshold:
        return None
    return Finding(
        "collapsed rows",
        f"Half of the dissimilar rows lie within {max(apart, 0):.2g} of their own length.",
        "The encoder gives nearly the same embedding to everything.",
        "Lower the learning rate, check the input's scaling, or add harder or more negatives.",
    )


def _scale(evidence: Evidence) -> float:
    """The typical length of an embedding; where there are only distances, the margin."""
    if evidence.row_lengths is None:
        return evidence.margin() or 1.0
    normalized = evidence.hyperparameters.get("normalize", False)
    return 1.0 if normalized else max(float(evidence.row_lengths.median()), 1e-30)


def one_kind_only(evidence: Evidence) -> Finding | None:
    similar, dissimilar = evidence.similar_and_not()
    if (len(similar) and len(dissimilar)) or len(evidence.per_row) < 2:
        return None
    if not len(dissimilar):
        means = "With nothing to push apart, the loss is smallest when every row is the same."
        return Finding("no dissimilar rows", "Every row is similar.", means, "Add dissimilar rows.")
    means = "With nothing to pull together, the loss only spreads the rows out."
    return Finding("no similar rows", "Every row is dissimilar.", means, "Add similar rows.")


def sharp_softmax(evidence: Evidence) -> Finding | None:
    push = evidence.forces.get("negative")
    if push is None or push.ndim != 2 or "temperature" not in evidence.hyperparameters:
        return None
    others = (evidence.measured["negative"].values > -inf).sum(1)
    total = -push.sum(1)
    contested = (evidence.per_row > 0.05) & (others >= 8)  # elsewhere there is nothing to share
    if int(contested.sum()) < 8:
        return None
    held = float((-push.min(1).values[contested] / total[contested]).median())
    if held < 0.99:
        return None
    temperature = float(evidence.hyperparameters["temperature"])
    return Finding(
        "temperature too low",
        f"In half of the rows one negative holds {held:.1%} of the push "
        f"(temperature {temperature:g}, {int(others.median())} negatives).",
        "The loss sees only the nearest negative, which in noisy data is often a false one.",
        "Raise the temperature; 0.05 to 0.2 is usual for cosines.",
    )


RULES: tuple[Callable[[Evidence], Finding | None], ...] = (
    not_a_number,
    nothing_active,
    flipped_labels,
    unreachable_margin,
    collapsed,
    one_kind_only,
    sharp_softmax,
)


def findings(evidence: Evidence) -> tuple[Finding, ...]:
    """What every rule has to say, in order of importance."""
    return tuple(found for rule in RULES if (found := rule(evidence)) is not None)
