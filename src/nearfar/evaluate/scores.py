"""Scores of labelled pairs, checked and converted to the form that all figures use."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nearfar.engine.meeting import Group, facts_of, meeting_of
from nearfar.engine.processes import Split
from nearfar.inputs import ArrayLike, tensor

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]


def checked(
    scores: ArrayLike,
    similar: ArrayLike,
    higher_is_closer: bool,
    groups: ArrayLike | None = None,
    group: Group | None = None,
    name: str = "scores",
) -> tuple[Floats, Bools, Integers | None]:
    """Closeness, higher = closer, labels, and (n, 2) identities, numbered 0, 1, ...

    With `group`, those of the pairs of all processes, in their order.

    Raises:
        TypeError: labels that are not bool, identities that are not integers.
        ValueError: no similar or no dissimilar pairs, scores that are not finite, wrong shapes.
    """
    values, same = as_floats(name, scores), tensor("similar", similar).cpu().numpy()
    if same.dtype != bool:
        raise TypeError(f"similar must be bool, True = similar; got {same.dtype}.")
    if values.ndim != 1 or same.shape != values.shape:
        raise ValueError(
            f"{name} and similar must be of equal shape (n,), got {values.shape} and {same.shape}."
        )
    if not np.isfinite(values).all():
        raise ValueError(f"{name}[{int((~np.isfinite(values)).argmax())}] is not finite.")
    known = None if groups is None else _identities(groups, len(same))
    if group is not None:
        values, same, known = _of_all(group, values, same, known)
    if same.all() or not same.any():
        raise ValueError("similar must hold both True and False: rates need pairs of both kinds.")
    if known is not None:
        known = np.unique(known, return_inverse=True)[1].reshape(known.shape).astype(np.int64)
    return (values if higher_is_closer else -values), same, known


def _identities(groups: ArrayLike, n: int) -> npt.NDArray[np.integer[Any]]:
    """(n, 2) the identities of each pair."""
    given = tensor("groups", groups).cpu().numpy()
    if given.dtype.kind not in "iu":
        raise TypeError(
            f"groups must hold identities as integers, got {given.dtype}. Text becomes numbers "
            "with np.unique(text, return_inverse=True)[1]."
        )
    if given.shape not in ((n,), (n, 2)):
        raise ValueError(
            f"groups must have shape ({n}, 2), the two identities of each pair, or ({n},) where a "
            f"pair has only one; got {given.shape}."
        )
    return given if given.ndim == 2 else np.stack([given, given], 1)


def _of_all(
    group: Group, values: Floats, same: Bools, known: npt.NDArray[np.integer[Any]] | None
) -> tuple[Floats, Bools, Integers | None]:
    """The same of the pairs of all processes, whose curve has a point for each score."""
    meeting, rows = meeting_of(group), torch.from_numpy(values)[:, None]
    told = meeting.agree(facts_of(rows, None, None))
    split = Split(meeting.processes, [facts.rows for facts in told])

    def gather(own: npt.NDArray[Any]) -> npt.NDArray[Any]:
        found: npt.NDArray[Any] = split.gather(torch.from_numpy(own)).numpy()
        return found

    of_all = None if known is None else gather(known.astype(np.int64))
    return gather(values), gather(same), of_all


def as_floats(name: str, values: ArrayLike) -> Floats:
    """float64 on the CPU."""
    # A list goes to float64 directly: through float32, 0.3 would end up above a threshold of 0.3.
    given: Any = values if isinstance(values, Tensor) else np.asarray(values)
    floats: Floats = tensor(name, given).detach().double().cpu().numpy()
    return floats
