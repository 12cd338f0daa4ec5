"""Distances and similarities between aligned rows, safe where the textbook formulas are not.

Each takes two (n, d) matrices and returns (n,). At distance 0 the gradient is 0 instead of NaN. A
zero row has no direction, so its cosine with anything is 0, and it receives no gradient.
"""

from collections.abc import Callable
from math import log2
from typing import Literal

import torch
from torch import Tensor

from nearfar.inputs import ArrayLike, embeddings, tracing

Distance = Literal["euclidean", "sqeuclidean", "cosine"]


def between_rows(x1: Tensor, x2: Tensor, distance: Distance) -> Tensor:
    """The distance between row i of `x1` and row i of `x2`, by name.

    Raises:
        ValueError: an unknown name; the message lists the choices.
    """
    check_distance(distance)
    return _DISTANCES[distance](x1, x2)


def check_distance(distance: Distance) -> None:
    """Refuse an unknown name.

    Raises:
        ValueError: an unknown name; the message lists the choices.
    """
    if not isinstance(distance, str) or distance not in _DISTANCES:
        choices = ", ".join(map(repr, _DISTANCES))
        raise ValueError(f"distance must be one of {choices}; got {distance!r}.")


def largest(distance: Distance) -> float:
    """The largest possible distance: 2 for cosine distance, infinity for the others."""
    check_distance(distance)
    return 2.0 if distance == "cosine" else float("inf")


def euclidean(x1: Tensor, x2: Tensor) -> Tensor:
    """d = |x1 - x2|, computed from the difference itself, so a common offset costs no digits."""
    return length(x1 - x2)


def sqeuclidean(x1: Tensor, x2: Tensor) -> Tensor:
    """d = |x1 - x2|^2, clamped to the largest number of the dtype."""
    return (x1 - x2).square().sum(-1).clamp(max=torch.finfo(x1.dtype).max)


def cosine(x1: Tensor, x2: Tensor) -> Tensor:
    """d = 1 - cos(x1, x2): 0 for the same direction, 1 for orthogonal, 2 for opposite directions.

    Computed as |u1 - u2|^2 / 2 on unit rows, which is never negative and keeps its digits where
    `1 - cos` cancels. A zero row is at distance 1 from everything.
    """
    (u1, short1), (u2, short2) = _unit(x1), _unit(x2)
    d = (u1 - u2).square().sum(-1) / 2
    for short in (short1, short2):
        if short is not None:
            d = d + short / 2  # its |u|^2 / 2 is 0 instead of 1 / 2
    return d


def cosine_similarity(x1: ArrayLike, x2: ArrayLike) -> Tensor:
    r"""Cosine of the angle between row i of `x1` and row i of `x2`.

    .. math:: \cos(x_1, x_2) = \frac{x_1 \cdot x_2}{|x_1|\,|x_2|}

    Args:
        x1: (n, d) embeddings, any floating dtype.
        x2: (n, d) embeddings.

    Returns:
        (n,) values from -1 to 1, in float32 or wider. A zero row has no direction, so its
        cosine with anything is 0, with gradient 0.

    Raises:
        TypeError: an argument is not an array of real numbers.
        ValueError: the shapes or devices differ.

    >>> x1 = torch.tensor([[0.0, 1, 0, 9, 1], [1, 0, 0, 0, 0]])
    >>> x2 = torch.tensor([[3.0, 0, 0, 9, 0], [0, 0, 0, 0, 0]])
    >>> cosine_similarity(x1, x2)
    tensor([0.9372, 0.0000])

    Source: Salton, Wong & Yang, "A Vector Space Model for Automatic Indexing", 1975.
    """
    x1, x2 = embeddings(x1=x1, x2=x2)
    cosines = (unit(x1) * unit(x2)).sum(-1)
    # Rounding may give 1.0000001, whose arccos is NaN: clamp the value, but not the gradient.
    return cosines + (cosines.clamp(-1, 1) - cosines).detach()


def unit(x: Tensor) -> Tensor:
    """Rows scaled to length 1; a row too short to have a direction becomes 0, with gradient 0.

    A row is too short if the square of its length is below the smallest normal number, that is, if
    it is shorter than 1e-19 in float32. Dividing by such a length would turn rounding noise into a
    direction, with gradients of 1e19 and more.
    """
    return _unit(x)[0]


def _unit(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The rows of `unit`, and which of them are too short; None if none is."""
    size, too_short = _plain_length(x, keepdim=True), torch.finfo(x.dtype).tiny ** 0.5
    if _can_read(size):
        low, high = size.detach().aminmax()
        if low.item() >= too_short and high.item() < torch.inf:
            return x / size, None
    x, _ = scaled_to_square(x, size)
    size = _plain_length(x, keepdim=True)
    short = size < too_short
    return x / size.masked_fill(short, torch.inf), short[..., 0]


def length(x: Tensor) -> Tensor:
    """Euclidean length of each row; at length 0 its derivatives are 0 instead of NaN.

    A length whose square overflows is still right, up to the largest number of the dtype.
    """
    size = _plain_length(x)
    if _can_read(size):
        low, high = size.detach().aminmax()
        if low.item() > 0 and high.item() < torch.inf:
            return size
    x, down = scaled_to_square(x, size[..., None])
    # At 0, the first derivative of torch's length is 0, but the second is not.
    zero = size == 0
    size = _plain_length(x.masked_fill(zero[..., None], 1)).masked_fill(zero, 0)
    return (size / down[..., 0]).clamp(max=torch.finfo(x.dtype).max)


def _plain_length(x: Tensor, *, keepdim: bool = False) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=keepdim)
    return size


def _can_read(size: Tensor) -> bool:
    """Whether reading the values neither stalls an accelerator nor breaks a trace."""
    return bool(size.numel()) and size.is_cpu and not tracing()


def scaled_to_square(x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Scale rows whose squares would overflow by a power of two, exactly; also return the factors.

    Args:
        x: (..., d) rows.
        size: (..., 1) their lengths, infinite where the square overflows.
    """
    down = torch.ones_like(size).masked_fill_(size.isinf(), safe_power_of_two(x.dtype))
    return x * down, down


def safe_power_of_two(dtype: torch.dtype) -> float:
    """A power of two small enough that squares of any finite number times it can be summed."""
    return 2.0 ** -round(log2(torch.finfo(dtype).max) / 2 + 8)


_DISTANCES: dict[Distance, Callable[[Tensor, Tensor], Tensor]] = {
    "euclidean": euclidean,
    "sqeuclidean": sqeuclidean,
    "cosine": cosine,
}
