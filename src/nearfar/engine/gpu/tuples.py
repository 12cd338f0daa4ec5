"""Losses of triplets and quadruplets on a GPU, by kernels that keep no tile.

A program owns some rows and walks over all columns, and nothing is added in an order that could
change. No value is read on the host.
"""

import torch
from torch import Tensor

from nearfar.engine.closeness import Closeness
from nearfar.engine.gpu.comparison import Comparison
from nearfar.engine.gpu.kernels import tuples as kernels
from nearfar.engine.relation import Relation
from nearfar.engine.step import Request


def hardest(
    request: Request, closeness: Closeness, relation: Relation, *, easy_positive: bool
) -> Tensor:
    """(n, 3) each anchor, its farthest or nearest positive, and its nearest negative; -1: none."""
    compared = Comparison(request, closeness, relation)
    positive, (negative, _) = _extremes(compared, positives=True, farthest=not easy_positive)
    anchor = torch.arange(relation.n, device=relation.device)
    return torch.stack([anchor, positive, negative], 1)


def two_nearest(
    request: Request, closeness: Closeness, relation: Relation
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(n,) the nearest negative of each row, the nearest of a third class, and their distances."""
    compared = Comparison(request, closeness, relation)
    assert relation.column_labels is not None
    _, (one, d_one) = _extremes(compared)
    _, (two, d_two) = _extremes(compared, relation.column_labels[one.clamp(min=0)])
    return one, two, d_one, d_two


def _extremes(
    compared: Comparison,
    avoided: Tensor | None = None,
    *,
    positives: bool = False,
    farthest: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The farthest or nearest positive, and the nearest negative, of each row.

    Args:
        compared: the rows.
        avoided: (n,) a class of which no negative is taken.
        positives: whether the first is wanted; else it is empty.
        farthest: which positive.

    Returns:
        (n,) int64, the positives, -1 for none.
        (n,) int64 and (n,), the negatives likewise, and their distances, inf for none.
    """
    own = compared.rows
    grid = compared.grid("collect", own, compared.columns)
    values = own.operand.new_empty(2, grid.parts, own.count, dtype=torch.float32)
    places = torch.full_like(values, -1, dtype=torch.int32)
    near = (values[0], places[0]) if positives else (None, None)
    compared.launch(
        kernels.extremes,
        grid,
        *(own, compared.columns, avoided, *near, values[1], places[1]),
        *(compared.d, compared.words, grid.split),
        FARTHEST=farthest,
    )
    best = values.argmax(1, keepdim=True)  # of equal ones the first part
    at = places.gather(1, best)[:, 0].long()
    return at[0], (at[1], -values[1].gather(0, best[1])[0])
