"""Rows of embeddings: their dtype and shape, their length, and distances between aligned rows."""

from numbers import Real
from typing import Any, Literal, get_args

import keras
from keras import ops

from nearfar.keras.checks import one_of

Distance = Literal["euclidean", "sqeuclidean", "cosine", "manhattan"]

# The square of a shorter float32 row is no normal number, so it has no direction.
_SHORTEST = 1.1e-19


def lift(name: str, x: Any) -> Any:
    """A tensor of a floating dtype, in float32 or wider."""
    x = ops.convert_to_tensor(x)
    dtype = keras.backend.standardize_dtype(x.dtype)
    if not keras.backend.is_float_dtype(dtype):
        raise TypeError(f"{name} must hold floating point numbers, got {dtype}.")
    return x if dtype == "float64" else ops.cast(x, "float32")


def matrix(name: str, x: Any) -> Any:
    """(n, d) embeddings, lifted."""
    x = lift(name, x)
    if len(x.shape) != 2 or not x.shape[1]:
        raise ValueError(
            f"{name} must have shape (n, d), one embedding per row; got {tuple(x.shape)}."
        )
    return x


def towers(**given: Any) -> tuple[Any, Any]:
    """Two (n, d) matrices of one dtype, row i of one matching row i of the other."""
    (name, x), (other, y) = ((name, matrix(name, value)) for name, value in given.items())
    sides = zip(x.shape, y.shape, strict=True)
    if any(None not in (here, there) and here != there for here, there in sides):
        raise ValueError(
            f"{other} must have the shape of {name}, {tuple(x.shape)}, since row i of one belongs "
            f"to row i of the other; got {tuple(y.shape)}."
        )
    dtypes = {keras.backend.standardize_dtype(side.dtype) for side in (x, y)}
    dtype = "float64" if "float64" in dtypes else "float32"
    return ops.cast(x, dtype), ops.cast(y, dtype)


def unstacked(y_pred: Any, *names: str) -> tuple[Any, ...]:
    """The (n, d) rows of each name, from y_pred of shape (n, names, d)."""
    y_pred = lift("y_pred", y_pred)
    if len(y_pred.shape) != 3 or y_pred.shape[1] != len(names):
        raise ValueError(
            f"y_pred must have shape (n, {len(names)}, d), the embeddings of {', '.join(names)} in "
            f"this order; got {tuple(y_pred.shape)}. Let the model end in "
            f"keras.ops.stack([{', '.join(names)}], axis=1)."
        )
    return tuple(y_pred[:, place] for place in range(len(names)))


def per_row(name: str, x: Any) -> Any:
    """One number per row, (n,), also from (n, 1), which Keras' Dense(1) gives."""
    if len(x.shape) == 2 and x.shape[1] == 1:
        return ops.squeeze(x, axis=1)
    if len(x.shape) != 1:
        raise ValueError(f"{name} must have shape (n,) or (n, 1), got {tuple(x.shape)}.")
    return x


def row_weight(weight: Any, like: Any) -> Any:
    """(n,) weights without a gradient; None: all are 1."""
    if weight is None:
        return None
    weight = per_row("weight", ops.cast(ops.convert_to_tensor(weight), like.dtype))
    return ops.stop_gradient(weight)


def number(value: Any, *, like: Any) -> Any:
    """A setting in the dtype of `like`; Python's numbers stay as they are, since a cast rounds."""
    return value if isinstance(value, Real) else ops.cast(value, like.dtype)


def unit(x: Any) -> Any:
    """Rows scaled to length 1; one too short to have a direction becomes 0, without a gradient."""
    share, size = _shares(x)
    length = _length(share)
    short = size * length < _SHORTEST
    return ops.where(short, 0.0, share / ops.where(short, 1.0, length))


def nan_unless_finite(x: Any) -> Any:
    """0, or NaN if there is a NaN or an infinity, so that no loss hides it."""
    x = ops.stop_gradient(x)
    return ops.sum(x - x)


def distances(x1: Any, x2: Any, distance: Distance = "euclidean") -> Any:
    """The distance of row i of `x1` to row i of `x2`; its gradient at 0 is 0."""
    one_of("distance", distance, get_args(Distance))
    if distance == "cosine":
        x1, x2 = unit(x1), unit(x2)
        apart = ops.sum(ops.square(x1 - x2), axis=-1)
        return (apart + _without_direction(x1) + _without_direction(x2)) / 2
    if distance == "manhattan":
        return ops.sum(ops.abs(x1 - x2), axis=-1)
    if distance == "sqeuclidean":
        return ops.sum(ops.square(x1 - x2), axis=-1)
    share, size = _shares(x1 - x2)
    return (size * _length(share))[..., 0]


def _shares(x: Any) -> tuple[Any, Any]:
    """Rows in units of their largest coordinate, and that, (..., 1), 1 for a row of zeros.

    Squares of these neither overflow nor all vanish. What is scaled back by a constant has the
    gradient of x, so that of the coordinate itself is left out.
    """
    if x.shape[0] == 0:  # Keras takes no largest number of none
        return x, x[..., :1]
    size = ops.stop_gradient(ops.max(ops.abs(x), axis=-1, keepdims=True))
    size = ops.where(size < 1e-30, 1.0, size)
    return x / size, size


def _length(x: Any) -> Any:
    """(..., 1) lengths, with gradient 0 at 0."""
    square = ops.sum(ops.square(x), axis=-1, keepdims=True)
    zero = square == 0
    return ops.where(zero, 0.0, ops.sqrt(ops.where(zero, 1.0, square)))


def _without_direction(unit_rows: Any) -> Any:
    """1 for rows of zeros, else 0."""
    square = ops.sum(ops.square(unit_rows), axis=-1)
    return ops.cast(square == 0, unit_rows.dtype)
