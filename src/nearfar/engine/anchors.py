"""The rows of a block as anchors: who their positives are, listed, since positives are few."""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from nearfar.labels import share_label
from nearfar.relation import Relation

# Which rows: those of a block, or listed ones.
Rows = slice | Tensor


@dataclass(frozen=True, eq=False)
class Anchors:
    """Some rows and their positives, row by row, each row's in order of their columns.

    Attributes:
        row, column: (k,) which of these rows has a positive, and in which column.
        slot: (k,) the how-manieth of its row each positive is.
        count: (b,) how many positives a row has.
        most: how many the row with the most has.
        n_negatives: (b,) how many negatives a row has.
        itself: (s,), (s,) rows that meet themselves, and in which column.
    """

    row: Tensor
    column: Tensor
    slot: Tensor
    count: Tensor
    most: int
    n_negatives: Tensor
    itself: tuple[Tensor, Tensor]

    def hide(self, d: Tensor) -> Tensor:
        """`d` with everyone who is no negative as far away as can be; overwrites it."""
        d[self.row, self.column] = inf
        d[self.itself] = inf
        return d

    def table(self, d: Tensor, fill: float) -> Tensor:
        """(b, most) the distances to the positives, filled up."""
        table = d.new_full((len(d), self.most), fill)
        table[self.row, self.slot] = d[self.row, self.column]
        return table

    def columns(self) -> Tensor:
        """(b, most) which columns the positives are in; 0 where there are fewer."""
        table = self.column.new_zeros(len(self.count), self.most)
        table[self.row, self.slot] = self.column
        return table

    def extreme(self, d: Tensor, *, farthest: bool) -> Tensor:
        """(b,) the column of the farthest or the nearest positive; 0 where there is none."""
        if not self.most:
            return torch.zeros_like(self.count)
        table = self.table(d, -inf if farthest else inf)
        slot = table.argmax(1, keepdim=True) if farthest else table.argmin(1, keepdim=True)
        return self.columns().gather(1, slot)[:, 0]


def anchors_in(relation: Relation) -> Callable[[Rows], Anchors]:
    """A function that lists the anchors of any rows of a relation.

    Class ids are sorted once, here: the positives of a row are then a run of the order, and no
    mask is made. Multi-labels are compared block by block.
    """
    labels, others, own_of = relation.row_labels, relation.column_labels, relation.own
    assert labels is not None
    assert others is not None
    positives = _by_class(labels, others) if labels.ndim == 1 else _by_label(labels, others)

    def of(rows: Rows) -> Anchors:
        row, column, size = positives(rows)
        own = size.new_full(size.shape, -1) if own_of is None else own_of[rows]
        if own_of is not None:
            apart = column != own[row]
            row, column = row[apart], column[apart]
        count = torch.bincount(row, minlength=len(size))
        slot = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
        (met,) = (own >= 0).nonzero(as_tuple=True)
        most = int(count.max()) if len(count) else 0
        n_negatives = relation.m - count - (own >= 0).long()
        return Anchors(row, column, slot, count, most, n_negatives, (met, own[met]))

    return of


# (k,) rows of a block and (k,) columns they share a label with; (b,) how many, for each row.
_Positives = Callable[[Rows], tuple[Tensor, Tensor, Tensor]]


def _by_class(labels: Tensor, others: Tensor) -> _Positives:
    ordered, order = others.sort(stable=True)
    start = torch.searchsorted(ordered, labels)
    size = torch.searchsorted(ordered, labels, right=True) - start

    def positives(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        here = size[rows]
        row = torch.arange(len(here), device=here.device).repeat_interleave(here)
        shift = start[rows] - (here.cumsum(0) - here)
        place = torch.arange(len(row), device=here.device).add_(shift[row])
        return row, order[place], here

    return positives


def _by_label(labels: Tensor, others: Tensor) -> _Positives:
    def positives(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        similar = share_label(labels[rows], others)
        row, column = similar.nonzero(as_tuple=True)
        return row, column, similar.sum(1)

    return positives
