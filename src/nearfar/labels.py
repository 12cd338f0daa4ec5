"""Which pairs are similar: the one place where labels are read.

Papers and libraries disagree on whether 0 or 1 means similar, and with flipped labels a network
silently trains in the wrong direction. Here a pair label is `bool`, True = similar. With numbers,
`similar_label` must say whether 0 or 1 means similar. Nothing is guessed.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from nearfar.inputs import ArrayLike, readable, same_device, tensor, tracing
from nearfar.similar_label import check_choice, check_meaning, of_text

SimilarLabel = Literal[0, 1] | None


def pair_labels(
    y: ArrayLike, *, like: Tensor, similar_label: SimilarLabel = None, name: str = "y"
) -> Tensor:
    """Whether, or to what degree, each pair is similar.

    Args:
        y: (n,) labels. bool: True = similar. Integers 0 and 1, or floats from 0 to 1 (degrees of
            similarity): `similar_label` says which end means similar.
        like: (n, ...) the rows that the labels belong to; gives the length and the device.
        similar_label: which number means similar, 0 or 1. Not needed for bool labels.
        name: the caller's name for `y`.

    Returns:
        (n,) bool, True = similar; or, for float labels, (n,) degrees, 1 = similar.

    Raises:
        TypeError: `y` holds text, complex numbers, or numbers without `similar_label`.
        ValueError: a wrong shape, length, device or value.

    >>> pair_labels([True, False], like=torch.zeros(2))
    tensor([ True, False])
    >>> pair_labels([0, 1], like=torch.zeros(2), similar_label=0)
    tensor([ True, False])
    >>> pair_labels([0.0, 0.25], like=torch.zeros(2), similar_label=0)
    tensor([1.0000, 0.7500])
    """
    if not isinstance(y, Tensor) and np.asarray(y).dtype.kind in "US":
        raise of_text(name)
    y = _one_per_row(name, y, like)
    check_choice(similar_label)
    if not len(y):
        return torch.zeros(0, dtype=torch.bool, device=y.device)
    if y.dtype is torch.bool:
        check_meaning(name, "bool", similar_label)
        return y
    if y.is_complex():
        raise TypeError(f"{name} must be bool, or numbers from 0 to 1; got {y.dtype}.")
    check_meaning(name, y.dtype, similar_label)
    if y.is_floating_point():
        y = y.to(like.dtype) if like.is_floating_point() else y.float()
        refuse(name, y, ~((y >= 0) & (y <= 1)), "lie between 0 and 1, a degree of similarity")
        return y if similar_label == 1 else 1 - y
    y = y.to(torch.int64)
    refuse(name, y, (y != 0) & (y != 1), f"be 0 or 1 (for -1 and 1 pass {name} > 0)")
    return y == int(similar_label == 1)


def blend(similar: Tensor, if_similar: Tensor, if_dissimilar: Tensor) -> Tensor:
    """One term for similar pairs and one for dissimilar pairs, mixed by degree of similarity."""
    if similar.dtype is torch.bool:
        return torch.where(similar, if_similar, if_dissimilar)
    # A term may overflow to infinity, and 0 times infinity would be NaN.
    near = torch.where(similar > 0, similar * if_similar, 0)
    return near + torch.where(similar < 1, (1 - similar) * if_dissimilar, 0)


def class_ids(
    labels: ArrayLike, *, like: Tensor, n_classes: int | None = None, name: str = "labels"
) -> Tensor:
    """Class ids of any integer dtype as int64, so that distinct ids stay distinct.

    Args:
        labels: (n,) class ids; any integers, unless `n_classes` is given.
        like: (n, ...) the rows that the labels belong to; gives the length and the device.
        n_classes: the number of classes, if ids are used as indices; each must then be from 0 to
            n_classes - 1.
        name: the caller's name for `labels`.

    Returns:
        (n,) int64.

    Raises:
        TypeError: bool or floating point labels.
        ValueError: a wrong shape, length, device or value.

    >>> class_ids(torch.tensor([7, 200], dtype=torch.uint8), like=torch.zeros(2))
    tensor([  7, 200])
    """
    given = labels = _one_per_row(name, labels, like)
    if not labels.shape[0]:
        return torch.zeros(0, dtype=torch.int64, device=labels.device)
    if labels.dtype is not torch.int64:
        if labels.dtype is torch.bool or labels.is_floating_point() or labels.is_complex():
            raise TypeError(
                f"{name} must be class ids of an integer dtype, got {labels.dtype}. "
                f"Pass {name}.long() if the values are ids."
            )
        labels = labels.to(torch.int64)
    if n_classes is not None and readable(labels):
        low, high = labels.aminmax()
        if low.item() < 0 or high.item() >= n_classes:
            outside = (labels < 0) | (labels >= n_classes)
            refuse(name, given, outside, f"be a class id from 0 to {n_classes - 1}")
    return labels


def batch_labels(labels: ArrayLike, *, like: Tensor, name: str = "labels") -> Tensor:
    """The labels of a whole batch: (n,) class ids, or (n, c) bool multi-labels.

    Returns:
        (n,) int64 or (n, c) bool; see `share_label` for what they mean.

    Raises:
        TypeError: multi-labels that are not bool, class ids that are not integers.
        ValueError: a wrong shape, length or device.

    >>> batch_labels([[True, False], [True, True]], like=torch.zeros(2)).shape
    torch.Size([2, 2])
    """
    labels = tensor(name, labels, device=like.device)
    if labels.ndim != 2:
        return class_ids(labels, like=like, name=name)
    if labels.dtype is not torch.bool:
        if labels.shape[1] == 1:
            raise TypeError(f"{name} must be class ids of shape (n,): pass {name}.squeeze(1).")
        raise TypeError(
            f"{name} of shape (n, c) are multi-labels and must be bool, True where a row has a "
            f"label; got {labels.dtype}. Pass {name}.bool(), or class ids of shape (n,)."
        )
    _check_length(name, labels, like)
    return labels


def share_label(rows: Tensor, columns: Tensor) -> Tensor:
    """Which rows are similar to which columns: equal class ids, or at least one common label.

    Args:
        rows: (n,) int64 class ids or (n, c) bool multi-labels, from `batch_labels`.
        columns: (m,) or (m, c), of the same kind.

    Returns:
        (n, m) bool.

    >>> share_label(torch.tensor([0, 1]), torch.tensor([1, 1, 0]))
    tensor([[False, False,  True],
            [ True,  True, False]])
    """
    if rows.ndim == 1:
        return rows[:, None] == columns[None, :]
    return rows.float() @ columns.float().T > 0


def listed_rows(name: str, listed: ArrayLike, n: int, m: int, device: torch.device) -> Tensor:
    """Indices of rows of a reference, listed for each of n rows.

    Args:
        name: the caller's name for `listed`.
        listed: (n, e) integers from 0 to m - 1, or -1 for none.
        n: the number of rows for which indices are listed.
        m: the number of rows of the reference.
        device: the device of the result.

    Returns:
        (n, e) int64.

    Raises:
        TypeError: `listed` does not hold integers.
        ValueError: a wrong shape, or an index out of range.
    """
    known = tensor(name, listed)
    if known.is_floating_point() or known.dtype is torch.bool or known.is_complex():
        raise TypeError(f"{name} must hold row indices of an integer dtype, got {known.dtype}.")
    if known.ndim != 2 or len(known) != n:
        raise ValueError(
            f"{name} must have shape ({n}, e), rows of the reference for each row, -1 for none; "
            f"got {tuple(known.shape)}."
        )
    known = known.to(torch.int64)
    outside = ((known < -1) | (known >= m)).any(1)
    refuse(name, known, outside, f"hold rows from 0 to {m - 1}, or -1 for none")
    return known.to(device)


def _one_per_row(name: str, labels: ArrayLike, like: Tensor) -> Tensor:
    labels = tensor(name, labels, device=like.device, beside=(like,))
    if labels.ndim != 1:
        squeeze = labels.ndim == 2 and labels.shape[1] == 1
        raise ValueError(
            f"{name} must have shape (n,), one label per row, got {tuple(labels.shape)}."
            + (f" Pass {name}.squeeze(1)." if squeeze else "")
        )
    _check_length(name, labels, like)
    return labels


def _check_length(name: str, labels: Tensor, like: Tensor) -> None:
    if labels.shape[0] != like.shape[0]:
        raise ValueError(
            f"{name} must have one entry per row: got {len(labels)} labels for {len(like)} rows."
        )
    same_device(name, labels, "the data", like)


def refuse(name: str, labels: Tensor, bad: Tensor, expected: str) -> None:
    """Raise if any entry is marked `bad`; the message shows the first one.

    Nothing is checked on an accelerator, which would have to be waited for, nor inside a compiled
    or vectorised function, where values are unknown.
    """
    if readable(bad) and (found := first_marked(bad)):
        row, share = found
        raise ValueError(
            f"{name} must {expected}; {name}[{row}] is {labels[row].tolist()!r} ({share} entries "
            "are wrong)."
        )


def first_marked(bad: Tensor) -> tuple[int, str] | None:
    """The first entry that is marked, and how many of all are; None: none is, or it is unknown."""
    if tracing() or not bad.any():
        return None
    return int(bad.nonzero()[0]), f"{int(bad.sum())} of {len(bad)}"
