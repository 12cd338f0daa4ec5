"""Distances and similarities between aligned rows, safe where the textbook formulas are not.

Each takes two (n, d) matrices, the first of them the anchors, and returns (n,). At distance 0 the
gradient is 0 instead of NaN. A zero row has no direction, so its cosine with anything is 0, and it
receives no gradient.
"""

from collections.abc import Callable, Iterable
from math import inf, log2
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor

from nearfar.inputs import ArrayLike, embeddings, readable, switch

# Those that follow from the Euclidean distance, of the rows or of unit rows.
EuclideanDistance = Literal["euclidean", "sqeuclidean", "cosine"]
DistanceName = Literal[EuclideanDistance, "snr", "manhattan"]
# A number p of at least 1 is the p-norm of the difference: 2.0 is "euclidean", 1.0 "manhattan".
Distance = DistanceName | float


def between_rows(x1: Tensor, x2: Tensor, distance: Distance) -> Tensor:
    """The distance between row i of `x1`, the anchor, and row i of `x2`.

    Raises:
        ValueError: no distance; the message lists the choices.
    """
    distance = check_distance(distance)
    if isinstance(distance, str):
        return _DISTANCES[distance](x1, x2)
    return p_norm(x1 - x2, distance)


def check_distance(distance: Distance) -> Distance:
    """The distance in its only form: by name where it has one, else as a float.

    Raises:
        ValueError: no distance; the message lists the choices.

    >>> check_distance(2), check_distance(1.0), check_distance(3)
    ('euclidean', 'manhattan', 3.0)
    """
    if isinstance(distance, str) and distance in _DISTANCES:
        return distance
    if isinstance(distance, Real) and not isinstance(distance, bool) and distance >= 1:
        p = float(distance)
        return _NAMES.get(p, p)
    raise ValueError(
        f"distance must be one of {_listed(_DISTANCES)}, or a number p of at least 1 for the "
        f"p-norm; got {distance!r}.{_OWN if callable(distance) else ''}"
    )


def check_euclidean(distance: Distance, what: str) -> EuclideanDistance:
    """The distance, if it follows from the Euclidean one.

    Args:
        distance: any.
        what: what takes no other distance, with a verb.

    Raises:
        ValueError: another distance, or none; the message lists the choices.
    """
    known = check_distance(distance)
    if known == "euclidean" or known == "sqeuclidean" or known == "cosine":
        return known
    raise ValueError(
        f"distance must be one of {_listed(get_args(EuclideanDistance))}, by which {what}; "
        f"got {distance!r}."
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def largest(distance: Distance) -> float:
    """The largest possible distance: 2 for cosine distance, infinity for the others."""
    return 2.0 if check_distance(distance) == "cosine" else inf


def scaled(distance: Distance, normalize: bool, *rows: Tensor) -> tuple[Tensor, ...]:
    """The rows, at length 1 if asked; the cosine distance scales them by itself."""
    return (
        tuple(map(unit, rows)) if switch("normalize", normalize) and distance != "cosine" else rows
    )


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


def manhattan(x1: Tensor, x2: Tensor) -> Tensor:
    """d = sum_k |x1_k - x2_k|, clamped to the largest number of the dtype."""
    return p_norm(x1 - x2, 1)


def snr(x1: Tensor, x2: Tensor) -> Tensor:
    """d = var(x1 - x2) / var(x1): how loud the noise in x2 is beside the signal x1, the anchor.

    Adding a constant to a row changes nothing. A row x1 that is constant, or too short for its
    square to be held, has no signal: it is at distance 1 from everything, without a gradient, as a
    row without direction is at cosine distance 1.
    """
    signal, noise = about_mean(x1), about_mean(x1 - x2)
    size, most = signal.detach().abs().amax(-1, keepdim=True), torch.finfo(x1.dtype).max
    short = size < too_short(x1.dtype)
    size = size.masked_fill(short, inf)
    # In units of the largest part of the signal, whose square is then between 1 and its length.
    of_signal = (signal / size).square().sum(-1)
    of_noise = (noise / size).clamp(-most, most).square().sum(-1)
    none, too_loud = short[..., 0].to(x1.dtype), of_noise == inf
    d = (of_noise.masked_fill(too_loud, 0) + none) / (of_signal + none)
    return d.masked_fill(too_loud, most)


def about_mean(x: Tensor) -> Tensor:
    """Each row minus its mean: exactly 0 for a constant row, and right for one far from 0."""
    moved = x - x[..., :1].detach()  # the same by any shift, so this one needs no gradient
    return moved - moved.mean(-1, keepdim=True)


def p_norm(x: Tensor, p: float) -> Tensor:
    """(sum_k |x_k|^p)^(1/p) of each row, for p = inf the largest |x_k|; derivatives at 0 are 0.

    Powers are taken of shares in the largest |x_k|, which neither overflow nor all vanish. A norm
    too large for the dtype is its largest number.
    """
    size = x.abs()
    if p == inf:
        return size.amax(-1)
    if p == 1:
        return size.sum(-1).clamp(max=torch.finfo(x.dtype).max)
    most = size.detach().amax(-1, keepdim=True)
    share = size / most.masked_fill(most == 0, 1)
    if p < 2:  # |x|^p has no second derivative at 0
        zero = share == 0
        powers = share.masked_fill(zero, 1).pow(p).masked_fill(zero, 0)
    else:
        powers = share.pow(p)
    total = powers.sum(-1)
    zero = total == 0
    root = total.masked_fill(zero, 1).pow(1 / p).masked_fill(zero, 0)
    return (root * most[..., 0]).clamp(max=torch.finfo(x.dtype).max)


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
    size, shortest = _plain_length(x, keepdim=True), too_short(x.dtype)
    if size.numel() and readable(size):
        low, high = size.detach().aminmax()
        if low.item() >= shortest and high.item() < torch.inf:
            return x / size, None
    x, _ = scaled_to_square(x, size)
    size = _plain_length(x, keepdim=True)
    short = size < shortest
    return x / size.masked_fill(short, torch.inf), short[..., 0]


def too_short(dtype: torch.dtype) -> float:
    """The length below which a row has no direction: its square is no normal number."""
    return float(torch.finfo(dtype).tiny ** 0.5)


def length(x: Tensor) -> Tensor:
    """Euclidean length of each row; at length 0 its derivatives are 0 instead of NaN.

    A length whose square overflows is still right, up to the largest number of the dtype.
    """
    size = _plain_length(x)
    if size.numel() and readable(size):
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


_DISTANCES: dict[DistanceName, Callable[[Tensor, Tensor], Tensor]] = {
    "euclidean": euclidean,
    "sqeuclidean": sqeuclidean,
    "cosine": cosine,
    "snr": snr,
    "manhattan": manhattan,
}
_NAMES: dict[float, DistanceName] = {1.0: "manhattan", 2.0: "euclidean"}
_OWN = " nearfar.batch_loss takes a function of your own."
