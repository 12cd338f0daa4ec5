"""Scores of labelled pairs, checked and converted to the form that all figures use."""

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from nearfar.inputs import ArrayLike, tensor

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]


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
            f"scores and similar must be of equal shape (n,), got {values.shape} and {same.shape}."
        )
    if not np.isfinite(values).all():
        raise ValueError(f"scores[{int((~np.isfinite(values)).argmax())}] is not finite.")
    if same.all() or not same.any():
        raise ValueError("similar must hold both True and False: rates need pairs of both kinds.")
    return (values if higher_is_closer else -values), same


def as_floats(name: str, values: ArrayLike) -> Floats:
    """float64 on the CPU."""
    # A list goes to float64 directly: through float32, 0.3 would end up above a threshold of 0.3.
    given: Any = values if isinstance(values, Tensor) else np.asarray(values)
    floats: Floats = tensor(name, given).detach().double().cpu().numpy()
    return floats
