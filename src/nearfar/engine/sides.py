"""The rows and columns of a comparison, prepared for an executor, and their gradients' way back."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nearfar.engine.products import Finish
from nearfar.engine.ring import Ring
from nearfar.engine.rows import Rows, row_dots
from nearfar.engine.together import Together, of_shared
from nearfar.reduction import sum_dtype

Scale = Tensor | float | None
# The gradients of x, y and the scale.
Gradients = tuple[Tensor, Tensor | None, Tensor | None]


class Sides(Protocol):
    """Rows and columns as an executor takes them.

    Attributes:
        a: (n, d) rows, see `Request`.
        b: (m, d) columns, see `Request`.
        finish: likewise.
        ring: likewise.
        finite: whether all are known to be finite.
        seen: the rows and columns that were given, or others with NaN where these are not finite.
    """

    @property
    def a(self) -> Tensor: ...

    @property
    def b(self) -> Tensor | None: ...

    @property
    def finish(self) -> Finish | None: ...

    @property
    def ring(self) -> Ring | None: ...

    @property
    def finite(self) -> bool: ...

    @property
    def seen(self) -> tuple[Tensor, Tensor | None]: ...

    def back(self, da: Tensor | None, db: Tensor | None) -> Gradients:
        """The gradients of what was given, from those of `a` and `b`, which change."""
        ...


@dataclass(eq=False)
class How:
    """How rows and columns are prepared.

    Attributes:
        wide: the dtype that is computed in.
        normalize: whether they are scaled to length 1.
        scale: what their products are multiplied with.
        learned: whether the scale gets a gradient.
        rings: whether columns of several processes travel, rather than being gathered.
    """

    wide: torch.dtype
    normalize: bool
    scale: Scale
    learned: bool
    rings: bool = False


def sides(
    x: Tensor, y: Tensor | None, how: How, together: Together | None, *, at_both_ends: bool
) -> Sides:
    """Rows `x` and columns `y` (None: the rows themselves).

    Args:
        x: (n, d).
        y: (m, d).
        how: they are prepared.
        together: the processes that they are spread over; None: this one has all.
        at_both_ends: whether rows that meet each other are multiplied by the root of the scale,
            rather than one end of a pair by the scale.
    """
    if together is not None:
        return _Dealt(x, how, together) if together.dealt else _Spread(x, y, how, together)
    if y is not None:
        return _Two(x, y, how)
    return _One(x, how, at_both_ends=at_both_ends)


class _One:
    """Rows that meet each other."""

    finish = ring = None

    def __init__(self, x: Tensor, how: How, *, at_both_ends: bool) -> None:
        self._how, scale = how, how.scale
        self._rows = Rows(x.to(how.wide), how.normalize, how.learned and at_both_ends)
        self.a, self.b = self._rows.ready, None
        if scale is not None and at_both_ends:
            self.a = self._rows.times(root(scale, how.wide))
        elif scale is not None:
            self.a, self.b = self.a * scale, self.a
        self.finite, self.seen = self._rows.finite, (x, None)

    def back(self, da: Tensor | None, db: Tensor | None) -> Gradients:
        assert da is not None
        rows, scale, of_scale = self._rows, self._how.scale, None
        if rows.scale is not None:  # the root of the scale, at both ends
            dx = rows.back(da)
            return dx, None, None if rows.dots is None else rows.dots / (2 * rows.scale)
        if scale is not None:
            assert db is not None  # the columns are not scaled
            if self._how.learned:
                of_scale = _of_scale(scale, _dots(da, rows.ready), _dots(db, rows.ready))
            da = da.mul_(scale)
        return rows.back(da if db is None else da.add_(db)), None, of_scale


class _Two:
    """Rows and other columns."""

    ring = None

    def __init__(self, x: Tensor, y: Tensor, how: How) -> None:
        self._how = how
        self._rows = Rows(x.to(how.wide), how.normalize, how.learned)
        self._columns = Rows(y.to(how.wide), how.normalize, how.learned)
        self.a: Tensor = self._rows.ready
        self.b: Tensor | None = self._columns.ready
        if how.scale is not None:  # in place, which spares a copy of the rows
            self.a = self._rows.times(how.scale)
        self.finish: Finish | None = self._rows.finish
        self.finite, self.seen = self._rows.finite and self._columns.finite, (x, y)

    def back(self, da: Tensor | None, db: Tensor | None) -> Gradients:
        assert db is not None
        dx = self._rows.ready if da is None else self._rows.back(da)
        dy = self._columns.back(db)
        return dx, dy, _of_scale(self._how.scale, self._rows.dots, self._columns.dots)


class _Spread:
    """The rows of this process, and the columns of all."""

    finish = None

    def __init__(self, x: Tensor, y: Tensor | None, how: How, together: Together) -> None:
        self._how, self._together = how, together
        self._rows = Rows(x.to(how.wide), how.normalize, False)
        self._columns = None if y is None else Rows(y.to(how.wide), how.normalize, False)
        own = self._rows.ready
        if together.shared_rows:
            own = own[together.rows.own]
        self._own = own
        others = self._rows.ready if self._columns is None else self._columns.ready
        self._others = others
        self.a = own if how.scale is None else own * how.scale
        self.b: Tensor | None = None
        self.ring: Ring | None = None
        if together.columns is None:
            self.b = others
        elif how.rings:
            self.ring = Ring(together.columns, others)
        else:
            self.b = together.columns.gather(others)
        # Of the rows of other processes it is not known.
        self.finite, seen = False, self.b
        if seen is None:  # 0, or NaN
            seen = together.total((others * 0).sum()[None, None])
        self.seen: tuple[Tensor, Tensor | None] = own, seen

    def back(self, da: Tensor | None, db: Tensor | None) -> Gradients:
        assert da is not None
        together, how, of_scale = self._together, self._how, None
        if how.learned and db is not None:
            columns = self._others if self.b is None else self.b
            of_scale = _of_scale(how.scale, _dots(da, self._own), _dots(db, columns))
            of_scale = None if of_scale is None else together.total(of_scale)
        self.b, self.seen = None, (self._own, None)  # their memory is needed for what follows
        if how.scale is not None:
            da = da.mul_(how.scale)
        if together.columns is None:
            db = of_shared(db, together)
        elif self.ring is None and db is not None:  # else it came home
            db = together.columns.sum_to_owners(db)
        if together.shared_rows:
            da = together.rows.gather(da)
        if self._columns is None:  # without db, da holds what the rows are given as columns
            return self._rows.back(da if db is None else da.add_(db)), None, of_scale
        assert db is not None
        return self._rows.back(da), self._columns.back(db), of_scale


class _Dealt:
    """The rows of all processes, which meet each other; each process takes a part of the tiles."""

    finish = ring = None

    def __init__(self, x: Tensor, how: How, together: Together) -> None:
        self._how, self._together = how, together
        self._rows = Rows(x.to(how.wide), how.normalize, False)
        self.a, self.b = together.rows.gather(self._rows.ready), None
        self._root = None if how.scale is None else root(how.scale, how.wide)
        if self._root is not None:  # at both ends, which spares a copy and its gradient
            self.a.mul_(self._root)
        self.finite, self.seen = False, (self.a, None)

    def back(self, da: Tensor | None, db: Tensor | None) -> Gradients:
        assert da is not None
        together, of_scale = self._together, None
        if self._root is not None:
            if self._how.learned:
                of_scale = together.total(_dots(da, self.a)) / (2 * self._root**2)
            da = da.mul_(self._root)
        own = together.rows.sum_to_owners(da if db is None else da.add_(db))
        return self._rows.back(own), None, of_scale


def root(scale: Tensor | float, wide: torch.dtype) -> Tensor | float:
    """The root of a scale, in the dtype of what it multiplies."""
    return scale.to(wide).sqrt() if isinstance(scale, Tensor) else scale**0.5


def _dots(gradient: Tensor, rows: Tensor) -> Tensor:
    return row_dots(gradient, rows).sum(dtype=sum_dtype(gradient))


def _of_scale(scale: Scale, of_rows: Tensor | None, of_columns: Tensor | None) -> Tensor | None:
    """The gradient of the scale, from the products of rows or columns with their gradients.

    Apart from the scale of the rows, the two differ by rounding errors only, so their mean, which
    has fewer, is taken.
    """
    if not isinstance(scale, Tensor) or of_rows is None or of_columns is None:
        return None
    return (of_rows + of_columns / scale) / 2
