"""The matrix products that the losses are made of, by the fastest routine that torch carries.

`torch.mm` is MKL's on a CPU, which leaves a third of what an AMD processor can do unused; torch
carries oneDNN too, whose product of float32 rows is 1.1 to 1.4 times as fast there (see
docs/results.md). It adds up the terms of an entry one by one, where MKL adds up blocks of them: of
128 terms the rounding error is the same, of 500 to 1,024 it is 1.7 times as large, of more it is
more than twice, and one term that is far larger than the others takes their digits. So MKL keeps
such sums, and all but the shortest where there is little time to gain.
"""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from nearfar.engine.slices import part

_one_dnn: Callable[..., Tensor] | None = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
# Without AVX-512 the two are alike.
_THERE = _one_dnn is not None and torch.backends.cpu.get_cpu_capability() == "AVX512"
# Measured: with fewer multiplications, or fewer rows of either kind, nothing is gained.
_FEWEST, _FEWEST_ROWS = 2**25, 256
# Sums of so many terms have the rounding error of torch.mm's, of so many up to 1.4 times, and of so
# many up to 1.7 times, which only a product of so many multiplications is worth.
_ALIKE, _SHORT, _LONG, _LARGE = 128, 256, 1024, 2**28
# Of exponents that may be larger, the rounding errors are most of what their exponentials have.
_MODEST = 16.0


def products(a: Tensor, b: Tensor, bound: float = 1.0, *, out: Tensor | None = None) -> Tensor:
    """The inner products of rows.

    Args:
        a: (r, d).
        b: (c, d).
        bound: no exponent made of them is larger in size than this; inf: not known.
        out: (r, c) where they may be put, and are where that costs nothing.

    Returns:
        (r, c).
    """
    fine = bound <= _MODEST or a.shape[1] <= _ALIKE
    return _by_one_dnn(a, b) if fine and _gains(a, b.shape[0]) else torch.mm(a, b.T, out=out)


def squares(a: Tensor, b: Tensor, of_a: Tensor, of_b: Tensor) -> Tensor:
    """(r, c) |a - b|^2 = |a|^2 + |b|^2 - 2ab of rows with these squared lengths (r,), (c,)."""
    if _gains(a, b.shape[0]):
        return _by_one_dnn(a * -2, b, of_b).add_(of_a[:, None])
    return torch.add(of_a[:, None], of_b).addmm_(a, b.T, alpha=-2)


# Takes the gradient of some rows, which are not needed any more.
Finish = Callable[[slice, Tensor], None]


