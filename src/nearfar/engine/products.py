"""The matrix products inside the losses, by the faster of torch's two routines, and the gradient.

On a CPU, `torch.mm` calls MKL, which leaves a third of an AMD processor unused. Torch also has
oneDNN, whose product of float32 rows is 1.1 to 1.4 times as fast there. But oneDNN adds up the
terms of an entry one by one, and MKL in blocks. With 128 terms the rounding errors are alike; with
500 to 1,024 oneDNN's is 1.7 times as large, with more it is over twice as large, and one very large
term erases the digits of the others. So MKL keeps those sums, and all but the shortest sums where
little time can be gained.
"""

from collections.abc import Callable
from functools import cache, cached_property

import torch
from torch import Tensor

from nearfar.engine.precision import NARROW, Precision, rounded_forces, up_to_float16
from nearfar.engine.slices import part

_one_dnn: Callable[..., Tensor] | None = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
# Without AVX-512 the two are equally fast.
_THERE = _one_dnn is not None and torch.backends.cpu.get_cpu_capability() == "AVX512"
# Measured: with fewer multiplications, or fewer rows on either side, nothing is gained.
_FEWEST, _FEWEST_ROWS = 2**25, 256
# Sums of up to _ALIKE terms are as exact as torch.mm's. Up to _SHORT terms the rounding error is at
# most 1.4 times as large, up to _LONG terms 1.7 times, which is only worth it from _LARGE
# multiplications on.
_ALIKE, _SHORT, _LONG, _LARGE = 128, 256, 1024, 2**28
# Above this exponent, rounding error dominates the exponential.
_SMALL_EXPONENT = 16.0


def products(
    a: Tensor,
    b: Tensor,
    bound: float = 1.0,
    *,
    precision: Precision = "float32",
    out: Tensor | None = None,
) -> Tensor:
    """The inner products of rows.

    Args:
        a: (r, d).
        b: (c, d).
        bound: no exponent made of them is larger than this in size; inf: not known.
        precision: to which the rows are rounded already.
        out: (r, c) where the result may be put; it is, where that costs nothing.

    Returns:
        (r, c).
    """
    if (narrow := _narrow(precision, a)) is not None:
        return _in_narrow(a, b.T, narrow)
    fine = bound <= _SMALL_EXPONENT or a.shape[1] <= _ALIKE
    return (
        _by_one_dnn(a, b) if fine and _prefers_one_dnn(a, b.shape[0]) else torch.mm(a, b.T, out=out)
    )


def squares(
    a: Tensor, b: Tensor, of_a: Tensor, of_b: Tensor, precision: Precision = "float32"
) -> Tensor:
    """(r, c) |a - b|^2 = |a|^2 + |b|^2 - 2ab of rows with these squared lengths (r,), (c,).

    The rows are rounded to the precision already.
    """
    if (narrow := _narrow(precision, a)) is not None:
        return _in_narrow(a, b.T, narrow).mul_(-2).add_(of_b).add_(of_a.unsqueeze(1))
    if _prefers_one_dnn(a, b.shape[0]):
        return _by_one_dnn(a * -2, b, of_b).add_(of_a[:, None])
    return torch.add(of_a[:, None], of_b).addmm_(a, b.T, alpha=-2)


def _narrow(precision: Precision, a: Tensor) -> torch.dtype | None:
    """The dtype in which the device of `a` multiplies rounded numbers; None: in float32."""
    narrow = NARROW.get(precision)
    return narrow if narrow is not None and a.is_cuda and _has_product(narrow, a.device) else None


@cache
def _has_product(narrow: torch.dtype, device: torch.device) -> bool:
    """Whether torch multiplies numbers of this dtype there, with sums and results in float32."""
    x = torch.ones(16, 16, dtype=narrow, device=device)
    try:
        torch.mm(x, x, out_dtype=torch.float32)
    except (TypeError, RuntimeError):
        return False
    return True


