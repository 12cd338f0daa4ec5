"""How close rows are to columns, one tile at a time, and what a force on it does to them.

A closeness turns prepared rows into a tile of products or distances, and pulls a tile of forces
back to the rows; both at the cost of the matrix products inside.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf
from typing import Protocol

import torch
from torch import Tensor

from nearfar.distance import Distance, largest, modest, unit
from nearfar.engine.places import exact
from nearfar.engine.products import Gradient, products, squares
from nearfar.engine.slices import part, spans


@dataclass(eq=False)
class Tile:
    """What is between some rows and some columns.

    Attributes:
        values: (r, c) closeness; the caller may change them until `pull_back`.
        close: pairs (k, 2) whose value was taken from the rows themselves, or where there are many
            of them an (r, c) bool mask; None: none.
    """

    values: Tensor
    close: Tensor | None = None


class Closeness(Protocol):
    """What the executors ask of a measure of closeness.

    Attributes:
        toward: 1 where a small value means close, -1 where a large one does.
    """

    toward: int

    def prepare(self, a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Rows and columns (None: the rows themselves) as `tile` wants them."""
        ...

    def tile(self, a: Tensor, b: Tensor, bound: float = 1.0) -> Tile:
        """How close rows are to columns.

        Args:
            a: (r, d) prepared rows.
            b: (c, d) prepared columns.
            bound: no exponent made of the closeness is larger in size than this; inf: not known.
        """
        ...

    def pull_back(
        self,
        force: Tensor,
        tile: Tile,
        gradient: Gradient,
        rows: slice,
        columns: slice,
        *,
        even: bool = False,
    ) -> None:
        """Add the gradient of sum(force * tile.values); may overwrite `force`.

        Args:
            force: (r, c) on each pair of the tile.
            tile: as it came from `tile`.
            gradient: what to add to.
            rows: of the tile.
            columns: of the tile.
            even: whether no force is far larger than the others, as those on positives are.
        """
        ...