class Gradient:
    """The gradient of rows `a` (n, d) and columns `b` (m, d), added up tile by tile.

    The tiles come row by row. Where `finish` is given, it gets the gradient of the rows of a tile
    as soon as others follow, and no memory is held for that of all rows.

    Where the columns are the rows, a tile on the diagonal holds both halves: what a row does as a
    column is the same with its row and column exchanged.
    """

    def __init__(self, a: Tensor, b: Tensor, finish: Finish | None = None) -> None:
        self.a, self.b, self._finish = a, b, finish
        self._rows: slice | None = None
        self._strip: Tensor | None = None
        self._turned: Tensor | None = None
        self._along: Tensor | None = None

    @cached_property
    def da(self) -> Tensor:
        """(n, d) of the rows that others have followed."""
        return torch.zeros_like(self.a)

    @cached_property
    def db(self) -> Tensor:
        """(m, d) of the columns; not made where one tile holds rows and columns alike."""
        # oneDNN gives it transposed; so it is kept, until it is whole.
        if self.a.shape[1] >= _FEWEST_ROWS and _gains(self.a, self.b.shape[0]):
            return self.b.new_zeros(self.b.shape[::-1]).T
        return torch.zeros_like(self.b)

    def of_rows(self, rows: slice) -> Tensor:
        """(r, d) of the rows of a tile, to be added to."""
        self._turn_to(rows)
        if self._strip is None:
            self._strip = torch.zeros_like(part(self.a, rows))
        return self._strip

    def of_columns(self, columns: slice) -> Tensor:
        """(c, d) of the columns of a tile, to be added to."""
        return part(self.db, columns)

    def add(
        self, force: Tensor, rows: slice, columns: slice, by: float = 1, *, even: bool = False
    ) -> None:
        """Add the gradient of by * sum(force * products(a[rows], b[columns])).

        Args:
            force: (r, c).
            rows: of the tile.
            columns: of the tile.
            by: a factor.
            even: whether no force is far larger than the others, as those on positives are.
        """
        if self._halves(rows, columns):
            self._add_to_rows(force + force.T, rows, columns, by, even)
            return
        self._add_to_rows(force, rows, columns, by, even)
        if even and _gains(force.T, self.a.shape[1]):
            if self._turned is None:  # (d, r), which the tiles beside this one ask for too
                self._turned = part(self.a, rows).T.contiguous()
            self.of_columns(columns).T.add_(_by_one_dnn(self._turned, force.T), alpha=by)
        elif "db" not in vars(self) and force.shape[1] == self.b.shape[0]:
            self.db = torch.addmm(self.b, force.T, part(self.a, rows), beta=0, alpha=by)
        else:
            self.of_columns(columns).addmm_(force.T, part(self.a, rows), alpha=by)

    def add_apart(self, force: Tensor, rows: slice, columns: slice, *, even: bool = False) -> None:
        """Add that of sum(force * |a - b|^2) / 2; see `add`."""
        if self._halves(rows, columns):
            force = force + force.T
            self._add_to_rows(force, rows, columns, -1, even)
        else:
            self.add(force, rows, columns, -1, even=even)
            if self._along is None:
                self._along = self.b.new_zeros(self.b.shape[0])
            part(self._along, columns).add_(force.sum(0))
        self.of_rows(rows).addcmul_(force.sum(1)[:, None], part(self.a, rows))

    def whole(self) -> tuple[Tensor | None, Tensor | None]:
        """(n, d) of the rows, None where each was finished; (m, d) of the columns.

        Of rows with themselves the first is all, and the second None.
        """
        if self._finish is not None and self._rows is None:  # there are no columns
            self._finish(slice(0, self.a.shape[0]), torch.zeros_like(self.a))
        self._turn_to(None)
        if self._along is not None:
            self.db.addcmul_(self._along[:, None], self.b)
        if self._finish is not None:
            return None, self.db
        if self.a is not self.b:
            return self.da, self.db
        return (self.da.add_(self.db) if "db" in vars(self) else self.da), None

    def _halves(self, rows: slice, columns: slice) -> bool:
        """Whether a tile lies on the diagonal of rows with themselves."""
        return self.a is self.b and rows == columns

    def _turn_to(self, rows: slice | None) -> None:
        """From here on these rows are added to; None: no others follow."""
        if rows == self._rows:
            return
        before, strip = self._rows, self._strip
        self._rows = rows
        self._strip = self._turned = None
        if before is None or strip is None:
            return
        if self._finish is not None:
            self._finish(before, strip)
        elif "da" not in vars(self) and strip.shape == self.a.shape:
            self.da = strip
        else:
            part(self.da, before).add_(strip)

    def _add_to_rows(
        self, force: Tensor, rows: slice, columns: slice, by: float, even: bool
    ) -> None:
        b = part(self.b, columns)
        self._turn_to(rows)
        strip = self._strip
        if even and _gains(force, b.shape[1]):
            more = _by_one_dnn(force, b.T)
            self._strip = more.mul_(by) if strip is None else strip.add_(more, alpha=by)
        elif strip is None:  # what comes first need not be added
            self._strip = torch.addmm(part(self.a, rows), force, b, beta=0, alpha=by)
        else:
            strip.addmm_(force, b, alpha=by)


def whole(gradient: Gradient | None) -> tuple[Tensor | None, Tensor | None]:
    """Of the rows and of the columns; None: it was not wanted."""
    return (None, None) if gradient is None else gradient.whole()


def _gains(a: Tensor, n: int) -> bool:
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
    """`x`, copied where neither its rows nor its columns follow each other without a gap.

    Of such, oneDNN takes a thousand times as long.
    """
    return x if x.is_contiguous() or x.T.is_contiguous() else x.contiguous()
