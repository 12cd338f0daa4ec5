"""The closeness of listed pairs, and the gradient of forces on them.

Both gather the rows of some pairs at a time, so that memory is linear in the number of pairs,
whatever the width of the rows. Gradients are always added in the same order.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from nearfar.engine.budget import block
from nearfar.engine.closeness import Closeness, add_rows
from nearfar.engine.listed import show_listed
from nearfar.engine.observe import force_visitors
from nearfar.engine.relation import PairList, Relation
from nearfar.engine.slices import spans
from nearfar.engine.step import Answer, Request

Ends = tuple[Tensor, Tensor]

# Copies of the rows of a pair held at the same time: two rows, their difference, two gradients.
_BUFFERS = 6


def measure_list(closeness: Closeness, pairs: PairList, request: Request) -> tuple[Tensor, Tensor]:
    """(p,) the closeness of the similar pairs, and (q,) that of the dissimilar ones."""
    near, far = (_measure(closeness, ends, request) for ends in (pairs.positive, pairs.negative))
    return near, far


def _measure(closeness: Closeness, ends: Ends, request: Request) -> Tensor:
    found = request.a.new_zeros(len(ends[0]))
    for at, row, column in _chunks(ends, request):
        x, y = request.a.index_select(0, row), request.columns.index_select(0, column)
        found[at] = closeness.between(x, y)
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
    da = torch.zeros_like(request.a)
    db = None if request.b is None else torch.zeros_like(request.b)
    both = tuple(zip((pairs.positive, pairs.negative), measured, forces, strict=True))
    for ends, values, force in both:
        for at, row, column in _chunks(ends, request):
            x, y = request.a.index_select(0, row), request.columns.index_select(0, column)
            of_x, of_y = closeness.between_backward(force[at], x, y, values[at])
            add_rows(da, row, of_x)
            add_rows(da if db is None else db, column, of_y)
    if force_visitors():
        row, column = (torch.cat([ends[i] for ends, *_ in both]) for i in (0, 1))
        values, force = torch.cat(measured), torch.cat(forces)
        show_listed(request, relation, row, column, values, force, closeness.distance_sign)
    return Answer(per_row, counts, da, db)


def _chunks(ends: Ends, request: Request) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some pairs at a time: which, their rows and their columns."""
    a = request.a
    size = block(request.limits, a.device, a.element_size(), _BUFFERS, a.shape[1])
    row, column = ends
    for at in spans(len(row), size):
        yield at, row[at], column[at]