def same(a: Tensor, b: Tensor) -> bool:
    """Whether they are the same rows: not equal ones, the very same."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape


class Product:
    """The inner product: the closeness of every softmax loss."""

    toward = -1

    def prepare(self, a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return a, b

    def tile(self, a: Tensor, b: Tensor, bound: float = 1.0) -> Tile:
        return Tile(products(a, b, bound))

    def pull_back(
        self,
        force: Tensor,
        tile: Tile,
        gradient: Gradient,
        rows: slice,
        columns: slice,
        *,
        even: bool = False,
    ) -> None:
        gradient.add(force, rows, columns, -self.toward, even=even)


class CosineDistance(Product):
    """1 - cos, of unit rows.

    It loses its digits where rows are close: there it is |a - b|^2 / 2, in the value and in the
    gradient, and never negative.
    """

    toward = 1
    # A smaller distance is not sure to 1e-4 in float32.
    CANCELS = 1e-3

    def tile(self, a: Tensor, b: Tensor, bound: float = 1.0) -> Tile:
        values = products(a, b, bound).neg_().add_(1)
        if not values.numel():
            return Tile(values)

        def cancelling() -> Tensor | None:
            if values.amin().item() > self.CANCELS:
                return None
            of_a, of_b = (values.new_full((t.shape[0],), 0.5) for t in (a, b))  # of unit rows
            return _cancelling(values, of_a, of_b, 1.0, self.CANCELS)

        close = _but_selves(cancelling, values, a, b)
        if close is not None and _many(close, values):
            close = _mask(close, values)
            torch.where(close, _widely(a, b).to(values.dtype), values, out=values)
            return Tile(values, close)
        for rows, columns in _chunks(close, values, a):
            values[rows, columns] = (a[rows] - b[columns]).square().sum(1).div_(2)
        return Tile(values, close)

    def pull_back(
        self,
        force: Tensor,
        tile: Tile,
        gradient: Gradient,
        rows: slice,
        columns: slice,
        *,
        even: bool = False,
    ) -> None:
        # That of a . b is b, of which the part along a is taken away later, with its digits.
        if tile.close is not None and tile.close.dtype is torch.bool:
            _pull_widely(gradient, rows, columns, force.where(tile.close, 0))
            force.masked_fill_(tile.close, 0)
        else:
            for i, j in _chunks(tile.close, force, gradient.a):
                _pull(gradient, rows, columns, i, j, force[i, j])
                force[i, j] = 0
        super().pull_back(force, tile, gradient, rows, columns, even=even)


class Euclidean:
    """|a - b| or its square, from inner products of centred rows.

    |a|^2 + |b|^2 - 2ab loses its digits where a and b are close: what the centring leaves of that
    is repaired by taking the differences of those pairs themselves, in the value and in the
    gradient.
    """

    toward = 1
    # With less than this share of |a|^2 + |b|^2 left the distance is not sure to 1e-5 in float32.
    CANCELS = 0.02

    def __init__(self, squared: bool) -> None:
        self.squared = squared

    def prepare(self, a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        everything = a if b is None else torch.cat([a, b])
        if not everything.numel():
            return a, b
        # No distance feels a common shift. A coordinate is centred where it lies on one side of 0,
        # far from it: there the subtraction is exact, so that close pairs keep their distance.
        low, high = everything.amin(0), everything.amax(0)  # aminmax takes several times as long
        as_they_are = b is None and a.is_cpu  # asking would stall a GPU
        if as_they_are and (low * high).amax().item() <= 0:  # none does: the quicker answer
            return a, None
        centre = low.lerp(high, 0.5)
        centre = centre.where(centre.abs() > high - low, 0)
        if as_they_are and not centre.any():
            return a, None
        # New tensors: `tile` must not take an array passed twice for rows with themselves.
        return a - centre, None if b is None else b - centre

    def tile(self, a: Tensor, b: Tensor, bound: float = 1.0) -> Tile:
        of_a = torch.linalg.vecdot(a, a)
        of_b = of_a if same(a, b) else torch.linalg.vecdot(b, b)
        if not (a.shape[0] and b.shape[0]):
            return Tile(a.new_zeros(a.shape[0], b.shape[0]))
        largest = of_a.amax()
        reach = (largest + (largest if of_b is of_a else of_b.amax())).item()
        if reach == inf and a.isfinite().all() and b.isfinite().all():
            return self._beyond(a, b, of_a, of_b)
        apart = squares(a, b, of_a, of_b)

        def cancelling() -> Tensor | None:
            return _cancelling(apart, of_a, of_b, reach, self.CANCELS)

        close = _but_selves(cancelling, apart, a, b)
        for rows, columns in _chunks(close, apart, a):
            apart[rows, columns] = (a[rows] - b[columns]).square().sum(1)
        return Tile(apart if self.squared else apart.sqrt_(), close)

    def _beyond(self, a: Tensor, b: Tensor, of_a: Tensor, of_b: Tensor) -> Tile:
        """A tile with rows too long to be squared: all brought down, but short pairs as they are.

        They come down by a power of two, which costs no digit. A distance or square that is too
        large for the dtype is its largest number.
        """
        largest, down = torch.finfo(a.dtype).max, modest(a.dtype)
        far = self.tile(a * down, b * down)
        values = far.values.div_(down).div_(down if self.squared else 1).clamp_(max=largest)
        short_a, short_b = of_a < largest / 4, of_b < largest / 4
        i, j = short_a.nonzero()[:, 0], short_b.nonzero()[:, 0]
        near = self.tile(a[i], b[j])
        values[i[:, None], j] = near.values
        close = [torch.zeros(0, 2, dtype=torch.int64, device=a.device)]
        if far.close is not None:
            row, column = far.close.unbind(1)
            close.append(far.close[~(short_a[row] & short_b[column])])
        if near.close is not None:
            row, column = near.close.unbind(1)
            close.append(torch.stack([i[row], j[column]], 1))
        return Tile(values, torch.cat(close))

    def pull_back(
        self,
        force: Tensor,
        tile: Tile,
        gradient: Gradient,
        rows: slice,
        columns: slice,
        *,
        even: bool = False,
    ) -> None:
        # The gradient of the distance is (a - b) / d, that of its square 2 (a - b).
        d = tile.values
        for i, j in _chunks(tile.close, force, gradient.a):
            by = self._by_square(force[i, j], d[i, j]).masked_fill_(d[i, j] == 0, 0)
            _pull(gradient, rows, columns, i, j, by)
            force[i, j], d[i, j] = 0, 1
        gradient.add_apart(self._by_square(force, d), rows, columns, even=even)

    def _by_square(self, force: Tensor, d: Tensor) -> Tensor:
        """Twice the force on the square of a distance; overwrites that on the distance."""
        return force.mul_(2) if self.squared else force.div_(d)


def _but_selves(
    cancelling: Callable[[], Tensor | None], values: Tensor, a: Tensor, b: Tensor
) -> Tensor | None:
    """The pairs whose digits cancel; of rows with themselves, none of a row with itself.

    No loss compares these, nor need they be repaired; 1 stands between them.
    """
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return cancelling()
    own = values.diagonal((a.storage_offset() - b.storage_offset()) // a.shape[1])
    own.fill_(inf)
    close = cancelling()
    own.fill_(1)
    return close


def _pull(
    gradient: Gradient, rows: slice, columns: slice, i: Tensor, j: Tensor, by: Tensor
) -> None:
    """Add that of sum(by * |a - b|^2) / 2 over the pairs i, j of a tile."""
    a, b = part(gradient.a, rows), part(gradient.b, columns)
    pull = by[:, None] * (a[i] - b[j])
    add_rows(gradient.of_rows(rows), i, pull)
    add_rows(gradient.of_columns(columns), j, pull.neg_())


# Where so many pairs are close as in a batch that collapses, they are taken together in float64.
_MANY, _MANY_OF = 2**14, 16


def _many(close: Tensor, values: Tensor) -> bool:
    enough = len(close) > max(_MANY, values.numel() // _MANY_OF)
    return enough and values.dtype is not exact(values)


def _mask(close: Tensor, values: Tensor) -> Tensor:
    mask = torch.zeros_like(values, dtype=torch.bool)
    mask[close[:, 0], close[:, 1]] = True
    return mask


def _widely(a: Tensor, b: Tensor) -> Tensor:
    """(r, c) |a - b|^2 / 2 of unit rows in float64, whose products keep what float32 loses."""
    a, b = a.to(exact(a)), b.to(exact(b))
    of_a, of_b = (torch.linalg.vecdot(t, t).div_(2) for t in (a, b))
    return torch.add(of_a[:, None], of_b).addmm_(a, b.T, alpha=-1).clamp_(min=0)


def _pull_widely(gradient: Gradient, rows: slice, columns: slice, by: Tensor) -> None:
    """Add that of sum(by * |a - b|^2) / 2 over all pairs of a tile, in float64."""
    a, b, by = (t.to(exact(t)) for t in (part(gradient.a, rows), part(gradient.b, columns), by))
    gradient.of_rows(rows).add_(torch.addmm(by.sum(1)[:, None] * a, by, b, alpha=-1))
    gradient.of_columns(columns).add_(torch.addmm(by.sum(0)[:, None] * b, by.T, a, alpha=-1))


def _cancelling(
    squares: Tensor, of_a: Tensor, of_b: Tensor, reach: float, share: float
) -> Tensor | None:
    """(k, 2) the pairs of which less than a share of |a|^2 + |b|^2 is left, or nothing at all.

    No |a|^2 + |b|^2 is larger than `reach`.
    """
    # The smallest square mostly tells that there is no such pair: in the tile, or in a row.
    if squares.amin().item() > share * reach:
        return None
    rows = (squares.amin(1) <= share * (of_a + of_b.amax())).nonzero()[:, 0]
    if not len(rows):
        return None
    row, column = (squares[rows] <= share * (of_a[rows, None] + of_b)).nonzero(as_tuple=True)
    return torch.stack([rows[row], column], 1)


def _chunks(pairs: Tensor | None, tile: Tensor, a: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Row and column indices of the pairs, as many at a time as have their rows fit a tile."""
    if pairs is None:
        return
    for chunk in spans(len(pairs), max(1, tile.numel() // a.shape[1])):
        yield pairs[chunk, 0], pairs[chunk, 1]


def by_distance(distance: Distance) -> Closeness:
    """The tiles of a distance by its name; cosine wants unit rows."""
    largest(distance)  # refuses an unknown name
    return CosineDistance() if distance == "cosine" else Euclidean(distance == "sqeuclidean")


# Of smaller cosine distances, the rounding of unit rows is more than that of the distance.
_SHARP = 1e-4


def sharpen(tile: Tile, x: Tensor, y: Tensor, times: float = 1.0) -> None:
    """Take the smallest cosine distances of a tile anew, from the rows before they were scaled.

    Unit rows in float32 are rounded, which may exchange the nearest two.

    Args:
        tile: of the unit rows; changed.
        x: (r, d) the rows, of any length.
        y: (c, d) the columns, of any length.
        times: what stands in the tile is the cosine distance times this.
    """
    if tile.close is None:
        return
    if tile.close.dtype is torch.bool:
        u, v = (unit(t.to(exact(t))) for t in (x, y))
        anew = _widely(u, v).mul_(times).to(tile.values.dtype)
        torch.where(tile.close, anew, tile.values, out=tile.values)
        return
    i, j = tile.close.unbind(1)
    smallest = tile.close[tile.values[i, j] <= times * _SHARP]
    for i, j in _chunks(smallest, tile.values, x):
        gap = unit(x[i].to(exact(x))) - unit(y[j].to(exact(x)))
        tile.values[i, j] = gap.square().sum(1).mul_(times / 2).to(tile.values.dtype)


def add_rows(to: Tensor, index: Tensor, rows: Tensor, by: float = 1) -> None:
    """Add by * rows[k] to to[index[k]], the same bits every time."""
    if to.is_cpu:
        to.index_add_(0, index, rows, alpha=by)
    else:  # there index_add_ adds in any order; this one sorts first
        to.index_put_((index,), rows * by, accumulate=True)
