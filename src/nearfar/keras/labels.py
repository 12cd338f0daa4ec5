"""Which pairs are similar, read as the rest of nearfar reads labels, and as strictly."""

from typing import Any

import keras
import numpy as np
from keras import ops

from nearfar.keras.rows import per_row
from nearfar.similar_label import check_choice, check_meaning, of_text


def pair_labels(y: Any, *, like: Any, similar_label: int | None, name: str = "y_true") -> Any:
    """(n,) to what degree each pair is similar, 1 = similar, in the dtype of `like`.

    Args:
        y: (n,) or (n, 1): bool, True = similar; or numbers from 0 to 1 with `similar_label`.
        like: (n, ...) the rows that the labels belong to.
        similar_label: which number means similar, 0 or 1. Not needed for bool labels.
        name: the caller's name for `y`.

    Raises:
        TypeError: text, or numbers without `similar_label`.
        ValueError: a wrong shape or value.
    """
    check_similar_label(y, similar_label, name=name)
    y = per_row(name, ops.convert_to_tensor(y))
    _check_length(name, y, like)
    values = known(y)
    if values is not None and not ((values >= 0) & (values <= 1)).all():
        row = int(np.argmin((values >= 0) & (values <= 1)))
        raise ValueError(
            f"{name} must lie between 0 and 1, a degree of similarity; {name}[{row}] is "
            f"{values[row].item()!r} (for -1 and 1 pass {name} > 0)."
        )
    degree = ops.cast(y, like.dtype)
    return 1 - degree if similar_label == 0 else degree


def check_similar_label(y: Any, similar_label: int | None, *, name: str = "y_true") -> None:
    """Refuse labels that could be read both ways."""
    check_choice(similar_label)
    dtype = dtype_of(y)
    if dtype == "text":
        raise of_text(name)
    check_meaning(name, dtype, similar_label)


def blend(similar: Any, if_similar: Any, if_dissimilar: Any) -> Any:
    """One term for similar pairs and one for dissimilar pairs, mixed by degree of similarity."""
    # A term may overflow to infinity, and 0 times infinity would be NaN.
    near = ops.where(similar > 0, similar * if_similar, 0.0)
    return near + ops.where(similar < 1, (1 - similar) * if_dissimilar, 0.0)


def batch_labels(labels: Any, *, like: Any, name: str = "labels") -> Any:
    """The labels of a batch: (n,) class ids as the widest integers, or (n, c) bool multi-labels.

    Raises:
        TypeError: neither integers nor bool multi-labels.
        ValueError: a wrong shape; ids that the backend's integers would merge.
    """
    if labels is None:
        raise TypeError(f"{name} must be class ids, one per row; got None. In fit, pass them as y.")
    dtype = dtype_of(labels)
    if dtype == "bool":
        labels = ops.convert_to_tensor(labels)
        if len(labels.shape) != 2:
            raise TypeError(
                f"{name} must be class ids of an integer dtype, or bool multi-labels of shape "
                f"(n, c); got bool of shape {tuple(labels.shape)}."
            )
        _check_length(name, labels, like)
        return labels
    if "int" not in dtype:
        raise TypeError(
            f"{name} must be class ids of an integer dtype, got {dtype}, which may have merged ids "
            f"already. Pass integers from the start: {name}.astype('int64'), or "
            "keras.Input((), dtype='int64')."
        )
    # JAX has no int64 unless it is told to, and warns who asks for it.
    widest = dtype_of(ops.convert_to_tensor(np.zeros(0, np.int64)))
    _check_width(name, labels, widest)
    whole = per_row(name, ops.cast(ops.convert_to_tensor(labels), widest))
    _check_length(name, whole, like)
    return whole


def dtype_of(y: Any) -> str:
    """The name of the dtype of an array, tensor or list; "text" for text."""
    if isinstance(y, np.ndarray | list | tuple | bool | int | float):
        array = np.asarray(y)
        return "text" if array.dtype.kind in "USO" else str(array.dtype)
    return str(keras.backend.standardize_dtype(y.dtype))


def known(x: Any) -> Any:
    """The values as a NumPy array; None in a compiled function or on an accelerator."""
    if getattr(getattr(x, "device", None), "type", "cpu") != "cpu":
        return None  # torch would have to wait for the device
    try:
        return np.asarray(x)
    except (TypeError, NotImplementedError, RuntimeError):
        return None


def _check_width(name: str, labels: Any, dtype: str) -> None:
    """Arrays alone can hold more than the backend; a tensor has lost what it cannot hold."""
    if dtype == "int64" or not isinstance(labels, np.ndarray | list | tuple):
        return
    given = np.asarray(labels)
    limits = np.iinfo(dtype)
    if given.size and (given.min() < limits.min or given.max() > limits.max):
        raise ValueError(
            f"{name} holds ids beyond {dtype}, the widest integers of this backend, which would "
            f"merge some: pass np.unique({name}, return_inverse=True)[1]."
        )


def _check_length(name: str, labels: Any, like: Any) -> None:
    n, m = labels.shape[0], like.shape[0]
    if n is not None and m is not None and n != m:
        raise ValueError(f"{name} must have one entry per row: got {n} labels for {m} rows.")
