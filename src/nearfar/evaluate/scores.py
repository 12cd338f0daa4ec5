"""Scores of labelled pairs as every figure wants them, and in the order from close to far."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from nearfar.inputs import ArrayLike, tensor

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Ranking:
    """Pairs from the closest to the farthest; pairs of equal score make one step.

    Attributes:
        order: (n,) int64, which pair is at each place.
        similar: (n,) bool, whether that pair is similar.
        ends: (s,) int64, the place of the last pair of each step.
        closeness: (s,) the score of each step, higher = closer.
    """

    order: Integers
    similar: Bools
    ends: Integers
    closeness: Floats

    def rates(self, weights: Floats) -> tuple[Floats, Floats]:
        """False-accept and true-accept rate with a threshold at each step, for b sets of weights.

        Args:
            weights: (b, n) of the pairs in the order of this ranking.

        Returns:
            (b, s) both; NaN where the pairs of one kind weigh nothing.
        """
        accepted = np.cumsum(weights, 1)[:, self.ends]
        true = np.cumsum(weights * self.similar, 1)[:, self.ends]
        false = accepted - true
        with np.errstate(invalid="ignore"):
            return false / false[:, -1:], true / true[:, -1:]


def ranking(closeness: Floats, similar: Bools) -> Ranking:
    """The order from close to far.

    >>> found = ranking(np.array([0.5, 0.9, 0.5]), np.array([True, False, False]))
    >>> found.order.tolist(), found.ends.tolist(), found.closeness.tolist()
    ([1, 0, 2], [0, 2], [0.9, 0.5])
    """
    order = np.argsort(-closeness, kind="stable")
    ordered = closeness[order]
    ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
    return Ranking(order, similar[order], ends, ordered[ends])


def checked(scores: ArrayLike, similar: ArrayLike, higher_is_closer: bool) -> tuple[Floats, Bools]:
    """Closeness, higher = closer, and labels.

    Raises:
        TypeError: labels that are not bool.
        ValueError: no similar or no dissimilar pairs, scores that are not finite, wrong shapes.
    """
    values, same = as_floats("scores", scores), tensor("similar", similar).cpu().numpy()
    if same.dtype != bool:
        raise TypeError(f"similar must be bool, True = similar; got {same.dtype}.")
    if values.ndim != 1 or same.shape != values.shape:
        raise ValueError(
            f"scores and similar must have one shape (n,), got {values.shape} and {same.shape}."
        )
    if not np.isfinite(values).all():
        raise ValueError(f"scores[{int((~np.isfinite(values)).argmax())}] is not finite.")
    if same.all() or not same.any():
        raise ValueError("similar must hold both True and False; rates need pairs of both kinds.")
    return (values if higher_is_closer else -values), same


def as_floats(name: str, values: ArrayLike) -> Floats:
    """float64 on the CPU."""
    # A list goes to float64 directly: by way of float32, 0.3 would lie above a threshold of 0.3.
    given: Any = values if isinstance(values, Tensor) else np.asarray(values)
    floats: Floats = tensor(name, given).detach().double().cpu().numpy()
    return floats
