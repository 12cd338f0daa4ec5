"""How close rows are to columns, one tile at a time, and what a force on it does to them.

A closeness turns prepared rows into a tile of products or distances, and pulls a tile of forces
back to the rows; both at the cost of the matrix products inside.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from nearfar.distance import Distance, largest
from nearfar.engine.budget import spans


class Closeness(Protocol):
    """What the executors ask of a measure of closeness."""

    def prepare(self, a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Rows and columns (None: the rows themselves) as `tile` wants them."""
        ...

    def tile(self, a: Tensor, b: Tensor) -> Tensor:
        """(r, c) closeness of rows `a` (r, d) and columns `b` (c, d); the caller may overwrite."""
        ...

    def pull_back(
        self, force: Tensor, tile: Tensor, a: Tensor, b: Tensor, da: Tensor, db: Tensor
    ) -> None:
        """Add to `da`, `db` the gradient of sum(force * tile); may overwrite `force`."""
        ...


class Product:
    """The inner product: the closeness of every softmax loss."""

    def prepare(self, a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return a, b

    def tile(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b.T

    def pull_back(
        self, force: Tensor, tile: Tensor, a: Tensor, b: Tensor, da: Tensor, db: Tensor
    ) -> None:
        da.addmm_(force, b)
        db.addmm_(force.T, a)


class CosineDistance(Product):
    """1 - cos, of unit rows."""

    def tile(self, a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T).neg_().add_(1)

    def pull_back(
        self, force: Tensor, tile: Tensor, a: Tensor, b: Tensor, da: Tensor, db: Tensor
    ) -> None:
        da.addmm_(force, b, alpha=-1)
        db.addmm_(force.T, a, alpha=-1)


class Euclidean:
    """|a - b| or its square, from inner products of centred rows.

    |a|^2 + |b|^2 - 2ab loses its digits where a and b are close: what the centring leaves of that
    is repaired by taking the differences of those pairs themselves, in the value and in the
    gradient.
    """

    # Below this share of |a|^2 + |b|^2 less than 1e-4 of the distance would be left of float32.
    CANCELS = 0.02

    def __init__(self, squared: bool) -> None:
        self.squared = squared

    def prepare(self, a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        everything = a if b is None else torch.cat([a, b])
        centre = everything.mean(0) if len(everything) else 0  # no distance feels a common shift
        return a - centre, None if b is None else b - centre

    def tile(self, a: Tensor, b: Tensor) -> Tensor:
        squares, sizes = self._squares(a, b)
        for rows, columns in self._close(squares, sizes, a.shape[1]):
            squares[rows, columns] = (a[rows] - b[columns]).square().sum(1)
        return squares if self.squared else squares.sqrt_()

    def pull_back(
        self, force: Tensor, tile: Tensor, a: Tensor, b: Tensor, da: Tensor, db: Tensor
    ) -> None:
        # The gradient of the distance is (a - b) / d, that of its square 2 (a - b).
        force = force.mul_(2) if self.squared else force.div_(tile).masked_fill_(tile == 0, 0)
        squares = tile if self.squared else tile.square()
        sizes = self._sizes(a, b)
        for rows, columns in self._close(squares, sizes, a.shape[1]):
            pull = force[rows, columns][:, None] * (a[rows] - b[columns])
            _add_rows(da, rows, pull)
            _add_rows(db, columns, pull.neg_())
            force[rows, columns] = 0
        da.addcmul_(force.sum(1)[:, None], a).addmm_(force, b, alpha=-1)
        db.addcmul_(force.sum(0)[:, None], b).addmm_(force.T, a, alpha=-1)

    def _squares(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        sizes = self._sizes(a, b)
        return torch.addmm(sizes, a, b.T, alpha=-2).clamp_(min=0), sizes

    def _sizes(self, a: Tensor, b: Tensor) -> Tensor:
        return a.square().sum(1)[:, None] + b.square().sum(1)

    def _close(self, squares: Tensor, sizes: Tensor, d: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The pairs whose digits cancel, as index pairs in chunks of a tile's memory."""
        pairs = (squares < self.CANCELS * sizes).nonzero()
        for chunk in spans(len(pairs), max(1, squares.numel() // d)):
            yield pairs[chunk, 0], pairs[chunk, 1]


def by_distance(distance: Distance) -> Closeness:
    """The tiles of a distance by its name; cosine wants unit rows."""
    largest(distance)  # refuses an unknown name
    return CosineDistance() if distance == "cosine" else Euclidean(distance == "sqeuclidean")


def _add_rows(to: Tensor, index: Tensor, rows: Tensor) -> None:
    """Add rows[k] to to[index[k]], the same bits every time."""
    if to.device.type == "cpu":
        to.index_add_(0, index, rows)
    else:  # there index_add_ adds in any order; this one sorts first
        to.index_put_((index,), rows, accumulate=True)
