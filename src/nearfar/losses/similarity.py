"""What a loss of similarities compares rows by."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from nearfar.distance import unit
from nearfar.engine.closeness import Closeness, NegatedSquares, Product
from nearfar.inputs import lift, one_of, switch

# With rows at length 1, the inner product is the cosine.
Similarity = Literal["inner_product", "cosine", "sqeuclidean"]


class Compared(NamedTuple):
    """Rows and columns, and how `run` is to compare them.

    Attributes:
        closeness: the similarity.
        rows: (n, d).
        columns: (m, d), or None for the rows themselves.
        normalize: whether `run` scales them to length 1.
        scale: by which `run` multiplies the similarity; None where the rows contain it.
        contained: this scale, if the rows contain it.
    """

    closeness: Closeness
    rows: Tensor
    columns: Tensor | None
    normalize: bool
    scale: float | Tensor | None
    contained: float | Tensor | None = None


def compared(
    similarity: Similarity,
    normalize: bool,
    rows: Tensor,
    columns: Tensor | None,
    scale: float | Tensor | None = None,
) -> Compared:
    """How to compare rows with columns by a similarity times a scale.

    Args:
        similarity: its name.
        normalize: whether rows are scaled to length 1; for "cosine" they always are.
        rows: (n, d).
        columns: (m, d); None: the rows themselves.
        scale: above 0; None for 1.

    Raises:
        ValueError: an unknown similarity; the message lists the choices.
    """
    one_of("similarity", similarity, Similarity)
    switch("normalize", normalize)
    normalize = normalize or similarity == "cosine"
    if similarity != "sqeuclidean":
        return Compared(Product(), rows, columns, normalize, scale)
    # t |x - y|^2 is the squared distance of the rows times the root of t.
    by = scale.reshape(()).sqrt() if isinstance(scale, Tensor) else (scale or 1.0) ** 0.5
    first = _scaled("x", rows, normalize, by)
    second = None if columns is None else _scaled("reference.x", columns, normalize, by)
    return Compared(NegatedSquares(), first, second, False, None, scale)


def _scaled(name: str, x: Tensor, normalize: bool, by: float | Tensor) -> Tensor:
    x = lift(name, x)
    by = by.to(x.dtype) if isinstance(by, Tensor) else by
    if normalize:
        return unit(x) * by
    # What cannot be held is the largest number: NaN stands for rows that are not finite.
    most = torch.finfo(x.dtype).max
    return (x * by).clamp(-most, most) + 0 * x
