"""The closeness of listed pairs, and the gradient of forces on them.

Few pairs are measured one by one, from their gathered rows. If a list holds a good part of all
pairs, tiles of all of them are faster, in which the listed ones are looked up. Memory is linear in
the number of listed pairs and in the batch, and gradients are always added in the same order.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from nearfar.engine.budget import block
from nearfar.engine.closeness import Closeness, Tile
from nearfar.engine.listed_tuples import show_listed
from nearfar.engine.observe import force_visitors
from nearfar.engine.pair_sets import Listed
from nearfar.engine.products import Gradient
from nearfar.engine.relation import Block, PairList, Relation
from nearfar.engine.slices import add_rows, joined, part, spans
from nearfar.engine.step import Answer, Request

Ends = tuple[Tensor, Tensor]
# Which pairs, and (k,) where they are in a flat tile.
_Place = tuple[slice, Tensor]

# Copies of the rows of a pair held at the same time: two rows, their difference, two gradients.
_BUFFERS = 6
# Copies of a tile: closeness, forces, and what a closeness keeps.
_TILE_BUFFERS = 6
# Measured: from one pair in so many on, tiles are faster.
_SPARSE = 64


def measure_list(closeness: Closeness, pairs: PairList, request: Request) -> tuple[Tensor, Tensor]:
    """(p,) the closeness of the similar pairs, and (q,) that of the dissimilar ones."""
    if _many(closeness, pairs, request):
        return _Tiles(closeness, pairs, request).measure()
    near, far = (_measured(closeness, ends, request) for ends in (pairs.positive, pairs.negative))
    return near, far


def _measured(closeness: Closeness, ends: Ends, request: Request) -> Tensor:
    found = request.a.new_empty(len(ends[0]))
    for at, x, y in _gathered(closeness, ends, request):
        found[at] = closeness.between(x, y, request.precision)
    return found


def answer_for_list(
    closeness: Closeness,
    relation: Relation,
    request: Request,
    measured: tuple[Tensor, Tensor],
    forces: tuple[Tensor, Tensor],
    per_row: Tensor,
    counts: Tensor | float | None,
) -> Answer:
    """What the step is told, with the gradient of the forces on the listed pairs.

    Args:
        closeness: of a row and a column.
        relation: whose pairs are listed.
        request: what is asked.
        measured: from `measure_list`.
        forces: (p,) and (q,), the derivatives of the sum of the weighted losses by them.
        per_row: see `Answer`.
        counts: see `Answer`.
    """
    if not request.gradient:
        return Answer(per_row, counts)
    pairs = relation.listed
    assert pairs is not None
    both = pairs.positive, pairs.negative
    if _many(closeness, pairs, request):
        da, db = _Tiles(closeness, pairs, request).gradient(forces)
    else:
        da = torch.zeros_like(request.a)
        db = None if request.b is None else torch.zeros_like(request.b)
        for ends, values, force in zip(both, measured, forces, strict=True):
            for at, x, y in _gathered(closeness, ends, request):
                of_x, of_y = closeness.between_backward(force[at], x, y, values[at])
                add_rows(da, ends[0][at], of_x)
                add_rows(da if db is None else db, ends[1][at], of_y)
    if force_visitors():
        row, column = (torch.cat(ends) for ends in zip(*both, strict=True))
        values, force = torch.cat(measured), torch.cat(forces)
        show_listed(request, relation, row, column, values, force, closeness.distance_sign)
    return Answer(per_row, counts, da, db)


def _many(closeness: Closeness, pairs: PairList, request: Request) -> bool:
    listed = len(pairs.positive[0]) + len(pairs.negative[0])
    every = request.a.shape[0] * request.columns.shape[0]
    return closeness.by_products and listed * _SPARSE >= every > 0


def _gathered(
    closeness: Closeness, ends: Ends, request: Request
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some pairs at a time: which, and copies of their rows and columns."""
    (a, b), (row, column) = request.aligned(closeness), ends
    columns = a if b is None else b
    size = block(request.limits, a.device, a.element_size(), _BUFFERS, a.shape[1])
    for at in spans(len(row), size):
        yield at, a.index_select(0, row[at]), columns.index_select(0, column[at])


class _Tiles:
    """Blocks of rows against all columns, and the listed pairs in each."""

    def __init__(self, closeness: Closeness, pairs: PairList, request: Request) -> None:
        self._closeness, self._request = closeness, request
        self._a, b = request.prepared(closeness)
        self._columns = self._a if b is None else b
        self._kinds = pairs.by_row

    def measure(self) -> tuple[Tensor, Tensor]:
        found: tuple[list[Tensor], list[Tensor]] = [], []
        for _, values, _, places in self._visit():
            for kind, (_, index) in zip(found, places, strict=True):
                kind.append(values.view(-1).index_select(0, index))
        near, far = (
            kind.listed(joined(parts, self._a))
            for kind, parts in zip(self._kinds, found, strict=True)
        )
        return near, far

    def gradient(self, forces: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The gradient of the rows and of the columns (None: they are the rows)."""
        request, m = self._request, self._columns.shape[0]
        how = None, request.precision
        gradient = Gradient(self._a, self._columns, *how, fine=request.learns_scale)
        in_order = [kind.sorted(f) for kind, f in zip(self._kinds, forces, strict=True)]
        for rows, values, aside, places in self._visit():
            by = torch.zeros_like(values)
            for force, (here, index) in zip(in_order, places, strict=True):
                add_rows(by.view(-1), index, force[here])
            # A block with positives, whose forces may far outweigh the others.
            shape = rows.stop - rows.start, m
            none = torch.zeros(0, dtype=torch.int64, device=values.device)
            among = Block(shape, Listed(shape, none, none), None, values.device)
            tile = Tile(rows, slice(0, m), among, values, aside)
            self._closeness.backward(by, tile, gradient)
        da, db = gradient.whole()
        assert da is not None
        return da, db

    def _visit(self) -> Iterator[tuple[slice, Tensor, Tensor | None, list[_Place]]]:
        """Rows, their closeness to all columns, what is beside it, and the pairs of each kind."""
        a, m = self._a, self._columns.shape[0]
        height = block(self._request.limits, a.device, a.element_size(), _TILE_BUFFERS, m)
        starts = torch.arange(0, a.shape[0] + height, height, device=a.device)
        ends = [torch.searchsorted(kind.row, starts).tolist() for kind in self._kinds]
        for k, rows in enumerate(spans(a.shape[0], height)):
            places = []
            for kind, end in zip(self._kinds, ends, strict=True):
                here = slice(end[k], end[k + 1])
                places.append((here, (kind.row[here] - rows.start) * m + kind.column[here]))
            of_rows, request = part(a, rows), self._request
            where, precision = (of_rows, self._columns, request.bound), request.precision
            yield rows, *self._closeness.measure(*where, precision=precision), places
