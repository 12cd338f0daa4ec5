"""Distances of a tile that are no inner products: p-norms, and functions of the user's own."""

from collections.abc import Callable, Iterator
from math import inf
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nearfar import distance
from nearfar.distance import p_norm
from nearfar.engine.precision import Precision, Rounding
from nearfar.engine.products import Gradient
from nearfar.engine.slices import joined, part, spans

if TYPE_CHECKING:
    from nearfar.engine.closeness import Tile

# (r, d) rows and (c, d) columns -> (r, c) distances, in plain torch.
DistanceFunction = Callable[[Tensor, Tensor], Tensor]


class OfFunction:
    """Any function of the rows and the columns of a tile, derived by autograd.

    Args:
        function: what it is.
        aligned: the same of aligned rows, (k, d) and (k, d) -> (k,); None: by `function`.
        symmetric: whether it is the same from a to b as from b to a.
    """

    distance_sign = 1
    by_products = False
    rounding: Rounding = "never"
    kernel: str | None = None

    def __init__(
        self,
        function: DistanceFunction,
        aligned: DistanceFunction | None = None,
        *,
        symmetric: bool = False,
    ) -> None:
        self._function, self._aligned, self.symmetric = function, aligned, symmetric

    def prepare(self, a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return a, b

    def measure(
        self,
        a: Tensor,
        b: Tensor,
        bound: float = 1.0,
        out: Tensor | None = None,
        precision: Precision = "float32",
    ) -> tuple[Tensor, Tensor | None]:
        return self._function(a, b), None

    def backward(self, force: Tensor, tile: "Tile", gradient: Gradient) -> None:
        a, b = part(gradient.a, tile.rows), part(gradient.b, tile.columns)
        da, db = by_autograd(self._function, force, a, b)
        gradient.of_rows(tile.rows).add_(da)
        gradient.of_columns(tile.columns).add_(db)

    def between(self, x: Tensor, y: Tensor, precision: Precision = "float32") -> Tensor:
        if self._aligned is not None:
            return self._aligned(x, y)
        few = spans(x.shape[0], _DIAGONAL)
        return joined([self._function(x[at], y[at]).diagonal() for at in few], x)

    def between_backward(
        self, force: Tensor, x: Tensor, y: Tensor, closeness: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self._aligned is not None:
            return by_autograd(self._aligned, force, x, y)
        for at in spans(x.shape[0], _DIAGONAL):
            x[at], y[at] = by_autograd(self._function, force[at].diag(), x[at], y[at])
        return x, y


# Aligned rows are measured on the diagonals of small tiles, of as many rows as make up for the
# calls.
_DIAGONAL = 16


def by_autograd(
    function: DistanceFunction, force: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of sum(force * function(a, b)) by `a` and `b`."""
    ends = [end.detach().requires_grad_() for end in (a, b)]
    with torch.enable_grad():
        values = function(*ends)
    if not values.requires_grad:
        raise ValueError(
            "distance must be a function of the rows that autograd can derive; what it returned "
            "does not depend on them, or was detached from them."
        )
    da, db = torch.autograd.grad(values, ends, force, materialize_grads=True)
    return da, db


def manhattan() -> OfFunction:
    """The 1-norm of a - b, for which torch has a faster routine than for other norms."""

    def distances(a: Tensor, b: Tensor) -> Tensor:
        return torch.cdist(a, b, p=1.0).clamp(max=torch.finfo(a.dtype).max)

    return OfFunction(distances, distance.manhattan, symmetric=True)


# Elements of the differences held at a time: more leave the cache, and with fewer the calls
# themselves take most of the time.
_MOST, _FEWEST = 2**18, 2**14
# Copies of these differences held at the same time: sizes, shares, powers.
_COPIES = 4


class PNorm:
    """The p-norm of a - b, for any p, from the differences themselves.

    No product gives it, so it takes r * c * d powers. They are computed a few pairs at a time.
    """

    distance_sign = 1
    symmetric = True
    by_products = False
    rounding: Rounding = "never"
    kernel: str | None = None

    def __init__(self, p: float) -> None:
        self._p = p

    def prepare(self, a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return a, b

    def measure(
        self,
        a: Tensor,
        b: Tensor,
        bound: float = 1.0,
        out: Tensor | None = None,
        precision: Precision = "float32",
    ) -> tuple[Tensor, Tensor | None]:
        values = a.new_empty(a.shape[0], b.shape[0])
        for i, j in _few(a, b):
            values[i, j] = p_norm(a[i, None] - b[j], self._p)
        return values, None

    def backward(self, force: Tensor, tile: "Tile", gradient: Gradient) -> None:
        a, b = part(gradient.a, tile.rows), part(gradient.b, tile.columns)
        da, db = gradient.of_rows(tile.rows), gradient.of_columns(tile.columns)
        for i, j in _few(a, b):
            pull = self._slope(a[i, None] - b[j], tile.closeness[i, j]).mul_(force[i, j, None])
            da[i] += pull.sum(1)
            db[j] -= pull.sum(0)

    def between(self, x: Tensor, y: Tensor, precision: Precision = "float32") -> Tensor:
        return p_norm(x - y, self._p)

    def between_backward(
        self, force: Tensor, x: Tensor, y: Tensor, closeness: Tensor
    ) -> tuple[Tensor, Tensor]:
        pull = self._slope(x - y, closeness).mul_(force[:, None])
        return pull, pull.neg()

    def _slope(self, apart: Tensor, d: Tensor) -> Tensor:
        """The derivative of norms `d` by what they are the norms of: sign(a - b) |a - b|^(p - 1).

        In units of d, so that no power overflows. At distance 0 it is 0, and for p = inf those that
        are equally large share it.
        """
        share = apart.abs().div_(d.masked_fill(d == 0, 1)[..., None])
        if self._p == inf:
            torch.eq(share, 1, out=share)  # eight times as fast as by way of bool
            share.div_(share.sum(-1, keepdim=True).clamp_(min=1))
        else:
            share.pow_(self._p - 1)
        return share.copysign_(apart)


def _few(a: Tensor, b: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of so few pairs that their differences take no more than a tile."""
    (r, d), c = a.shape, b.shape[0]
    pairs = max(_FEWEST, min(_MOST, r * c // _COPIES)) // d
    width = max(1, min(pairs, c))
    for i in spans(r, max(1, pairs // width)):
        for j in spans(c, width):
            yield i, j
