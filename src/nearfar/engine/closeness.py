"""How close the rows of a tile are to its columns, and what forces on it do to both.

A measure of closeness turns rows into a tile of products or distances, and a tile of forces into
the gradient of the rows. Either takes little longer than the matrix products inside it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from math import inf, log2
from typing import Protocol

import torch
from torch import Tensor
from torch.linalg import vecdot

from nearfar.distance import (
    Distance,
    about_mean,
    check_distance,
    length,
    safe_power_of_two,
    snr,
    too_short,
    unit,
)
from nearfar.engine.norms import PNorm, by_autograd, manhattan
from nearfar.engine.precision import Precision, Rounding, rounded
from nearfar.engine.products import Gradient, products, squares
from nearfar.engine.relation import Block
from nearfar.engine.slices import add_rows, part, spans
from nearfar.inputs import readable
from nearfar.reduction import sum_dtype


@dataclass(eq=False)
class Tile:
    """Some rows of a comparison against some of its columns.

    Attributes:
        rows: which rows these are: the anchors.
        columns: which columns.
        block: which pairs are similar.
        closeness: (r, c) distances or similarities.
        aside: what the measure set aside for the gradient; None: nothing. Of distances, the pairs
            (k, 2) that were repaired: taken from the rows themselves because digits would have
            cancelled; or an (r, c) bool mask where there are many.
        mirrored: whether the tile stands for its transpose too, in which the columns are anchors.
    """

    rows: slice
    columns: slice
    block: Block
    closeness: Tensor
    aside: Tensor | None = None
    mirrored: bool = False

    @property
    def positive(self) -> Tensor:
        """(r, c) bool, the pairs that are similar."""
        return self._masks[0]

    @property
    def negative(self) -> Tensor:
        """(r, c) bool, the pairs that are dissimilar. A row and itself are neither."""
        return self._masks[1]

    @cached_property
    def _masks(self) -> tuple[Tensor, Tensor]:
        return self.block.masks()

    @property
    def uniform_forces(self) -> bool:
        """Whether no force far outweighs the others, as those on positives do."""
        return self.block.positives is None


class Closeness(Protocol):
    """A measure of closeness.

    Attributes:
        distance_sign: 1 where a small value means close, -1 where a large one does.
        symmetric: whether a row is as close to a column as that to the row, so that a tile of a
            batch with itself may stand for its transpose.
        by_products: whether a tile takes little longer than a matrix product.
        rounding: whether rows may be rounded before they are multiplied.
        kernel: its name in the kernels of `engine/gpu`; None: it has none.
    """

    distance_sign: int
    symmetric: bool
    by_products: bool
    rounding: Rounding
    kernel: str | None

    def prepare(self, a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Rows and columns (None: the rows themselves) as `measure` wants them."""
        ...

    def measure(
        self,
        a: Tensor,
        b: Tensor,
        bound: float = 1.0,
        out: Tensor | None = None,
        precision: Precision = "float32",
    ) -> tuple[Tensor, Tensor | None]:
        """How close rows are to columns.

        Args:
            a: (r, d) prepared rows.
            b: (c, d) prepared columns.
            bound: no exponent made of the closeness is larger than this in size; inf: not known.
            out: (r, c) where the result may be put.
            precision: to which the rows are rounded already.

        Returns:
            (r, c) closeness, and what `backward` needs beside it; see `Tile.aside`.
        """
        ...

    def backward(self, force: Tensor, tile: Tile, gradient: Gradient) -> None:
        """Add the gradient of sum(force * tile.closeness); overwrites both."""
        ...

    def between(self, x: Tensor, y: Tensor, precision: Precision = "float32") -> Tensor:
        """(k,) how close row i of `x` is to row i of `y`, both as `prepare` was given them.

        Or, if their rounding is not "never", both as it returned them, then rounded to `precision`.
        """
        ...

    def between_backward(
        self, force: Tensor, x: Tensor, y: Tensor, closeness: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradients of sum(force * between(x, y)) by `x` and `y`, which may be overwritten."""
        ...


def prepared(
    closeness: Closeness, a: Tensor, b: Tensor | None, precision: Precision
) -> tuple[Tensor, Tensor | None]:
    """Rows and columns as `closeness.measure` wants them, rounded to a precision."""
    a, b = closeness.prepare(a, b)
    return rounded(a, precision), None if b is None else rounded(b, precision)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether they are the same rows: not equal ones, the very same."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape


class Product:
    """The inner product: the closeness of every softmax loss."""

    distance_sign = -1
    symmetric = True
    by_products = True
    rounding: Rounding = "as torch"
    kernel: str | None = "product"

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
        return products(a, b, bound, precision=precision, out=out), None

    def backward(self, force: Tensor, tile: Tile, gradient: Gradient) -> None:
        gradient.add(force, tile.rows, tile.columns, uniform=tile.uniform_forces)

    def between(self, x: Tensor, y: Tensor, precision: Precision = "float32") -> Tensor:
        return (x * y).sum(1)

    def between_backward(
        self, force: Tensor, x: Tensor, y: Tensor, closeness: Tensor
    ) -> tuple[Tensor, Tensor]:
        return y.mul_(force[:, None]), x.mul_(force[:, None])


class LargestProduct:
    """The largest inner product of a row with the k rows that make a column.

    Such as the sub-centres of a class. Of equal products the first counts; it alone gets the force.

    Args:
        k: how many rows of `b` make a column.
    """

    distance_sign = -1
    symmetric = True
    by_products = True
    rounding: Rounding = "as torch"
    kernel: str | None = None

    def __init__(self, k: int) -> None:
        self.k = k

    def prepare(self, a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert b is not None
        return a, b.view(b.shape[0] // self.k, self.k, b.shape[1])

    def measure(
        self,
        a: Tensor,
        b: Tensor,
        bound: float = 1.0,
        out: Tensor | None = None,
        precision: Precision = "float32",
    ) -> tuple[Tensor, Tensor | None]:
        """The largest products (r, c), and which of the k rows each is of, (r, c)."""
        best = products(a, b[:, 0], bound, precision=precision, out=out)
        which = torch.zeros_like(best, dtype=torch.uint8 if self.k <= 256 else torch.int32)
        for i in range(1, self.k):  # one at a time, since all would be k tiles
            values = products(a, b[:, i], bound, precision=precision)
            # The last that is above all before it; masked_fill_ takes ten times as long.
            torch.maximum(which, (values > best).to(which.dtype).mul_(i), out=which)
            torch.maximum(best, values, out=best)
        return best, which

    def backward(self, force: Tensor, tile: Tile, gradient: Gradient) -> None:
        first, last = self.k * tile.columns.start, self.k * (tile.columns.stop - 1)
        for i in range(self.k):
            of_one = force * (tile.aside == i)
            columns = slice(first + i, last + i + 1, self.k)
            gradient.add(of_one, tile.rows, columns, uniform=tile.uniform_forces)

    def between(self, x: Tensor, y: Tensor, precision: Precision = "float32") -> Tensor:
        raise NotImplementedError("pairs with a column of several rows are not listed")

    def between_backward(
        self, force: Tensor, x: Tensor, y: Tensor, closeness: Tensor
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("pairs with a column of several rows are not listed")


class CosineDistance:
    """1 - cos, of unit rows.

    It loses its digits where rows are close: there it is |a - b|^2 / 2, in the value and in the
    gradient, and never negative. Rounded rows are no longer of length 1: theirs is that everywhere.
    """

    distance_sign = 1
    symmetric = True
    by_products = True
    rounding: Rounding = "if asked"
    kernel: str | None = "cosine"
    # In float32, a smaller distance may be off by more than 1e-4 of itself.
    CANCELS = 1e-3

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
        if precision == "float32":
            values = products(a, b, bound, out=out).neg_().add_(1)
        else:
            of_a, of_b = map(squares_of_directions, (a, b))
            values = squares(a, b, of_a, of_b, precision).div_(2)
        if not values.numel():
            return values, None

        def cancelling() -> Tensor | None:
            if values.amin().item() > self.CANCELS:
                return None
            of_a, of_b = (values.new_full((t.shape[0],), 0.5) for t in (a, b))  # of unit rows
            return _cancelling(values, of_a, of_b, 1.0, self.CANCELS)

        return values, _repaired(_but_selves(cancelling, values, a, b), values, a, b, unit=True)

    def backward(self, force: Tensor, tile: Tile, gradient: Gradient) -> None:
        # That of a . b is b; normalisation takes away its part along a later, with its digits.
        _take_repaired(force, tile, gradient)
        if gradient.precision == "float32":
            gradient.add(force, tile.rows, tile.columns, -1, uniform=tile.uniform_forces)
        else:
            gradient.add_squares(force, tile.rows, tile.columns, uniform=tile.uniform_forces)

    def between(self, x: Tensor, y: Tensor, precision: Precision = "float32") -> Tensor:
        if precision != "float32":
            return cosine_of_difference(x - y, x, y)
        d: Tensor = vecdot(x, y).neg_().add_(1)
        (near,) = (d <= self.CANCELS).nonzero(as_tuple=True)
        return d.index_copy_(0, near, (x[near] - y[near]).square_().sum(1).div_(2))

    def between_backward(
        self, force: Tensor, x: Tensor, y: Tensor, closeness: Tensor
    ) -> tuple[Tensor, Tensor]:
        of_x = x.sub_(y).mul_(force[:, None])
        return of_x, of_x.neg()


def squares_of_directions(x: Tensor) -> Tensor:
    """(n,) the squared lengths of rows that were at length 1 before they were rounded.

    A row of zeros has no direction; 1 puts it at cosine distance 1 from everything.
    """
    of_x: Tensor = vecdot(x, x)
    return of_x.masked_fill(of_x == 0, 1)


def cosine_of_difference(difference: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """(k,) 1 - cos of rows at about length 1, or of length 0 where they have no direction."""
    square: Tensor = vecdot(difference, difference)
    return square.add_(2 - vecdot(x, x).round_() - vecdot(y, y).round_()).div_(2)


class Euclidean:
    """|a - b| or its square, from inner products of centred rows.

    |a|^2 + |b|^2 - 2ab loses its digits where a and b are close. Centring avoids most of that;
    the pairs that remain are repaired: their value and gradient are taken from a - b itself.
    """

    distance_sign = 1
    symmetric = True
    by_products = True
    rounding: Rounding = "if asked"
    kernel: str | None
    # With less than this share of |a|^2 + |b|^2 left, a float32 distance is not exact to 1e-5.
    CANCELS = 0.02

    def __init__(self, squared: bool) -> None:
        self.squared = squared
        self.kernel = "sqeuclidean" if squared else "euclidean"

    def prepare(self, a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        everything = a if b is None else torch.cat([a, b])
        if not everything.numel():
            return a, b
        # A common shift changes no distance. A coordinate is centred where all its values lie far
        # on one side of 0: there the subtraction is exact, so that close pairs keep their distance.
        low, high = everything.amin(0), everything.amax(0)  # aminmax takes several times as long
        ask = b is None and readable(a)
        if ask and (low * high).amax().item() <= 0:  # no coordinate is: the quick answer
            return a, None
        centre = low.lerp(high, 0.5)
        centre = centre.where(centre.abs() > high - low, 0)
        if ask and not centre.any():
            return a, None
        # New tensors: one array given twice must not be taken for rows compared with themselves.
        return a - centre, None if b is None else b - centre

    def measure(
        self,
        a: Tensor,
        b: Tensor,
        bound: float = 1.0,
        out: Tensor | None = None,
        precision: Precision = "float32",
    ) -> tuple[Tensor, Tensor | None]:
        of_a = torch.linalg.vecdot(a, a)
        of_b = of_a if same(a, b) else torch.linalg.vecdot(b, b)
        if not (a.shape[0] and b.shape[0]):
            return a.new_zeros(a.shape[0], b.shape[0]), None
        largest = of_a.amax()
        most = (largest + (largest if of_b is of_a else of_b.amax())).item()
        if most == inf and a.isfinite().all() and b.isfinite().all():
            return self._scaled_down(a, b, of_a, of_b, precision)
        apart = squares(a, b, of_a, of_b, precision)

        def cancelling() -> Tensor | None:
            return _cancelling(apart, of_a, of_b, most, self.CANCELS)

        close = _repaired(_but_selves(cancelling, apart, a, b), apart, a, b, unit=False)
        return apart if self.squared else apart.sqrt_(), close

    def _scaled_down(
        self, a: Tensor, b: Tensor, of_a: Tensor, of_b: Tensor, precision: Precision
    ) -> tuple[Tensor, Tensor]:
        """A tile with rows too long to be squared, scaled by a power of two, which is exact.

        Pairs of two short rows are measured unscaled. A distance or square that the dtype cannot
        hold is its largest number.
        """
        largest, down = torch.finfo(a.dtype).max, safe_power_of_two(a.dtype)
        values, far = self.measure(a * down, b * down, precision=precision)
        values = values.div_(down).div_(down if self.squared else 1).clamp_(max=largest)
        short_a, short_b = of_a < largest / 4, of_b < largest / 4
        i, j = short_a.nonzero()[:, 0], short_b.nonzero()[:, 0]
        values[i[:, None], j], near = self.measure(a[i], b[j], precision=precision)
        none = torch.zeros(0, 2, dtype=torch.int64, device=a.device)
        row, column = (none if far is None else far).unbind(1)
        of_long = ~(short_a[row] & short_b[column])
        near_row, near_column = (none if near is None else near).unbind(1)
        rows = torch.cat([row[of_long], i[near_row]])
        columns = torch.cat([column[of_long], j[near_column]])
        return values, torch.stack([rows, columns], 1)

    def backward(self, force: Tensor, tile: Tile, gradient: Gradient) -> None:
        # The gradient of the distance is (a - b) / d, that of its square 2 (a - b).
        d, by = tile.closeness, self._on_square(force, tile.closeness)
        if tile.aside is not None and not self.squared:
            by.masked_fill_(d == 0, 0)
        _take_repaired(by, tile, gradient)
        gradient.add_squares(by, tile.rows, tile.columns, uniform=tile.uniform_forces)

    def between(self, x: Tensor, y: Tensor, precision: Precision = "float32") -> Tensor:
        if not self.squared:
            return length(x - y)
        return (x - y).square_().sum(1).clamp_(max=torch.finfo(x.dtype).max)

    def between_backward(
        self, force: Tensor, x: Tensor, y: Tensor, closeness: Tensor
    ) -> tuple[Tensor, Tensor]:
        by = force * 2 if self.squared else (force / closeness).masked_fill_(closeness == 0, 0)
        of_x = x.sub_(y).mul_(by[:, None])
        return of_x, of_x.neg()

    def _on_square(self, force: Tensor, d: Tensor) -> Tensor:
        """Twice the force on the square of a distance; overwrites that on the distance."""
        return force.mul_(2) if self.squared else force.div_(d)


class NegatedSquares:
    """-|a - b|^2, a similarity."""

    distance_sign = -1
    symmetric = True
    by_products = True
    rounding: Rounding = "if asked"
    kernel: str | None = "negated"

    def __init__(self) -> None:
        self._squares = Euclidean(squared=True)

    def prepare(self, a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self._squares.prepare(a, b)

    def measure(
        self,
        a: Tensor,
        b: Tensor,
        bound: float = 1.0,
        out: Tensor | None = None,
        precision: Precision = "float32",
    ) -> tuple[Tensor, Tensor | None]:
        squares, repaired = self._squares.measure(a, b, bound, out, precision)
        return squares.neg_(), repaired

    def backward(self, force: Tensor, tile: Tile, gradient: Gradient) -> None:
        self._squares.backward(force.neg_(), tile, gradient)

    def between(self, x: Tensor, y: Tensor, precision: Precision = "float32") -> Tensor:
        return self._squares.between(x, y).neg_()

    def between_backward(
        self, force: Tensor, x: Tensor, y: Tensor, closeness: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self._squares.between_backward(-force, x, y, closeness)


class SignalToNoise:
    """var(a - b) / var(a): |a - b|^2 / |a|^2 of rows minus their own mean; see `distance.snr`.

    A common factor changes nothing, so rows are scaled by a power of two at which the squares of
    the longest can be held, and those of rows 1e35 times shorter too.
    """

    distance_sign = 1
    symmetric = False
    by_products = True
    rounding: Rounding = "never"
    kernel: str | None = None

    def __init__(self) -> None:
        self._squares = Euclidean(squared=True)
        self._scale: Tensor | float = 1.0  # of the rows, since `prepare`

    def prepare(self, a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        rows = _signals(a)
        columns = None if b is None else _signals(b)
        largest = [t.abs().amax() for t in (rows, columns) if t is not None and t.numel()]
        if largest:
            self._scale = _power_of_two(torch.stack(largest).amax())
        for t in (rows, columns):
            if t is not None:
                t.mul_(self._scale)
        return rows, columns

    def measure(
        self,
        a: Tensor,
        b: Tensor,
        bound: float = 1.0,
        out: Tensor | None = None,
        precision: Precision = "float32",
    ) -> tuple[Tensor, Tensor | None]:
        values, repaired = self._squares.measure(a, b, bound, out)
        of_a = _powers(a)
        values.div_(of_a).clamp_(max=torch.finfo(a.dtype).max)
        return values.masked_fill_(of_a == inf, 1), repaired

    def backward(self, force: Tensor, tile: Tile, gradient: Gradient) -> None:
        # The gradient of the distance is 2 (a - b) / |a|^2, and by the length of a, -2 d a / |a|^2.
        a = part(gradient.a, tile.rows)
        too_large = tile.closeness >= torch.finfo(force.dtype).max
        by = force.masked_fill_(too_large, 0).mul_(2 * self._scale / _powers(a))
        pull = torch.linalg.vecdot(by, tile.closeness)
        _take_repaired(by, tile, gradient)
        gradient.add_squares(by, tile.rows, tile.columns, uniform=tile.uniform_forces)
        gradient.of_rows(tile.rows).addcmul_(pull[:, None], a, value=-1)

    def between(self, x: Tensor, y: Tensor, precision: Precision = "float32") -> Tensor:
        return snr(x, y)

    def between_backward(
        self, force: Tensor, x: Tensor, y: Tensor, closeness: Tensor
    ) -> tuple[Tensor, Tensor]:
        return by_autograd(snr, force, x, y)


def _signals(x: Tensor) -> Tensor:
    """Rows minus their mean, in new memory, and 0 where that is too short to be a signal."""
    signal = about_mean(x)
    size = signal.abs().amax(1, keepdim=True)
    return signal.masked_fill_(size < too_short(x.dtype), 0)


def _powers(signals: Tensor) -> Tensor:
    """(r, 1) the squared lengths of signals; inf where there is none."""
    of_a: Tensor = torch.linalg.vecdot(signals, signals)[:, None]
    return of_a.masked_fill_(of_a < torch.finfo(of_a.dtype).tiny, inf)


def _power_of_two(largest: Tensor) -> Tensor:
    """A power of two that makes a number so large that sums of its square are still finite."""
    finite = round(log2(torch.finfo(largest.dtype).max))
    exponent = finite // 2 - 10 - largest.frexp().exponent
    return torch.ldexp(torch.ones_like(largest), exponent.clamp(max=finite - 1))


def _but_selves(
    cancelling: Callable[[], Tensor | None], values: Tensor, a: Tensor, b: Tensor
) -> Tensor | None:
    """The pairs whose digits cancel, leaving out a row's distance to itself.

    No loss compares a row with itself, so that entry is never repaired; it is set to 1.
    """
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return cancelling()
    own = values.diagonal((a.storage_offset() - b.storage_offset()) // a.shape[1])
    own.fill_(inf)
    close = cancelling()
    own.fill_(1)
    return close


# In a batch of unit rows that collapses, so many pairs are close that all are repaired at once, in
# float64. Of rows of any length, that would not keep enough digits.
_MANY, _MANY_OF = 2**14, 16


def _repaired(
    close: Tensor | None, values: Tensor, a: Tensor, b: Tensor, *, unit: bool
) -> Tensor | None:
    """The pairs (k, 2), or a mask of many, whose |a - b|^2 is put in, halved for unit rows."""
    if close is None:
        return None
    many = unit and len(close) > max(_MANY, values.numel() // _MANY_OF)
    if not many or values.dtype is sum_dtype(values):
        for i, j in _chunks(close, values, a):
            squares = (a[i] - b[j]).square().sum(1)
            values[i, j] = squares.div_(2) if unit else squares
        return close
    mask = torch.zeros_like(values, dtype=torch.bool)
    mask[close[:, 0], close[:, 1]] = True
    torch.where(mask, _in_float64(a, b).to(values.dtype), values, out=values)
    return mask


def _take_repaired(by: Tensor, tile: Tile, gradient: Gradient) -> None:
    """Add the gradient of sum(by * |a - b|^2) / 2 over repaired pairs, where `by` becomes 0."""
    rows, columns, repaired = tile.rows, tile.columns, tile.aside
    a, b = part(gradient.a, rows), part(gradient.b, columns)
    if repaired is not None and repaired.dtype is torch.bool:
        x, y, pull = (t.to(sum_dtype(t)) for t in (a, b, by.where(repaired, 0)))
        of_rows = torch.addmm(pull.sum(1)[:, None] * x, pull, y, alpha=-1)
        of_columns = torch.addmm(pull.sum(0)[:, None] * y, pull.T, x, alpha=-1)
        gradient.of_rows(rows).add_(of_rows)
        gradient.of_columns(columns).add_(of_columns)
        by.masked_fill_(repaired, 0)
        return
    for i, j in _chunks(repaired, by, gradient.a):
        pull = by[i, j][:, None] * (a[i] - b[j])
        add_rows(gradient.of_rows(rows), i, pull)
        add_rows(gradient.of_columns(columns), j, pull.neg_())
        by[i, j] = 0


def _in_float64(a: Tensor, b: Tensor) -> Tensor:
    """(r, c) |a - b|^2 / 2 of unit rows, from products that keep what float32 loses."""
    a, b = a.to(sum_dtype(a)), b.to(sum_dtype(b))
    of_a, of_b = (torch.linalg.vecdot(t, t).div_(2) for t in (a, b))
    return torch.add(of_a[:, None], of_b).addmm_(a, b.T, alpha=-1).clamp_(min=0)


def _cancelling(
    squares: Tensor, of_a: Tensor, of_b: Tensor, most: float, share: float
) -> Tensor | None:
    """(k, 2) the pairs of which at most a share of |a|^2 + |b|^2 is left; None: no pair.

    No |a|^2 + |b|^2 is larger than `most`.
    """
    # Usually the smallest square shows that there is no such pair: in the tile, or in a row.
    if squares.amin().item() > share * most:
        return None
    rows = (squares.amin(1) <= share * (of_a + of_b.amax())).nonzero()[:, 0]
    if not len(rows):
        return None
    row, column = (squares[rows] <= share * (of_a[rows, None] + of_b)).nonzero(as_tuple=True)
    return torch.stack([rows[row], column], 1)


def _chunks(pairs: Tensor | None, tile: Tensor, a: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Row and column indices of the pairs, at most as many at a time as their rows fill a tile."""
    if pairs is None:
        return
    for chunk in spans(len(pairs), max(1, tile.numel() // a.shape[1])):
        yield pairs[chunk, 0], pairs[chunk, 1]


_MEASURES: dict[Distance, Callable[[], Closeness]] = {
    "euclidean": partial(Euclidean, squared=False),
    "sqeuclidean": partial(Euclidean, squared=True),
    "cosine": CosineDistance,  # of unit rows
    "snr": SignalToNoise,
    "manhattan": manhattan,
}


def by_distance(distance: Distance) -> Closeness:
    """The measure of a distance; cosine wants unit rows."""
    known = check_distance(distance)
    return PNorm(known) if isinstance(known, float) else _MEASURES[known]()


# Below this cosine distance, the rounding of unit rows outweighs that of the distance.
_SHARP = 1e-4


def sharpen(
    values: Tensor, repaired: Tensor | None, x: Tensor, y: Tensor, times: float = 1.0
) -> None:
    """Measure the smallest cosine distances of a tile again, from the rows before normalisation.

    Unit rows are rounded to float32, which may exchange the nearest two.

    Args:
        values: (r, c) cosine distances of unit rows, times `times`; changed.
        repaired: from `CosineDistance.measure`.
        x: (r, d) the rows, of any length.
        y: (c, d) the columns, of any length.
        times: a factor.
    """
    if repaired is None:
        return
    if repaired.dtype is torch.bool:
        u, v = (unit(t.to(sum_dtype(t))) for t in (x, y))
        anew = _in_float64(u, v).mul_(times).to(values.dtype)
        torch.where(repaired, anew, values, out=values)
        return
    i, j = repaired.unbind(1)
    smallest = repaired[values[i, j] <= times * _SHARP]
    for i, j in _chunks(smallest, values, x):
        gap = unit(x[i].to(sum_dtype(x))) - unit(y[j].to(sum_dtype(x)))
        values[i, j] = gap.square().sum(1).mul_(times / 2).to(values.dtype)