def _in_narrow(a: Tensor, b: Tensor, narrow: torch.dtype) -> Tensor:
    """a @ b, of numbers that the dtype holds."""
    return torch.mm(a.to(narrow), b.to(narrow), out_dtype=torch.float32)


# Takes the gradient of some rows, which are not needed any more.
Finish = Callable[[slice, Tensor], None]


class Gradient:
    """The gradient of rows `a` (n, d) and columns `b` (m, d), added up tile by tile.

    The tiles come row by row. As soon as other rows follow, `finish`, where given, takes the
    gradient of the rows before them, so that no memory is held for the gradient of all rows.

    Where the columns are the rows, a tile on the diagonal holds each pair twice: its gradient by
    the columns is that of its transpose by the rows.

    Forces are rounded to `precision`, as `a` and `b` are already. With `fine` they keep twice the
    digits.
    """

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        finish: Finish | None = None,
        precision: Precision = "float32",
        *,
        fine: bool = False,
    ) -> None:
        self.a, self.b, self._finish = a, b, finish
        self.precision, self._fine = precision, fine
        self._narrow = _narrow(precision, a)
        self._rows: slice | None = None
        self._strip: Tensor | None = None
        self._transposed: Tensor | None = None
        self._of_squares: Tensor | None = None

    @cached_property
    def da(self) -> Tensor:
        """(n, d) of all rows before the present ones."""
        return torch.zeros_like(self.a)

    @cached_property
    def db(self) -> Tensor:
        """(m, d) of the columns; never made where one tile is all of rows with themselves."""
        # Laid out transposed, as oneDNN returns it.
        if self.a.shape[1] >= _FEWEST_ROWS and _prefers_one_dnn(self.a, self.b.shape[0]):
            return self.b.new_zeros(self.b.shape[::-1]).T
        return torch.zeros_like(self.b)

    def of_rows(self, rows: slice) -> Tensor:
        """(r, d) of the rows of a tile, to be added to."""
        self._go_to(rows)
        if self._strip is None:
            self._strip = torch.zeros_like(part(self.a, rows))
        return self._strip

    def of_columns(self, columns: slice) -> Tensor:
        """(c, d) of the columns of a tile, to be added to."""
        return part(self.db, columns)

    def add(
        self, force: Tensor, rows: slice, columns: slice, by: float = 1, *, uniform: bool = False
    ) -> None:
        """Add the gradient of by * sum(force * products(a[rows], b[columns])).

        Args:
            force: (r, c).
            rows: of the tile.
            columns: of the tile.
            by: a factor.
            uniform: whether no force far outweighs the others, as those on positives do.
        """
        self._add(self._both_halves(force, rows, columns), rows, columns, by, uniform)

    def _add(self, force: Tensor, rows: slice, columns: slice, by: float, uniform: bool) -> None:
        self._add_to_rows(force, rows, columns, by, uniform)
        if self._on_diagonal(rows, columns):
            return
        if self._narrow is not None:
            more = self._of_forces(force.T, part(self.a, rows), self._narrow)
            self.of_columns(columns).add_(more, alpha=by)
        elif uniform and _prefers_one_dnn(force.T, self.a.shape[1]):
            if self._transposed is None:  # (d, r), for all tiles of these rows
                self._transposed = part(self.a, rows).T.contiguous()
            self.of_columns(columns).T.add_(_by_one_dnn(self._transposed, force.T), alpha=by)
        elif "db" not in vars(self) and force.shape[1] == self.b.shape[0]:
            self.db = torch.addmm(self.b, force.T, part(self.a, rows), beta=0, alpha=by)
        else:
            self.of_columns(columns).addmm_(force.T, part(self.a, rows), alpha=by)

    def add_squares(
        self, force: Tensor, rows: slice, columns: slice, *, uniform: bool = False
    ) -> None:
        """Add the gradient of sum(force * |a[rows] - b[columns]|^2) / 2; see `add`."""
        force = self._both_halves(force, rows, columns)
        self._add(force, rows, columns, -1, uniform)
        if not self._on_diagonal(rows, columns):
            if self._of_squares is None:
                self._of_squares = self.b.new_zeros(self.b.shape[0])
            part(self._of_squares, columns).add_(force.sum(0))
        self.of_rows(rows).addcmul_(force.sum(1)[:, None], part(self.a, rows))

    def whole(self) -> tuple[Tensor | None, Tensor | None]:
        """(n, d) of the rows, None where each was finished; (m, d) of the columns.

        Of rows with themselves the first is all, and the second None.
        """
        if self._finish is not None and self._rows is None:  # there are no columns
            self._finish(slice(0, self.a.shape[0]), torch.zeros_like(self.a))
        self._go_to(None)
        if self._of_squares is not None:
            self.db.addcmul_(self._of_squares[:, None], self.b)
        if self._finish is not None:
            return None, self.db
        if self.a is not self.b:
            return self.da, self.db
        return (self.da.add_(self.db) if "db" in vars(self) else self.da), None

    def _both_halves(self, force: Tensor, rows: slice, columns: slice) -> Tensor:
        """The forces of a tile, on the diagonal with those of its transpose; rounded."""
        if self._on_diagonal(rows, columns):
            force = force + force.T
        return rounded_forces(force, self.precision, fine=self._fine)

    def _of_forces(self, force: Tensor, rows: Tensor, narrow: torch.dtype) -> Tensor:
        """force @ rows, where the device multiplies them in a narrow dtype."""
        up = up_to_float16(force) if narrow is torch.float16 and force.numel() else None
        scaled = force if up is None else force * up
        found = _in_narrow(scaled, rows, narrow)
        if self._fine:
            found += _in_narrow(scaled - scaled.to(narrow), rows, narrow)
        return found if up is None else found.div_(up)

    def _on_diagonal(self, rows: slice, columns: slice) -> bool:
        """Whether a tile lies on the diagonal of rows with themselves, and so holds both halves."""
        return self.a is self.b and rows == columns

    def _go_to(self, rows: slice | None) -> None:
        """Start on the gradient of these rows; None: there are no more."""
        if rows == self._rows:
            return
        before, strip = self._rows, self._strip
        self._rows = rows
        self._strip = self._transposed = None
        if before is None or strip is None:
            return
        if self._finish is not None:
            self._finish(before, strip)
        elif "da" not in vars(self) and strip.shape == self.a.shape:
            self.da = strip
        else:
            part(self.da, before).add_(strip)

    def _add_to_rows(
        self, force: Tensor, rows: slice, columns: slice, by: float, uniform: bool
    ) -> None:
        b = part(self.b, columns)
        self._go_to(rows)
        strip, more = self._strip, None
        if self._narrow is not None:
            more = self._of_forces(force, b, self._narrow)
        elif uniform and _prefers_one_dnn(force, b.shape[1]):
            more = _by_one_dnn(force, b.T)
        if more is not None:
            self._strip = more.mul_(by) if strip is None else strip.add_(more, alpha=by)
        elif strip is None:  # what comes first need not be added
            self._strip = torch.addmm(part(self.a, rows), force, b, beta=0, alpha=by)
        else:
            strip.addmm_(force, b, alpha=by)


def _prefers_one_dnn(a: Tensor, n: int) -> bool:
    """Whether oneDNN is faster, and exact enough, for products of rows `a` (r, k) with n others."""
    work, terms = a.numel() * n, a.shape[1]
    if not _THERE or work < _FEWEST or min(a.shape[0], n) < _FEWEST_ROWS:
        return False
    if terms > (_SHORT if work < _LARGE else _LONG):
        return False
    on = bool(torch.backends.mkldnn.enabled)  # a user may switch it off
    return on and a.dtype is torch.float32 and a.is_cpu


def _by_one_dnn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    assert _one_dnn is not None
    return _one_dnn(_dense(a), _dense(b), bias, "none", [], "")


def _dense(x: Tensor) -> Tensor:
    """`x`, copied where neither its rows nor its columns are contiguous.

    oneDNN is about 1000x slower on those.
    """
    return x if x.is_contiguous() or x.T.is_contiguous() else x.contiguous()
