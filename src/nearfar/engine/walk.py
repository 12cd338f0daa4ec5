"""The walk over the tiles of a comparison: their shape, their order, and where their forces go.

A comparison of rows with columns is never held as a whole. It is cut into tiles of some rows (the
anchors) and some columns. A rule turns the closeness in a tile into forces, and the walk adds their
gradient to the rows and columns. No loss cuts tiles or holds the gradient by itself.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Protocol

from torch import Tensor

from nearfar.engine import budget
from nearfar.engine.budget import Limits
from nearfar.engine.closeness import Closeness, Tile
from nearfar.engine.observe import force_visitors
from nearfar.engine.precision import Precision
from nearfar.engine.products import Gradient
from nearfar.engine.relation import Relation
from nearfar.engine.ring import Ring
from nearfar.engine.slices import part, spans
from nearfar.engine.step import Answer, Request

# Rows, columns, and whether the tile also stands for its transpose.
Place = tuple[slice, slice, bool]


class Walk:
    """The tiles of one request.

    Args:
        request: what is asked.
        closeness: how close rows are to columns.
        relation: which pairs are similar.
        buffers: how many copies of a tile live at once.

    Attributes:
        a: (n, d) the rows, prepared for `closeness`.
        columns: (m, d) the columns, likewise, or (m, k, d) where each is k rows; `a` itself where
            the rows meet each other; of columns that travel, those at hand.
        m: how many columns there are.
        mirrored: whether the tiles of the upper triangle stand for the lower one. Not where the
            closeness of two rows is another from each end. Observers want to see each anchor's own
            forces, so for them nothing is mirrored.
        gradient: the gradient so far; None: it is not wanted.
        own: the gradient of a number that the rule holds, likewise; None: no number is learned.
    """

    def __init__(
        self, request: Request, closeness: Closeness, relation: Relation, *, buffers: int
    ) -> None:
        self.request, self.closeness, self.relation = request, closeness, relation
        self.columns: Tensor
        self.mirrored = relation.symmetric and closeness.symmetric and not force_visitors()
        self.own: Tensor | None = None
        self.gradient: Gradient | None = None
        self._of_rows: Tensor | None = None  # their gradient by the columns that have passed
        self.room = request.limits, request.a.device, request.a.element_size(), buffers
        if request.ring is None:
            self._take_up(0, request, pulling=request.gradient)
            self.m = self.columns.shape[0]
        else:
            self.a, self.m = request.a, request.ring.n

    @cached_property
    def shape(self) -> tuple[int, int]:
        """The rows and columns of a tile."""
        if self.mirrored:
            height, width = budget.triangle_tile(*self.room, self.a.shape[1])
        else:
            height, width = budget.tile(*self.room)
        if self.request.dealt is None:
            return height, width
        # So many tiles that each process gets several.
        most = -(-self.a.shape[0] // (2 * self.request.dealt.processes.size))
        return max(min(height, most), 1), max(min(width, most), 1)

    def places(self, *, pulling: bool = False) -> Iterable[Place]:
        """All tiles, row by row. Mirrored: square ones on the diagonal, and those above it.

        Columns that travel go once around: then a tile must be taken before the next.

        Args:
            pulling: whether forces will be applied to the tiles.
        """
        if self.request.ring is not None:
            return self._around(self.request.ring, pulling)
        return self._places(slice(0, self.m))

    def _around(self, ring: Ring, pulling: bool) -> Iterator[Place]:
        for at in ring.once():
            self._take_up(at.start, replace(self.request, b=ring.held), pulling=pulling)
            yield from self._places(at)
            self.columns = self.a  # the memory of the others is free once they are passed on
            if pulling:
                ring.pass_gradient(self._put_down())

    def _put_down(self) -> Tensor:
        """The gradient of the columns at hand, whose part of that of the rows is kept."""
        assert self.gradient is not None
        da, db = self.gradient.whole()
        self.gradient = None
        assert da is not None
        assert db is not None
        self._of_rows = da if self._of_rows is None else self._of_rows.add_(da)
        return db

    def _take_up(self, first: int, request: Request, *, pulling: bool) -> None:
        """Prepare some columns, from the first on, and their gradient."""
        self.a, b = request.prepared(self.closeness)
        self.columns, self._first = self.a if b is None else b, first
        if pulling:
            columns, how = self.columns.flatten(0, -2), (request.finish, request.precision)
            self.gradient = Gradient(self.a, columns, *how, fine=request.learns_scale)

    def _here(self, columns: slice) -> slice:
        """Where some columns are among those at hand."""
        first = self._first
        return columns if not first else slice(columns.start - first, columns.stop - first)

    def _places(self, columns: slice) -> list[Place]:
        n, (height, width) = self.a.shape[0], self.shape
        if not self.mirrored:
            first, m = columns.start, columns.stop - columns.start
            across = [slice(first + j.start, first + j.stop) for j in spans(m, width)]
            return self._dealt([(i, j, False) for i in spans(n, height) for j in across])
        found = []
        for i in spans(n, height):
            right = (slice(i.stop + j.start, i.stop + j.stop) for j in spans(n - i.stop, width))
            found += [(i, i, False), *((i, j, True) for j in right)]
        return self._dealt(found)

    def _dealt(self, places: list[Place]) -> list[Place]:
        """The tiles of this process: as many as others have, one after the other."""
        if self.request.dealt is None:
            return places
        at = self.request.dealt.processes
        first, last = (len(places) * rank // at.size for rank in (at.rank, at.rank + 1))
        return places[first:last]

    def strip_shape(self, kept: int) -> tuple[int, int]:
        """A tile so low that `kept` copies of all tiles of its rows fit the budget."""
        return budget.strip_tile(*self.room, self.m, kept)

    def strips(self, shape: tuple[int, int]) -> Iterator[tuple[slice, list[Place]]]:
        """Some rows, and their tiles, of this shape at most."""
        height, width = shape
        for rows in spans(self.a.shape[0], max(height, 1)):
            yield rows, [(rows, at, False) for at in spans(self.m, width)]

    def blocks(self) -> Iterator[Tile]:
        """Blocks of rows against all columns."""
        limits, _, _, buffers = self.room
        where = self.closeness, self.relation, self.a, self.columns, limits
        bound, precision = self.request.bound, self.request.precision
        yield from blocks(*where, buffers=buffers, bound=bound, precision=precision)

    def kept_elements(self, copies: int, shape: tuple[int, int] | None = None) -> int:
        """How many elements of the tiles of a first pass a second one may find."""
        limits, device, itemsize, _ = self.room
        return budget.kept_elements(limits, device, itemsize, shape or self.shape, copies)

    def tile(self, place: Place, bound: float | None = None, out: Tensor | None = None) -> Tile:
        """The tile at a place.

        Args:
            place: from `places` or `strips`.
            bound: no exponent made of the closeness is larger than this; None: as the request says.
            out: where the closeness may be put.
        """
        rows, columns, mirrored = place
        a, b = part(self.a, rows), part(self.columns, self._here(columns))
        bound = self.request.bound if bound is None else bound
        values, repaired = self.closeness.measure(a, b, bound, out, self.request.precision)
        return Tile(rows, columns, self.relation.block(rows, columns), values, repaired, mirrored)

    def pull(self, tile: Tile, force: Tensor) -> None:
        """Add the gradient of the forces on a tile; overwrites them and its closeness."""
        assert self.gradient is not None
        show(self.request, tile, force, self.closeness.distance_sign)
        here = self._here(tile.columns)
        if here != tile.columns:
            tile = replace(tile, columns=here)
        self.closeness.backward(force, tile, self.gradient)

    def answer(
        self, per_row: Tensor, counts: Tensor | float | None = None, *, forces: Tensor | None = None
    ) -> Answer:
        """What the step is told: the losses, see `Answer`, and the gradient."""
        if self.request.ring is not None:
            da, db = self._of_rows, self.request.ring.gradient
        else:
            da, db = (None, None) if self.gradient is None else self.gradient.whole()
        return Answer(per_row, counts, da, db, forces, () if self.own is None else (self.own,))


class Measure(Protocol):
    """The half of `Closeness` that measures."""

    def measure(
        self, a: Tensor, b: Tensor, bound: float = ..., *, precision: Precision = ...
    ) -> tuple[Tensor, Tensor | None]: ...


def blocks(
    closeness: Measure,
    relation: Relation,
    a: Tensor,
    columns: Tensor,
    limits: Limits,
    *,
    buffers: int = 12,
    bound: float = 1.0,
    precision: Precision = "float32",
) -> Iterator[Tile]:
    """Blocks of prepared rows against all prepared columns, without a gradient to hold."""
    at, m = slice(0, columns.shape[0]), columns.shape[0]
    for rows in spans(a.shape[0], budget.block(limits, a.device, a.element_size(), buffers, m)):
        # No name holds the closeness: its memory is free as soon as the caller drops the tile.
        yield Tile(
            rows,
            at,
            relation.block(rows, at),
            *closeness.measure(a[rows], columns, bound, precision=precision),
        )


def show(request: Request, tile: Tile, force: Tensor, distance_sign: int) -> None:
    """Show the forces on a tile to observers, in terms of the closeness before scale and bias."""
    for visitor in force_visitors():
        plain = tile.closeness if request.bias is None else tile.closeness - request.bias
        shown = replace(tile, closeness=plain / request.scale)
        visitor.tile(request.a.shape[0], shown, force * distance_sign * request.scale)
